"""Put Delta's and S3A's jars beside Spark's own, once for an environment or an image.

With them in SPARK_HOME/jars a session starts without resolving anything, drivers and workers of a cluster that share
the installation need no `--packages`, and nothing is downloaded at run time.

requirements/jars-4.2.lock, or that of another line of Spark, has the coordinates and SHA-256 of each jar, so that
Spark's own Ivy downloads these files and nothing else. `--lock` renews it from conf/spark-4.2.conf: then Ivy follows
hundreds of descriptors, which takes over a minute.
"""

import hashlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import pyspark

REPO = Path(__file__).resolve().parent.parent
LINE = ".".join(pyspark.__version__.split(".")[:2])
CONF = REPO / "conf" / f"spark-{LINE}.conf"
LOCK = REPO / "requirements" / f"jars-{LINE}.lock"
# Spark also asks a repository that is not there, and prints a wall of harmless lines for it; Central is enough.
IVY_SETTINGS = """<ivysettings>
  <settings defaultResolver="central"/>
  <resolvers><ibiblio name="central" m2compatible="true" usepoms="{descriptors}"/></resolvers>
</ivysettings>
"""


class Unresolved(Exception):
    """Jars are missing or are not those of the lock; the message says which and why."""


def main(arguments: Sequence[str]) -> int:
    if arguments not in ([], ["--lock"]):
        sys.stderr.write("usage: fetch_jars.py [--lock]\n")
        return 2
    home = Path(os.environ.get("SPARK_HOME") or Path(pyspark.__file__).parent)
    file = CONF if arguments else LOCK
    if not file.exists():
        sys.stderr.write(f"{file.name} is missing: no jars are known for Spark {pyspark.__version__}\n")
        return 1
    try:
        check_home(home)
        return lock(home) if file == CONF else fetch(home)
    except Unresolved as error:
        sys.stderr.write(f"{error}\n")
        return 1


def check_home(home: Path) -> None:
    """Raise Unresolved unless `home` is a Spark of the same line as the Python package."""
    core = next(iter((home / "jars").glob("spark-core_*.jar")), None)
    if core is None:
        raise Unresolved(f"{home} is no Spark: it has no jars/spark-core_*.jar; set SPARK_HOME to one, or unset it")
    version = core.stem.rsplit("-", 1)[1]
    if not version.startswith(f"{LINE}."):
        raise Unresolved(f"Spark {version} at {home} is not of the line of pyspark {pyspark.__version__}, {LINE}")


def fetch(home: Path) -> int:
    """Add the jars of the lock to Spark's folder, unless they are there."""
    stamp = home / "jars" / ".cbmir-jars"
    text = LOCK.read_text()
    wanted = locked(text, LOCK.name)
    there = [home / "jars" / file_name(each) for each in wanted]
    if stamp.exists() and stamp.read_text() == text and all(jar.exists() and jar.stat().st_size for jar in there):
        return 0
    if not os.access(home / "jars", os.W_OK):
        raise Unresolved(f"{home / 'jars'} cannot be written to: run this as the owner of the installation")
    with tempfile.TemporaryDirectory() as scratch:
        found = resolve(home, Path(scratch), ",".join(wanted))
        for each, digest in wanted.items():
            if each not in found:
                raise Unresolved(f"{each} of {LOCK.name} was not found: nothing was added")
            if sha256(found[each]) != digest:
                raise Unresolved(f"{each} does not have the SHA-256 of {LOCK.name}: nothing was added")
        for former in stamped(stamp):
            (home / "jars" / file_name(former)).unlink(missing_ok=True)
        for each, jar in zip(wanted, there, strict=True):
            shutil.copy(found[each], f"{jar}.unfinished")
            os.replace(f"{jar}.unfinished", jar)
    stamp.write_text(text)
    sys.stdout.write(f"{len(wanted)} jars added to {home / 'jars'}\n")
    return 0


def locked(text: str, name: str) -> dict[str, str]:
    """SHA-256 by coordinates, from the text of a lock. Raises Unresolved for a line that is none of a lock."""
    found = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.startswith("#"):
            match = re.fullmatch(r"([^\s:]+:[^\s:]+:[^\s:]+) ([0-9a-f]{64})", line)
            if match is None:
                raise Unresolved(f"{name}, line {number}: give group:artifact:version and a SHA-256")
            found[match[1]] = match[2]
    if not found:
        raise Unresolved(f"{name} has no jars")
    return found


def stamped(stamp: Path) -> list[str]:
    """Coordinates of the jars that an earlier run added."""
    with suppress(FileNotFoundError, Unresolved):
        return list(locked(stamp.read_text(), stamp.name))
    return []


def lock(home: Path) -> int:
    """Write the lock from the coordinates in conf/ and what these depend on."""
    lines = (line.split(None, 1) for line in CONF.read_text().splitlines() if line and not line.startswith("#"))
    properties = {name: value.strip() for name, value in lines}
    # Spark's own copy of a library stays the only one: two versions on one class path shadow each other.
    spark = {artifact(path.name) for path in importlib.metadata.files("pyspark") or () if path.suffix == ".jar"}
    with tempfile.TemporaryDirectory() as scratch:
        packages, excludes = properties["spark.jars.packages"], properties["spark.jars.excludes"]
        found = resolve(home, Path(scratch), packages, excludes)
        new = {key: sha256(jar) for key, jar in found.items() if artifact(jar_name(jar)) not in spark}
    head = f"# The jars that Spark {LINE} lacks, with their SHA-256; `make lock` renews them from conf/{CONF.name}.\n"
    LOCK.write_text(head + "".join(f"{key} {new[key]}\n" for key in sorted(new)))
    return 0


def resolve(home: Path, scratch: Path, packages: str, excludes: str | None = None) -> Mapping[str, Path]:
    """Download jars below `scratch`, by coordinates; with `excludes`, also what they depend on but for these."""
    settings = scratch / "ivysettings.xml"
    settings.write_text(IVY_SETTINGS.format(descriptors="false" if excludes is None else "true"))
    # An empty program: spark-submit resolves, runs it and stops.
    program = scratch / "nothing.py"
    program.write_text("")
    command = [
        str(home / "bin" / "spark-submit"),
        "--master", "local[1]",
        "--packages", packages,
        *([] if excludes is None else ["--exclude-packages", excludes]),
        "--conf", f"spark.jars.ivySettings={settings}",
        "--conf", f"spark.jars.ivy={scratch}/ivy",
        str(program),
    ]  # fmt: skip
    environment = {**os.environ, "SPARK_HOME": str(home), "PYSPARK_PYTHON": sys.executable}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    jars = sorted((scratch / "ivy" / "jars").glob("*.jar"))
    if done.returncode != 0 or not jars:
        telling = [line for line in done.stderr.splitlines() if re.search("not found|No such|rror|denied", line)]
        reason = telling[0].strip()[:300] if telling else f"spark-submit ended with {done.returncode}"
        raise Unresolved(f"the jars of Delta and S3A could not be resolved ({reason}): is Maven Central reachable?")
    return {coordinates(jar): jar for jar in jars}


def coordinates(jar: Path) -> str:
    """Group, artifact and version of a jar that Ivy names GROUP_ARTIFACT-VERSION.jar."""
    group, name = jar.name.split("_", 1)
    return f"{group}:{artifact(name)}:{name.removeprefix(artifact(name) + '-').removesuffix('.jar')}"


def jar_name(jar: Path) -> str:
    return jar.name.split("_", 1)[1]


def file_name(coordinates: str) -> str:
    _, name, version = coordinates.split(":")
    return f"{name}-{version}.jar"


def artifact(file_name: str) -> str:
    return re.sub(r"-\d[\w.\-]*\.jar$", "", file_name)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
