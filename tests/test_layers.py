"""The rooms import one way: read from the source, so that a rule cannot be broken unseen."""

import ast
from pathlib import Path

import pytest

import cbmir_spark
from tests.conftest import REPO

PACKAGE = Path(cbmir_spark.__file__).parent
MODULES = {path.stem: path for path in PACKAGE.glob("*.py") if not path.stem.startswith("__")}

# What each of these rooms must do without; it has to run where the package is not installed, or stay testable alone.
FORBIDDEN = {
    "burned_in": {"pyspark", "delta", "mlflow", "torch", "petastorm", "pydantic", "pydicom", "numpy"},
    "dicom": {"pyspark", "delta", "mlflow", "torch", "petastorm", "pydantic"},
    "pixels": {"pyspark", "delta", "mlflow", "torch", "petastorm", "pydantic"},
    "preflight": {"pyspark", "delta", "mlflow", "torch", "petastorm", "pydantic"},
    "decoder": {"pyspark", "delta", "mlflow", "torch", "petastorm", "pydantic"},
    "vocabulary": {"pyspark", "delta", "mlflow", "torch", "petastorm", "pydantic", "pydicom", "numpy"},
    "model": {"pyspark", "delta", "mlflow", "petastorm", "pydantic", "pyarrow"},
    "ranking": {"pyspark", "delta", "mlflow", "torch", "petastorm", "pydantic", "pyarrow"},
    "networks": {"pyspark", "delta", "mlflow", "petastorm", "pydantic", "pyarrow"},
    "fitting": {"pyspark", "delta", "mlflow", "petastorm", "pydantic", "pyarrow"},
    "checkpoints": {"pyspark", "delta", "mlflow", "petastorm"},
    "kernel": {"pyspark", "delta", "mlflow", "torch", "petastorm", "pydantic", "pyarrow"},
    "arrays": {"mlflow", "torch", "petastorm"},
    "scan_task": {"mlflow", "torch", "petastorm"},
    "vector_files": {"mlflow", "torch", "petastorm"},
    "volume_task": {"mlflow", "torch", "petastorm"},
    "python_workers": {"delta", "mlflow", "torch", "petastorm", "pydantic", "pyarrow", "numpy"},
    "synthesis": {"pyspark", "delta", "mlflow", "torch", "petastorm"},
    "remap": {"mlflow", "torch", "petastorm"},
    "pseudonyms": {"pyspark", "delta", "mlflow", "torch", "petastorm", "pydicom"},
    "storage": {"pyspark", "delta", "mlflow", "torch"},
    "lease": {"pyspark", "delta", "mlflow", "torch", "petastorm", "pyarrow"},
}
# Packages that one room alone may import, and the rooms of ours that build sessions or read settings.
ONLY_IN = {
    "petastorm": {"dataset"},
    "mlflow": {"registry"},
    "delta": {"tables"},
    "typer": {"cli"},
    "cbmir_spark.session": {"cli", "doctor"},
    "cbmir_spark.cli": set(),
}


def imported(path: Path) -> set[str]:
    """Full names of all modules a file imports, inside functions too, but not for type checking alone."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _uses(path: Path, package: str) -> bool:
    return any(name == package or name.startswith(package + ".") for name in imported(path))


def _reaches(module: str, package: str, seen: frozenset[str] = frozenset()) -> bool:
    """Whether a room imports a package itself or through our other rooms."""
    if _uses(MODULES[module], package):
        return True
    ours = {name.split(".")[1] for name in imported(MODULES[module]) if name.startswith("cbmir_spark.")}
    return any(_reaches(other, package, seen | {module}) for other in (ours & set(MODULES)) - seen - {module})


@pytest.mark.parametrize(("module", "package"), [(m, p) for m, packages in FORBIDDEN.items() for p in sorted(packages)])
def test_a_room_does_without(module: str, package: str) -> None:
    # storage and synthesis take one typed section of the settings, so pydantic is not forbidden to them.
    assert not _reaches(module, package), f"{module} must not import {package}"


@pytest.mark.parametrize(("package", "rooms"), ONLY_IN.items())
def test_a_package_stays_in_its_room(package: str, rooms: set[str]) -> None:
    assert {name for name, path in MODULES.items() if _uses(path, package)} <= rooms


def test_only_the_cli_loads_settings() -> None:
    for name, path in MODULES.items():
        calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        loads = [ast.unparse(call.func) for call in calls if ast.unparse(call.func) == "config.load"]
        assert not loads or name == "cli", f"{name} loads settings itself"


def test_only_the_session_room_builds_sessions() -> None:
    for name, path in MODULES.items():
        assert "SparkSession.builder" not in path.read_text() or name == "session", name


def test_jobs_are_a_few_lines_that_only_enter_the_cli() -> None:
    jobs = sorted((REPO / "jobs").glob("*.py"))
    assert {job.stem for job in jobs} == {"ingest", "remap", "train", "index", "retrieve", "evaluate", "demo"}
    for job in jobs:
        assert imported(job) == {"cbmir_spark.cli", "cbmir_spark.cli.main"}
        assert len(job.read_text().splitlines()) < 10


def test_the_rules_can_fail() -> None:
    assert _reaches("ingest", "pyspark")
    assert _reaches("retrieval", "torch")
