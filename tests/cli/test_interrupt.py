"""Ctrl-C in a real process: one line and status 130, at any moment, and the next run completes the work."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cbmir_spark.synthetic import archive
from tests.conftest import REPO

pytestmark = [pytest.mark.more, pytest.mark.timeout(600)]

LINE = "cbmir: interrupted; run the same command again to continue"
OPTIONS = ["--set=spark.master=local[2]", "--set=spark.driver_memory=2g", "--set=ingest.files_per_task=16"]


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "cbmir_spark", *arguments, *OPTIONS],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(REPO)},
        stdout=subprocess.PIPE,
        stderr=(folder / "stderr").open("w"),
        text=True,
        start_new_session=True,
        # A shell's background jobs ignore SIGINT, and so would this one if the suite is such a job.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def test_an_interrupted_ingest_ends_in_a_line_and_is_continued(tmp_path: Path) -> None:
    archive.write_demo_archive(tmp_path / "archive", images_per_class=3, seed=1)
    files = sum(path.is_file() for path in (tmp_path / "archive").rglob("*"))
    work = tmp_path / "work"
    work.mkdir()
    command = ("ingest", "--archive", str(tmp_path / "archive"), "--lake", str(tmp_path / "lake"))
    for seconds in (0.0, 1.5, 3.0):
        job = start(work, *command)
        assert job.stdout is not None
        while " objects" not in (work / "stderr").read_text() and job.poll() is None:
            time.sleep(0.05)
        time.sleep(seconds)
        # To the group, as a terminal sends it.
        os.killpg(job.pid, signal.SIGINT)
        printed = job.stdout.read()
        lines = [line for line in (work / "stderr").read_text().splitlines() if " objects" not in line]
        if job.wait() == 0:
            assert lines == []
            break
        assert (job.returncode, printed, lines) == (130, "", [LINE])
    finished = start(work, *command, "--json")
    assert finished.stdout is not None
    report = json.loads(finished.stdout.read())
    assert finished.wait() == 0
    assert report["listed"] == files and report["read"] + report["unchanged"] == files
    assert [path.name for path in work.iterdir()] == ["stderr"]
    shutil.rmtree(tmp_path / "lake")


def test_forget_prints_one_json_object_and_java_nothing_beside_it(tmp_path: Path) -> None:
    """Delta prints what VACUUM deleted, and the JVM a warning at its start."""
    (tmp_path / "archive").mkdir()
    (tmp_path / "archive" / "note.txt").write_text("not DICOM")
    lake = ("--lake", str(tmp_path / "lake"))
    work = tmp_path / "work"
    work.mkdir()
    for command in (("ingest", "--archive", str(tmp_path / "archive")), ("forget", "--purge")):
        job = start(work, *command, *lake, "--json")
        assert job.stdout is not None
        json.loads(job.stdout.read())
        assert job.wait() == 0
        assert "incubator" not in (work / "stderr").read_text()
    assert [path.name for path in work.iterdir()] == ["stderr"]
