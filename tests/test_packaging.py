"""The wheel: every package and data file, one version, and a command that runs without the checkout."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest

import cbmir_spark
from tests.conftest import REPO

SOURCES = ("pyproject.toml", "setup.py", "README.md", "LICENSE")
FOLDERS = ("cbmir_spark", "conf")


def copy_of_sources(target: Path) -> Path:
    """A copy of what a build reads; setuptools writes beside it."""
    for name in FOLDERS:
        shutil.copytree(REPO / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in SOURCES:
        shutil.copy(REPO / name, target)
    return target


def build(source: Path, folder: Path) -> Path:
    """The wheel of `source`, built with the installed setuptools and without a network."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*command, "--wheel-dir", folder, source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sources with a package that no list names."""
    root = copy_of_sources(tmp_path_factory.mktemp("source"))
    planted = root / "cbmir_spark" / "planted" / "inner"
    planted.mkdir(parents=True)
    (planted / "__init__.py").write_text("")
    (planted.parent / "__init__.py").write_text("")
    return root


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(source, tmp_path_factory.mktemp("wheel"))


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as packed:
        (name,) = [name for name in packed.namelist() if name.endswith(".dist-info/METADATA")]
        return message_from_bytes(packed.read(name))


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_the_wheel_has_every_file_of_the_package_and_of_conf(source: Path, wheel: Path) -> None:
    """An image has no checkout beside the package: what the wheel lacks is missing there, and only there."""
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("cbmir_spark/")}
    package = {f"cbmir_spark/{name}" for name in files(source / "cbmir_spark")}
    conf = {f"cbmir_spark/conf/{name}" for name in files(source / "conf")}
    assert packed == package | conf
    assert {"cbmir_spark/py.typed", "cbmir_spark/conf/base.yaml", "cbmir_spark/planted/inner/__init__.py"} <= packed


def test_the_version_has_one_source(wheel: Path) -> None:
    declared = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    assert "version" not in declared and declared["dynamic"] == ["version"]
    assert metadata(wheel)["Version"] == cbmir_spark.__version__
    assert f"## [{cbmir_spark.__version__}]" in (REPO / "CHANGELOG.md").read_text()
    images = [
        line.rpartition(":")[2].strip()
        for path in sorted((REPO / "deploy" / "k8s").glob("*.yaml"))
        for line in path.read_text().splitlines()
        if line.strip().startswith("image:")
    ]
    assert images and set(images) == {cbmir_spark.__version__}


def test_an_installed_wheel_runs_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(site)
    environment = {**os.environ, "PYTHONPATH": str(site)}

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, *arguments], cwd=empty, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    found = run("-c", "import cbmir_spark, cbmir_spark.config as c; print(cbmir_spark.__file__, c.conf_folder())")
    assert found.split() == [f"{site}/cbmir_spark/__init__.py", f"{site}/cbmir_spark/conf"]
    assert run("-m", "cbmir_spark", "--version").split()[-1] == cbmir_spark.__version__
    assert "prefilter: tags" in run("-m", "cbmir_spark", "config")
    assert not list(empty.iterdir())
