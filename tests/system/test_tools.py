"""A test whose tool is missing is skipped aloud, or fails where tools are required; it never passes."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPO
from tests.support.tools import INHERITED, REQUIRED, require_tool

CI = REPO / ".ci"
MISSING = "a-tool-that-nobody-has"


def test_the_first_tool_that_is_there_is_taken() -> None:
    assert require_tool(MISSING, "bash") == Path(str(shutil.which("bash")))


@pytest.mark.parametrize(("required", "outcome"), [("0", "1 skipped"), ("1", "1 failed")])
def test_a_missing_tool_skips_or_fails(tmp_path: Path, required: str, outcome: str) -> None:
    """In a pytest of its own, with a PATH on which there is nothing."""
    test = "tests/system/test_deploy.py::test_scripts_pass_shellcheck[deploy/gpus.sh]"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", test],
        cwd=REPO,
        env={name: value for name, value in os.environ.items() if name != INHERITED}
        | {REQUIRED: required, "PATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert outcome in done.stdout and "none of shellcheck is on the PATH" in done.stdout
    assert done.returncode == int(required)


def test_ci_requires_tools_and_installs_the_listed_packages(tmp_path: Path) -> None:
    """The script itself, with an apt-get and a make that write down how they were called."""
    called = tmp_path / "called"
    for name, lines in {
        "apt-get": f'echo "apt-get $*" >>{called}',
        "dpkg-query": "exit 1",
        "id": "echo 0",
        "make": f'echo "make $* {REQUIRED}=${REQUIRED}" >>{called}',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{lines}\n")
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        ["bash", CI / "run"], env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    listed = [line.split("#")[0].strip() for line in (CI / "packages.txt").read_text().splitlines()]
    packages = [name for name in listed if name]
    assert packages and all(re.fullmatch(r"[a-z0-9.+-]+", name) for name in packages)
    lines = called.read_text().splitlines()
    made = [f"make {each} {REQUIRED}=" for each in ("setup STACK=oldest", "demo STACK=oldest")]
    made += [f"make {each} {REQUIRED}=1" for each in ("test", "test-fast STACK=oldest", "test-more")]
    assert lines[-5:] == made
    assert any("install" in line and line.endswith(" ".join(packages)) for line in lines[:-5])
