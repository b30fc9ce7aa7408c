"""The bounds of pyproject.toml are those of the two stacks that are locked and tested."""

import importlib.metadata
import re
import tomllib

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
