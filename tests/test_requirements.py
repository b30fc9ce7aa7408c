"""The bounds of pyproject.toml are those of the two stacks that are locked and tested."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pyspark
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from cbmir_spark import extras
from tests.conftest import REPO

PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
LOCKS = ("current", "oldest", "base", "embed", "all")


def locked(name: str) -> dict[str, str]:
    text = (REPO / "requirements" / f"{name}.lock").read_text()
    return {canonicalize_name(found[1]): found[2] for found in re.finditer(r"^([\w.-]+)==(\S+)", text, re.M)}


def declared(*extras_of: str) -> dict[str, Requirement]:
    """The direct dependencies, with those of some extras."""
    texts = [*PROJECT["dependencies"], *(text for each in extras_of for text in PROJECT["optional-dependencies"][each])]
    found = [Requirement(text) for text in texts]
    return {canonicalize_name(each.name): each for each in found if each.name != "cbmir-spark"}


def lower_bound(requirement: Requirement) -> str:
    (bound,) = (each.version for each in requirement.specifier if each.operator in (">=", "=="))
    return bound


def test_each_lower_bound_is_a_version_that_is_tested() -> None:
    oldest = locked("oldest")
    bounds = {name: lower_bound(each) for name, each in declared("embed", "train").items()}
    assert {name: Version(oldest[name]) for name in bounds} == {name: Version(bound) for name, bound in bounds.items()}


@pytest.mark.parametrize("stack", LOCKS)
def test_locked_versions_are_within_the_bounds(stack: str) -> None:
    versions = locked(stack)
    outside = {
        name: versions[name]
        for name, each in declared("embed", "train").items()
        if name in versions and versions[name] not in each.specifier
    }
    assert not outside


def test_what_is_deployed_is_part_of_what_is_tested() -> None:
    current = locked("current")
    for part in ("base", "embed", "all"):
        assert locked(part).items() <= current.items(), part
    assert locked("base").keys() < locked("embed").keys() < locked("all").keys()
    assert not {"torch", "petastorm", "matplotlib", "scikit-learn"} & locked("base").keys()
    assert "petastorm" not in locked("embed")


def test_locks_name_no_registry() -> None:
    for lock in [*(REPO / "requirements").iterdir()]:
        assert not re.search(r"://|index.url|find.links", lock.read_text()), lock.name


def test_extras_are_those_that_jobs_ask_for() -> None:
    base = set(declared())
    for extra, packages in extras.PACKAGES.items():
        named = set(declared(extra, *(["embed"] if extra == extras.TRAIN else []))) - base
        assert set(packages) <= named, extra


def test_this_environment_is_one_of_the_stacks() -> None:
    """Otherwise a green run proves nothing about either of them."""
    installed = {name: importlib.metadata.version(name) for name in declared("embed", "train")}
    stacks = [stack for stack in ("current", "oldest") if installed.items() <= locked(stack).items()]
    assert stacks, "not the versions of a lock: make setup"


@pytest.mark.parametrize("stack", ["current", "oldest"])
def test_the_jars_are_those_of_the_locked_versions(stack: str) -> None:
    versions = locked(stack)
    line = ".".join(versions["pyspark"].split(".")[:2])
    jars = (REPO / "conf" / f"spark-{line}.conf").read_text()
    (delta,) = re.findall(r"io\.delta:delta-spark_(?:[\d.]+_)?2\.13:([\d.]+)", jars)
    assert delta == versions["delta-spark"]


@pytest.mark.parametrize("line", ["4.0", "4.2"])
def test_jars_are_locked_at_the_versions_that_spark_would_resolve(line: str) -> None:
    properties = (REPO / "conf" / f"spark-{line}.conf").read_text()
    packages = re.search(r"^spark\.jars\.packages\s+(\S+)", properties, re.M)
    rows = [row.split() for row in (REPO / "requirements" / f"jars-{line}.lock").read_text().splitlines()[1:]]
    assert packages and set(packages[1].split(",")) <= {coordinates for coordinates, _ in rows}
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for _, digest in rows)


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A copy of the script with its locks, beside a copy of Spark with the jars that it added."""
    for name in ("deploy", "requirements"):
        shutil.copytree(REPO / name, tmp_path / name)
    shutil.copytree(Path(pyspark.__file__).parent, tmp_path / "spark", copy_function=os.link)
    return tmp_path


def fetch_jars(folder: Path, *arguments: str, home: Path | None = None) -> tuple[int, list[str]]:
    """Run the script: its exit status, and the lines on standard error."""
    command = [sys.executable, str(folder / "deploy" / "fetch_jars.py"), *arguments]
    environment = {**os.environ, "SPARK_HOME": str(home or folder / "spark")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    return done.returncode, done.stderr.splitlines()


def jars(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "spark" / "jars").iterdir())


@pytest.mark.parametrize(
    ("pattern", "instead", "says"),
    [
        (r"^(\S+) [0-9a-f]{64}$", r"\1", "line 2: give group:artifact:version and a SHA-256"),
        (r"^\S+ [0-9a-f]{64}\n", "a word too many here\n", "line 2: give"),
        (r"(?s)\n.*", "\n", "has no jars"),
    ],
    ids=["hash", "garbage", "empty"],
)
def test_a_damaged_lock_adds_and_removes_nothing(copied: Path, pattern: str, instead: str, says: str) -> None:
    for lock in (copied / "requirements").glob("jars-*.lock"):
        lock.write_text(re.sub(pattern, instead, lock.read_text(), count=1, flags=re.M))
    before = jars(copied)
    status, printed = fetch_jars(copied)
    assert status == 1 and len(printed) == 1 and says in printed[0]
    assert jars(copied) == before


def test_jars_are_added_to_the_spark_that_they_are_for(copied: Path) -> None:
    status, printed = fetch_jars(copied, home=copied / "nowhere")
    assert status == 1 and len(printed) == 1 and "is no Spark" in printed[0]
    (core,) = (copied / "spark" / "jars").glob("spark-core_*.jar")
    core.rename(core.with_name("spark-core_2.13-3.5.8.jar"))
    status, printed = fetch_jars(copied)
    assert status == 1 and len(printed) == 1 and "Spark 3.5.8" in printed[0]
    assert fetch_jars(copied, "--lokc") == (2, ["usage: fetch_jars.py [--lock]"])


@pytest.mark.more
def test_missing_jars_are_added_again_but_no_other_ones(copied: Path) -> None:
    """Spark resolves from Maven Central."""
    before = jars(copied)
    (stored,) = (copied / "spark" / "jars").glob("delta-storage-*.jar")
    stored.unlink()
    assert fetch_jars(copied) == (0, [])
    assert jars(copied) == before
    for lock in (copied / "requirements").glob("jars-*.lock"):
        lock.write_text(re.sub("[0-9a-f]{64}$", "0" * 64, lock.read_text(), count=1, flags=re.M))
    status, printed = fetch_jars(copied)
    assert status == 1 and len(printed) == 1 and "does not have the SHA-256 of jars-" in printed[0]
    assert jars(copied) == before
