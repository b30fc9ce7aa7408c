"""Put Delta's and S3A's jars beside Spark's own, once for an environment or an image.

With them in SPARK_HOME/jars a session starts without resolving anything, drivers and workers of a cluster that share
the installation need no `--packages`, and nothing is downloaded at run time. Spark's own Ivy does the resolving, from
the coordinates in conf/spark-4.2.conf or that of another line of Spark.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pyspark

CONF = Path(__file__).resolve().parent.parent / "conf"
# Spark also asks a repository that is not there, and prints a wall of harmless lines for it; Central is enough.
IVY_SETTINGS = """<ivysettings>
  <settings defaultResolver="central"/>
  <resolvers><ibiblio name="central" m2compatible="true"/></resolvers>
</ivysettings>
"""


def main() -> int:
    home = Path(os.environ.get("SPARK_HOME") or Path(pyspark.__file__).parent)
    file = CONF / f"spark-{'.'.join(pyspark.__version__.split('.')[:2])}.conf"
    if not file.exists():
        sys.stderr.write(f"{file.name} is missing: no jars are known for Spark {pyspark.__version__}\n")
        return 1
    properties = _properties(file)
    stamp = home / "jars" / ".cbmir-jars"
    wanted = properties["spark.jars.packages"] + "\n" + properties["spark.jars.excludes"]
    if stamp.exists() and stamp.read_text() == wanted:
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        settings = Path(scratch) / "ivysettings.xml"
        settings.write_text(IVY_SETTINGS)
        # An empty program: spark-submit resolves, runs it and stops.
        program = Path(scratch) / "nothing.py"
        program.write_text("")
        command = [
            str(home / "bin" / "spark-submit"),
            "--master", "local[1]",
            "--packages", properties["spark.jars.packages"],
            "--exclude-packages", properties["spark.jars.excludes"],
            "--conf", f"spark.jars.ivySettings={settings}",
            "--conf", f"spark.jars.ivy={scratch}/ivy",
            str(program),
        ]  # fmt: skip
        environment = {**os.environ, "SPARK_HOME": str(home), "PYSPARK_PYTHON": sys.executable}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        jars = sorted(Path(scratch, "ivy", "jars").glob("*.jar"))
        if done.returncode != 0 or not jars:
            sys.stderr.write(done.stderr[-4000:])
            sys.stderr.write("\nThe jars of Delta and S3A could not be resolved: is Maven Central reachable?\n")
            return 1
        # Spark's own copy of a library stays the only one: two versions on one class path shadow each other.
        present = {_artifact(path.name) for path in (home / "jars").glob("*.jar")}
        new = {jar: name for jar in jars if _artifact(name := jar.name.split("_", 1)[1]) not in present}
        for jar, name in new.items():
            shutil.copy(jar, home / "jars" / name)
    stamp.write_text(wanted)
    sys.stdout.write(f"{len(new)} jars added to {home / 'jars'}\n")
    return 0


def _artifact(file_name: str) -> str:
    return re.sub(r"-\d[\w.\-]*\.jar$", "", file_name)


def _properties(path: Path) -> dict[str, str]:
    lines = (line.split(None, 1) for line in path.read_text().splitlines() if line and not line.startswith("#"))
    return {name: value.strip() for name, value in lines}


if __name__ == "__main__":
    sys.exit(main())
