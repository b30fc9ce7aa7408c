"""The packages form layers that import downwards only, read from the sources so that no arrow goes unseen."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import cbmir_spark
from tests.conftest import REPO
from tests.support.sources import imported, modules

ROOT = Path(cbmir_spark.__file__).parent

# From the ground up; packages of one layer do not import each other.
LAYERS = (
    {"errors", "log"},
    {"config", "extras"},
    {"dicom"},
    {"storage", "spark"},
    {"lake"},
    {"ingest", "models", "reports"},
    {"index", "training"},
    {"retrieval"},
    {"evaluation", "maintenance"},
    {"synthetic", "api"},
    {"cli"},
)
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}

# What a package or module must not reach, by itself or through others of ours.
WITHOUT = {
    "dicom": {"pyspark", "delta", "mlflow", "torch", "petastorm", "pydantic", "pyarrow"},
    "dicom.vocabulary": {"pydicom", "numpy"},
    "dicom.burned_in": {"pydicom", "numpy"},
    "storage": {"pyspark", "delta", "mlflow", "torch", "petastorm"},
    "spark.python_workers": {"delta", "mlflow", "torch", "petastorm", "pydantic", "pyarrow", "numpy"},
    "lake.lease": {"pyspark", "delta", "mlflow", "torch", "petastorm", "pyarrow"},
    "lake.pseudonyms": {"pyspark", "delta", "mlflow", "torch", "petastorm", "pydicom"},
    "models": {"pyspark", "delta", "petastorm"},
    "models.artifact": {"mlflow", "pydantic", "pyarrow", "torch"},
    "models.weights": {"mlflow", "pydantic", "pyarrow"},
    "models.networks": {"mlflow", "pydantic", "pyarrow"},
    "models.embed": {"mlflow", "pydantic", "pyarrow"},
    "models.projection": {"mlflow", "pydantic", "pyarrow"},
    "training.task": {"pyspark", "delta", "mlflow"},
    "training.loop": {"pyspark", "delta", "mlflow", "petastorm", "pydantic", "pyarrow"},
    "training.metrics": {"pyspark", "delta", "mlflow", "petastorm", "pydantic", "pyarrow"},
    "training.checkpoints": {"pyspark", "delta", "mlflow", "petastorm"},
    "index.arrays": {"mlflow", "torch", "petastorm"},
    "index.vector_files": {"mlflow", "torch", "petastorm"},
    "retrieval.kernel": {"pyspark", "delta", "mlflow", "torch", "petastorm", "pydantic", "pyarrow"},
    "retrieval.bounds": {"pyspark", "delta", "mlflow", "torch", "petastorm", "pydantic", "pyarrow"},
    "retrieval.tasks": {"mlflow", "torch", "petastorm"},
    "retrieval.series_tasks": {"mlflow", "torch", "petastorm"},
    "maintenance.remap": {"mlflow", "torch", "petastorm"},
    "synthetic": {"pyspark", "delta", "mlflow", "torch", "petastorm"},
}
# Third-party packages that a few modules alone may import.
ONLY_IN = {
    "petastorm": {"training.petastorm_reader"},
    "mlflow": {"models.registry", "models.served", "models.tracking", "training.run_log"},
    "delta": {"lake.delta"},
    "py4j": {"lake.delta", "spark.session", "spark.failures", "ingest.listing"},
    "typer": {"cli.app", "cli.command", "cli.jobs", "cli.upkeep"},
    "rich": {"cli.console", "cli.views"},
}


def ours(path: Path, known: dict[str, Path]) -> Iterator[tuple[str, int]]:
    """Our own modules that a file imports."""
    for name, line in imported(path):
        inside = name.removeprefix("cbmir_spark.") if name.startswith("cbmir_spark.") else ""
        while inside and inside not in known:
            inside = inside.rpartition(".")[0]
        if inside:
            yield inside, line


def upward(root: Path) -> list[str]:
    """Imports that do not go down a layer, but for those within a package."""
    known = modules(root)
    problems = []
    for module, path in known.items():
        package = module.partition(".")[0]
        for target, line in ours(path, known):
            other = target.partition(".")[0]
            if other != package and LAYER[other] >= LAYER[package]:
                problems.append(f"{module}:{line} imports {target}")
    return problems


def reached(root: Path, start: str) -> set[str]:
    """Third-party packages that a module, or a package's modules, import by themselves or through ours."""
    known = modules(root)
    waiting = [name for name in known if name == start or name.startswith(start + ".")]
    seen: set[str] = set()
    packages: set[str] = set()
    while waiting:
        module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        packages |= {name.partition(".")[0] for name, _ in imported(known[module])}
        waiting += [target for target, _ in ours(known[module], known)]
        # Importing a.b runs a/__init__.py first.
        waiting += [parent for parent in (module.rpartition(".")[0],) if parent]
    return packages


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A copy of the package's sources, to plant faults in."""
    root = tmp_path / "cbmir_spark"
    shutil.copytree(ROOT, root, ignore=shutil.ignore_patterns("__pycache__"))
    return root


def plant(root: Path, module: str, line: str) -> None:
    path = root / (module.replace(".", "/") + ".py")
    path.write_text(path.read_text() + f"\n\ndef _planted() -> None:\n    {line}\n")


def test_every_package_has_a_layer() -> None:
    assert {name.partition(".")[0] for name in modules(ROOT)} <= set(LAYER)


def test_imports_go_down() -> None:
    assert upward(ROOT) == []


@pytest.mark.parametrize(("module", "packages"), WITHOUT.items())
def test_a_module_does_without(module: str, packages: set[str]) -> None:
    assert not reached(ROOT, module) & packages


@pytest.mark.parametrize(("package", "allowed"), ONLY_IN.items())
def test_a_package_is_imported_in_few_places(package: str, allowed: set[str]) -> None:
    found = {
        module for module, path in modules(ROOT).items() for name, _ in imported(path) if name.split(".")[0] == package
    }
    assert found <= allowed


@pytest.mark.parametrize(
    ("module", "line", "target"),
    [
        ("lake.delta", "from cbmir_spark.index import open", "index.open"),
        ("storage.uri", "import cbmir_spark.retrieval.job", "retrieval.job"),
        ("index.embed", "from cbmir_spark.training.loop import fit", "training.loop"),
        ("ingest.parse", "from cbmir_spark.models import networks", "models.networks"),
    ],
)
def test_a_planted_upward_or_sibling_import_is_found(copied: Path, module: str, line: str, target: str) -> None:
    plant(copied, module, line)
    (problem,) = upward(copied)
    assert problem.startswith(f"{module}:")
    assert problem.endswith(f"imports {target}")


def test_spark_planted_in_dicom_is_found(copied: Path) -> None:
    assert "pyspark" not in reached(copied, "dicom")
    plant(copied, "dicom.suv", "from pyspark.sql import DataFrame")
    assert "pyspark" in reached(copied, "dicom.read")


def test_no_module_imports_private_names_of_another() -> None:
    found = [
        f"{module}:{line} {name}"
        for module, path in modules(ROOT).items()
        for name, line in imported(path)
        if name.startswith("cbmir_spark.") and name.rpartition(".")[2].startswith("_") and "__" not in name
    ]
    assert found == []


def test_only_the_session_module_builds_sessions() -> None:
    assert [name for name, path in modules(ROOT).items() if "SparkSession.builder" in path.read_text()] == [
        "spark.session"
    ]


def test_jobs_are_a_few_lines_that_only_enter_the_command_line() -> None:
    jobs = sorted((REPO / "jobs").glob("*.py"))
    assert {job.stem for job in jobs} == {
        "ingest",
        "remap",
        "upgrade",
        "train",
        "index",
        "retrieve",
        "evaluate",
        "demo",
    }
    for job in jobs:
        assert [name for name, _ in imported(job)] == ["cbmir_spark.cli.app.main"]
        assert len(job.read_text().splitlines()) < 10


def test_no_test_imports_another() -> None:
    found = [
        f"{path.relative_to(REPO)}:{line} {name}"
        for path in sorted((REPO / "tests").rglob("*.py"))
        for name, line in imported(path)
        if name.startswith("tests.") and any(part.startswith("test_") for part in name.split("."))
    ]
    assert found == []
