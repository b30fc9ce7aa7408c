"""The command line: one-line errors with an exit status that is not 0, secrets masked, JSON for machines."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from pyspark.sql import SparkSession

from cbmir_spark.cli import console, doctor
from tests.conftest import REPO, Cbmir


def _snapshot(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (("config", "--set", "retrieval.kk=1"), 2, "unknown key retrieval.kk; did you mean retrieval.k?"),
        (("retrieve", "--k", "0", "--queries", "q.csv"), 2, "retrieval.k must be at least 1, not 0"),
        (("retrieve", "--k", "many", "--queries", "q.csv"), 2, "must be a whole number, not"),
        (
            ("retrieve", "--prefilter", "all", "--queries", "q.csv"),
            2,
            "retrieval.prefilter must be tags, predicted, modality or none",
        ),
        (("ingest", "--config", "absent.yaml"), 2, "absent.yaml: No such file"),
        (("ingset",), 2, "No such command"),
    ],
)
def test_bad_settings_end_in_a_line_and_a_status(
    cbmir: Cbmir, arguments: tuple[str, ...], status: int, said: str
) -> None:
    ended, out, err = cbmir(*arguments)
    assert ended == status
    assert said in err
    assert "Traceback" not in err
    assert out == ""


@pytest.mark.usefixtures("on_the_tests_session")
def test_bad_inputs_end_in_one_line_and_change_nothing(cbmir: Cbmir, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "archive").mkdir()
    archive, lake = str(tmp_path / "archive"), str(tmp_path / "lake")
    before = _snapshot(tmp_path)
    for arguments, said in [
        (("ingest", "--archive", str(tmp_path / "absent"), "--lake", lake), "does not exist"),
        (("ingest", "--archive", archive, "--lake", str(tmp_path / "file")), "is a file: give a folder"),
        (("ingest", "--archive", "http://example/archive", "--lake", lake), "scheme http is not supported"),
        (("ingest", "--lake", lake), "no archive named"),
        (("train", "--lake", lake), "run `cbmir ingest` first"),
        (("index", "--lake", lake), "run `cbmir ingest` first"),
    ]:
        ended, out, err = cbmir(*arguments)
        assert ended == 1, arguments
        assert said in err.replace("\n", " "), arguments
        assert err.count("\n") == 1, err
        assert out == ""
    assert _snapshot(tmp_path) == before


def test_a_machine_without_java_is_told_so(tmp_path: Path) -> None:
    """In a process of its own: the session of these tests has long started its Java."""
    environment = {k: v for k, v in os.environ.items() if k not in ("JAVA_HOME", "SPARK_HOME")}
    environment["PATH"] = str(tmp_path)
    archive = tmp_path / "archive"
    archive.mkdir()
    command = [sys.executable, "-m", "cbmir_spark", "ingest", "--archive", str(archive), "--lake", str(tmp_path / "l")]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 1
    assert ended.stderr.startswith("cbmir: Java is missing")
    assert "install OpenJDK 17" in ended.stderr
    assert list(tmp_path.iterdir()) == [archive]


def test_config_prints_the_effective_settings_with_secrets_masked(
    cbmir: Cbmir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CBMIR_PRIVACY__KEY", "never-to-be-printed")
    ended, out, _ = cbmir("config", "--set", "retrieval.k=17", "--json")
    assert ended == 0
    assert json.loads(out)["retrieval"]["k"] == 17
    assert "never-to-be-printed" not in out + cbmir("config")[1]


def test_doctor_looks_at_everything_and_changes_nothing(
    cbmir: Cbmir, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # However full this machine is.
    gib = doctor.FREE_GIB * 2**30
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=gib))
    ended, out, _ = cbmir("doctor", "--lake", str(tmp_path / "lake"), "--json")
    checks = {check["name"]: check for check in json.loads(out)["checks"]}
    assert ended == 0, checks
    assert {"Python", "Java", "Delta's jars", "Decoders", "Lake", "Pseudonym key", "MLflow"} <= set(checks)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    ended, out, _ = cbmir("doctor", "--lake", str(tmp_path / "file"), "--json")
    assert ended == 1
    assert "is a file" in out


def test_doctor_says_that_a_disk_is_nearly_full(cbmir: Cbmir, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2.5 * 2**30))
    ended, out, _ = cbmir("doctor", "--lake", str(tmp_path / "lake"), "--json")
    wrong = [check for check in json.loads(out)["checks"] if not check["ok"]]
    assert ended == 1
    assert [check["name"] for check in wrong] == ["Lake"]
    assert f"only 2.5 GiB are free at {tmp_path}: at least {doctor.FREE_GIB} GiB are needed" in wrong[0]["found"]


def test_ingest_prints_one_json_object(cbmir: Cbmir, on_the_tests_session: None, tmp_path: Path) -> None:
    archive = tmp_path / "archive"
    archive.mkdir()
    (archive / "note.txt").write_text("not DICOM")
    ended, out, _ = cbmir("ingest", "--archive", str(archive), "--lake", str(tmp_path / "lake"), "--json")
    assert ended == 0
    assert json.loads(out)["outcomes"] == {"not_an_image": 1}


@pytest.mark.usefixtures("on_the_tests_session")
def test_a_run_is_logged_as_json_lines(cbmir: Cbmir, spark: SparkSession, tmp_path: Path) -> None:
    archive, lake = tmp_path / "archive", tmp_path / "lake"
    archive.mkdir()
    (archive / "note.txt").write_text("not DICOM")
    ended, out, err = cbmir("ingest", "--archive", str(archive), "--lake", str(lake), "--json", "--log-json")
    assert ended == 0 and json.loads(out)["outcomes"] == {"not_an_image": 1}
    lines = [json.loads(line) for line in err.splitlines()]
    (run,) = spark.read.format("delta").load(str(lake / "runs")).collect()
    # The lease of a new lake is taken by the same run; nothing else is logged.
    assert {(line.get("run_id"), line["job"]) for line in lines} == {(run["run_id"], "ingest")}
    assert lines[0]["message"] == "run started"
    assert lines[-1]["message"] == "run ended" and lines[-1]["counts"] == run["counts"]
    assert {line["stage"] for line in lines if line["message"] == "stage ended"} == set(run["seconds"])
    assert {(line["done"], line["total"]) for line in lines if line["message"] == "progress"} == {(1, 1)}
    assert "note" not in err and str(archive) not in err


@pytest.mark.usefixtures("on_the_tests_session")
def test_a_failure_is_the_last_json_line(cbmir: Cbmir, tmp_path: Path) -> None:
    ended, out, err = cbmir("ingest", "--archive", str(tmp_path / "absent"), "--lake", str(tmp_path), "--log-json")
    assert (ended, out) == (1, "")
    last = json.loads(err.splitlines()[-1])
    assert (last["level"], last["status"]) == ("error", 1) and "does not exist" in last["message"]


def test_text_from_outside_cannot_drive_the_terminal() -> None:
    assert console.plain("\x1b[31mred[/]\x07") == "�\\[31mred\\[/]�"


def test_check_machine_names_what_is_missing(tmp_path: Path) -> None:
    script = REPO / "deploy" / "check_machine.sh"
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "JAVA_HOME": str(tmp_path)}
    ended = subprocess.run(["bash", script, "no-such-python"], env=environment, capture_output=True, text=True)
    assert ended.returncode == 1
    assert "install Python 3.11" in ended.stderr
    assert "install OpenJDK 17" in ended.stderr
