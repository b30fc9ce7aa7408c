"""Without torch, matplotlib and Petastorm the base works, and a job that needs them says what to install."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cbmir_spark import extras
from cbmir_spark.spark import failures
from tests.conftest import REPO

# What [embed] and [train] add, themselves or through others.
ABSENT = ("torch", "matplotlib", "petastorm", "sklearn", "scipy", "flask", "graphene")
# The only modules that import these; jobs check before they import one of them.
NEED_TORCH = {
    "cli.demo",
    "index.embed",
    "index.job",
    "index.load",
    "models.embed",
    "models.layers",
    "models.networks",
    "models.served",
    "models.weights",
    "training.augment",
    "training.checkpoints",
    "training.course",
    "training.distribute",
    "training.job",
    "training.loader",
    "training.loop",
    "training.run_log",
    "training.task",
}
NEED_MATPLOTLIB = {"evaluation.document", "evaluation.job", "reports.plots"}
WITHOUT = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {ABSENT!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name in {ABSENT!r} else real(name, *more)
"""


def python(code: str, *arguments: str, cwd: Path = REPO) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WITHOUT + code, *arguments],
        cwd=cwd,
        env={"PYTHONPATH": str(REPO), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )


def test_only_the_jobs_that_need_them_import_them() -> None:
    code = """
import importlib, json, pkgutil
import cbmir_spark
failed = []
for module in pkgutil.walk_packages(cbmir_spark.__path__, "cbmir_spark."):
    if not module.name.endswith("__main__"):
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError:
            failed.append(module.name.removeprefix("cbmir_spark."))
print(json.dumps(failed))
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)) == NEED_TORCH | NEED_MATPLOTLIB


@pytest.mark.parametrize(
    ("command", "line"),
    [
        (
            ["train"],
            "train needs torch, matplotlib and petastorm, which are not installed: .*'cbmir-spark\\[train\\]'",
        ),
        (["demo"], "demo needs torch, matplotlib and petastorm, which are not .* 'cbmir-spark\\[train\\]'"),
        (["index"], "index needs torch and matplotlib, which are not installed: pip install 'cbmir-spark\\[embed\\]'"),
        (["evaluate"], "evaluate needs torch and matplotlib, which are not .* 'cbmir-spark\\[embed\\]'"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_job_names_the_extra_it_lacks_before_it_does_anything(tmp_path: Path, command: list[str], line: str) -> None:
    code = "from cbmir_spark.cli.app import main\nsys.argv = ['cbmir', *sys.argv[1:]]\nmain()"
    done = python(code, *command, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1

    assert re.search(line, done.stderr), done.stderr
    assert not list(tmp_path.iterdir())


def test_what_an_executor_lacks_is_said_in_a_line() -> None:
    trace = 'Traceback (most recent call last):\n  File "worker.py", line 1, in main\n    import x\n'
    assert failures.cause(f"{trace}ModuleNotFoundError: No module named 'torch'\n") == (
        "the Python of the executors has no torch: in it, pip install 'cbmir-spark[embed]'"
    )
    assert failures.cause(f"{trace}ModuleNotFoundError: No module named 'petastorm.reader'\n") == (
        "the Python of the executors has no petastorm: in it, pip install 'cbmir-spark[train]'"
    )
    assert failures.cause(f"{trace}ModuleNotFoundError: No module named 'pydicom'\n") == (
        "the Python of the executors has no pydicom: in it, install pydicom"
    )


def test_nothing_is_missing_here() -> None:
    assert all(importlib.util.find_spec(name) for names in extras.PACKAGES.values() for name in names)
    extras.require(extras.TRAIN, "train")
