"""Ctrl-C in a real process: one line and status 130, at any moment, and the next run completes the work."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from cbmir_spark.synthetic import archive
from tests.conftest import REPO

pytestmark = [pytest.mark.more, pytest.mark.timeout(600)]

LINE = "cbmir: interrupted; run the same command again to continue"
OPTIONS = ["--set=spark.master=local[2]", "--set=spark.driver_memory=2g", "--set=ingest.files_per_task=16"]


@contextmanager
def started(folder: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A command in a process group of its own, which writes its errors to `folder/stderr`."""
    with (
        (folder / "stderr").open("w") as errors,
        subprocess.Popen(
            [sys.executable, "-m", "cbmir_spark", *arguments, *OPTIONS],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(REPO)},
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
            # A shell's background jobs ignore SIGINT, and so would this one if the suite is such a job.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        ) as job,
    ):
        yield job


def result_of(folder: Path, *arguments: str) -> dict[str, Any]:
    """The one JSON object that a command prints."""
    with started(folder, *arguments, "--json") as job:
        assert job.stdout is not None
        printed = job.stdout.read()
    assert job.returncode == 0, (folder / "stderr").read_text()
    found: dict[str, Any] = json.loads(printed)
    return found


def test_an_interrupted_ingest_ends_in_a_line_and_is_continued(tmp_path: Path) -> None:
    archive.write_demo_archive(tmp_path / "archive", images_per_class=3, seed=1)
    shutil.rmtree(tmp_path / "archive" / "pydicom")
    files = sum(path.is_file() for path in (tmp_path / "archive").rglob("*"))
    work = tmp_path / "work"
    work.mkdir()
    command = ("ingest", "--archive", str(tmp_path / "archive"), "--lake", str(tmp_path / "lake"))
    ended = set()
    for seconds in (0.0, 1.5, 3.0):
        with started(work, *command) as job:
            assert job.stdout is not None
            while " objects" not in (work / "stderr").read_text() and job.poll() is None:
                time.sleep(0.05)
            time.sleep(seconds)
            # To the group, as a terminal sends it.
            with suppress(ProcessLookupError):
                os.killpg(job.pid, signal.SIGINT)
            printed = job.stdout.read()
        ended.add(job.returncode)
        if job.returncode == 0:
            # It was done before.
            break
        lines = [line for line in (work / "stderr").read_text().splitlines() if " objects" not in line]
        assert (job.returncode, printed, lines) == (130, "", [LINE])
    assert 130 in ended
    assert result_of(work, *command)["listed"] == files
    assert result_of(work, *command)["outcomes"] == {}
    assert [path.name for path in work.iterdir()] == ["stderr"]


def test_forget_prints_one_json_object_and_java_nothing_beside_it(tmp_path: Path) -> None:
    """Delta prints what VACUUM deleted, and the JVM a warning at its start."""
    (tmp_path / "archive").mkdir()
    (tmp_path / "archive" / "note.txt").write_text("not DICOM")
    work = tmp_path / "work"
    work.mkdir()
    for command in (("ingest", "--archive", str(tmp_path / "archive")), ("forget", "--purge")):
        assert result_of(work, *command, "--lake", str(tmp_path / "lake"))
        assert "incubator" not in (work / "stderr").read_text()
    assert [path.name for path in work.iterdir()] == ["stderr"]
