"""Importing the package changes nothing for the program that imports it."""

import json
import subprocess
import sys
from pathlib import Path

import cbmir_spark
from tests.support.sources import imported, modules

ROOT = Path(cbmir_spark.__file__).parent

# What the packages that ours import do when they are imported is theirs: those are imported first.
COMPARE = """
import importlib, json, logging, sys, warnings

def state():
    names = list(logging.root.manager.loggerDict)
    loggers = {name: logging.getLogger(name) for name in names} | {"": logging.root}
    levels = {name: (each.level, each.disabled, each.propagate, len(each.handlers)) for name, each in loggers.items()}
    return list(warnings.filters), warnings.showwarning, levels

theirs, ours = json.load(sys.stdin)
for name in theirs:
    try:
        importlib.import_module(name)
    except ImportError:
        # A name of a package, not a module.
        importlib.import_module(name.rpartition(".")[0])
filters, show, levels = state()
for name in ours:
    importlib.import_module(name)
    now = state()
    assert now[0] == filters, f"{name} changes the warnings filters: {set(now[0]) ^ set(filters)}"
    assert now[1] is show, f"{name} changes how warnings are shown"
    # A library gives its own logger a NullHandler, and leaves those of others alone.
    others = {key for key in now[2] if key.partition(".")[0] != "cbmir_spark"}
    changed = {key for key in others if now[2][key] != levels.get(key, (logging.NOTSET, False, True, 0))}
    assert not changed, f"{name} changes loggers: {changed}"
"""


def compare(ours: list[str], theirs: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPARE],
        input=json.dumps([theirs, ours]),
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=280,
    )


def third_party() -> list[str]:
    names = {name for path in modules(ROOT).values() for name, _ in imported(path)}
    return sorted(name for name in names if not name.startswith("cbmir_spark"))


def test_imports_change_no_warnings_filter_and_no_logger(tmp_path: Path) -> None:
    found = compare(sorted(f"cbmir_spark.{name}" for name in modules(ROOT)), third_party(), tmp_path)
    assert found.returncode == 0, found.stderr


def test_a_module_that_changes_either_is_found(tmp_path: Path) -> None:
    (tmp_path / "filters.py").write_text("import warnings\nwarnings.filterwarnings('ignore', category=FutureWarning)\n")
    (tmp_path / "loggers.py").write_text("import logging\nlogging.getLogger('pydicom').setLevel(logging.ERROR)\n")
    (tmp_path / "quiet.py").write_text("import logging\nlogging.getLogger(__name__)\n")
    assert compare(["quiet"], ["pydicom"], tmp_path).returncode == 0
    assert "filters changes the warnings filters" in compare(["filters"], ["pydicom"], tmp_path).stderr
    assert "loggers changes loggers: {'pydicom'}" in compare(["loggers"], ["pydicom"], tmp_path).stderr
