"""Logging: silent by default, text or JSON lines when configured, and nothing of an archive in either."""

import ast
import json
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import cbmir_spark
from cbmir_spark import log
from cbmir_spark.lake.runs import Record, Stages

SOURCES = sorted(Path(cbmir_spark.__file__).parent.rglob("*.py"))
LEVELS = {"debug", "info", "warning", "error", "critical", "exception", "log"}


@pytest.fixture(autouse=True)
def as_it_was(logging_restored: None) -> Iterator[None]:
    # A run that a test before this one began without finishing it has left its fields.
    with log.scope(**dict.fromkeys(log.FIELDS)):
        yield


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, object]]:
    printed = capsys.readouterr()
    assert printed.out == ""
    return [json.loads(line) for line in printed.err.splitlines()]


def test_the_library_is_silent_until_logging_is_configured() -> None:
    program = "import logging, cbmir_spark; logging.getLogger('cbmir_spark.ingest').error('lost')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
    program += "; from cbmir_spark import log; log.configure(); logging.getLogger('cbmir_spark.ingest').error('found')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "" and done.stderr.endswith(" error cbmir_spark.ingest: found\n")


def test_json_lines_carry_run_job_and_stage(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure(json=True)
    record = Record.begin("ingest")
    with record.stage("parse"):
        logging.getLogger("cbmir_spark.ingest.parse").warning("read again", extra={"counts": {"objects": 3}})
    logging.getLogger("cbmir_spark.index").debug("not shown")
    started, stage, own, ended = lines(capsys)
    assert [line["message"] for line in (started, stage, own, ended)] == [
        "run started",
        "stage started",
        "read again",
        "stage ended",
    ]
    assert {(line["run_id"], line["job"]) for line in (started, stage, own, ended)} == {(record.run_id, "ingest")}
    assert "stage" not in started and {line["stage"] for line in (stage, own, ended)} == {"parse"}
    assert own["level"] == "warning" and own["logger"] == "cbmir_spark.ingest.parse" and own["counts"] == {"objects": 3}
    assert isinstance(ended["seconds"], float) and str(started["time"]).endswith("+00:00")


def test_a_figure_that_is_not_a_number_leaves_the_line_json(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure(json=True)
    figures = {"loss": float("nan"), "accuracy": 0.5}
    logging.getLogger("cbmir_spark.x").info("epoch ended", extra={"epoch": 3, "figures": figures})
    line = json.loads(capsys.readouterr().err, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert (line["epoch"], line["figures"]) == (3, {"loss": None, "accuracy": 0.5})


def test_a_stage_that_fails_is_logged_by_the_class_of_its_error(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure(json=True)
    stages = Stages()
    with pytest.raises(ValueError, match="DOE"), stages.stage("parse"):
        raise ValueError("DOE^JANE")
    assert [(line["message"], line.get("error")) for line in lines(capsys)] == [
        ("stage started", None),
        ("stage failed", "ValueError"),
    ]
    assert list(stages.seconds) == ["parse"]


def test_a_job_that_fails_is_logged_and_its_fields_end(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure(json=True)
    with pytest.raises(ValueError, match="DOE"), log.job("index"):
        record = Record.begin("index")
        raise ValueError("DOE^JANE")
    logging.getLogger("cbmir_spark.x").warning("outside")
    started, failed, outside = lines(capsys)
    assert started["message"] == "run started"
    assert (failed["message"], failed["error"], failed["run_id"]) == ("job failed", "ValueError", record.run_id)
    assert "job" not in outside and "run_id" not in outside


def test_the_line_of_a_failed_command_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert not log.is_json()
    log.configure()
    assert not log.is_json()
    log.configure(json=True)
    assert log.is_json()
    log.failed("queries.csv: no such file", 1)
    (line,) = lines(capsys)
    assert (line["level"], line["message"], line["status"]) == ("error", "queries.csv: no such file", 1)


def test_people_see_warnings_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure()
    with log.scope(job="ingest", stage="parse", run_id="0" * 32):
        logging.getLogger("cbmir_spark.x").info("not shown")
        logging.getLogger("cbmir_spark.x").warning("read again", extra={"counts": {"objects": 3}, "seconds": 1.25})
    printed = capsys.readouterr().err
    assert printed.partition(" ")[2] == "warning ingest/parse: read again, objects 3, seconds 1.25\n"


def test_configured_again_a_line_is_printed_once(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure(json=True)
    log.configure(json=True, level="DEBUG")
    logging.getLogger("cbmir_spark.x").debug("here")
    assert [line["message"] for line in lines(capsys)] == ["here"]


def test_neither_an_exception_nor_an_unknown_field_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    for as_json in (True, False):
        log.configure(json=as_json)
        try:
            raise ValueError("DOE^JANE")
        except ValueError:
            logging.getLogger("cbmir_spark.x").warning("lost", exc_info=True, extra={"uri": "DOE^JANE"})
        printed = capsys.readouterr().err
        assert "DOE" not in printed and "ValueError" in printed and printed.count("\n") == 1


def test_fields_end_with_their_scope_and_stay_in_their_thread(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure(json=True)
    logger = logging.getLogger("cbmir_spark.x")
    with log.scope(job="index"):
        log.bind(run_id="a")
        thread = threading.Thread(target=logger.warning, args=("thread",))
        thread.start()
        thread.join()
        logger.warning("inside")
        log.bind(run_id=None)
        logger.warning("unbound")
    logger.warning("outside")
    seen = {str(line["message"]): {name for name in log.FIELDS if name in line} for line in lines(capsys)}
    assert seen == {"thread": set(), "inside": {"job", "run_id"}, "unbound": {"job"}, "outside": set()}


def faults(source: str) -> list[str]:
    """Calls of a logger that could print what only the data says: a message that varies, fields beside FIELDS."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in LEVELS):
            continue
        if not (isinstance(node.func.value, ast.Name) and node.func.value.id == "logger"):
            continue
        constant = len(node.args) == 1 and isinstance(node.args[0], ast.Constant)
        extras = [keyword.value for keyword in node.keywords if keyword.arg == "extra"]
        known = all(
            isinstance(extra, ast.Dict)
            and all(isinstance(key, ast.Constant) and key.value in log.FIELDS for key in extra.keys)
            for extra in extras
        )
        if not constant or not known or len(extras) != len(node.keywords) or node.func.attr in ("exception", "log"):
            found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize(
    "call",
    [
        "logger.info(f'read {uri}')",
        "logger.info('read %s', uri)",
        "logger.warning('lost', exc_info=True)",
        "logger.exception('lost')",
        "logger.info('read', extra={'uri': uri})",
        "logger.info('read', extra=fields)",
        "logger.info('read', extra={**fields})",
    ],
)
def test_a_call_that_could_print_data_is_found(call: str) -> None:
    assert len(faults(f"def f(uri, fields):\n    {call}\n")) == 1
    assert faults("logger.info('read', extra={'seconds': 1.0})\nlogger.info('read')\n") == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: "/".join(path.parts[-2:]))
def test_messages_are_constant_and_fields_are_known(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert faults(source) == []
    # The rule goes by the logger's name.
    names = [
        ast.unparse(node.targets[0])
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Assign) and ast.unparse(node.value) == "logging.getLogger(__name__)"
    ]
    assert names in ([], ["logger"])
