"""The optional dependencies, named as the extras that install them, and the error where a job lacks one."""

import importlib.util

from cbmir_spark.errors import EnvironmentProblem

EMBED, TRAIN = "embed", "train"

# The packages that each extra adds to the base, by import name.
PACKAGES = {EMBED: ("torch", "matplotlib"), TRAIN: ("torch", "matplotlib", "petastorm")}


def missing(extra: str) -> list[str]:
    """List the packages of an extra that this Python lacks; imports none of them."""
    return [name for name in PACKAGES[extra] if importlib.util.find_spec(name) is None]


def require(extra: str, job: str) -> None:
    """Raise EnvironmentProblem, naming what to install, if this Python lacks a package that `job` needs."""
    if names := missing(extra):
        *most, last = names
        packages = f"{', '.join(most)} and {last}, which are" if most else f"{last}, which is"
        raise EnvironmentProblem(f"{job} needs {packages} not installed: {install(extra)}")


def install(extra: str) -> str:
    """Say how to install an extra."""
    return f"pip install 'cbmir-spark[{extra}]'"


def extra_of(package: str) -> str | None:
    """Find the smallest extra that installs a package; None for one of the base."""
    return next((extra for extra, names in PACKAGES.items() if package in names), None)
