"""A job that Spark aborts ends in one line with the cause, however Spark reports it; CBMIR_DEBUG shows the rest."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from py4j.protocol import Py4JError
from pyspark.errors import PySparkException
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from cbmir_spark import config, storage
from cbmir_spark.errors import TrainingError
from cbmir_spark.models.artifact import WEIGHTS_FILE
from cbmir_spark.spark import failures, session
from tests.conftest import Cbmir
from tests.support.cluster import DRIVER_OPTIONS, environment
from tests.support.models import save_model
from tests.support.processes import below
from tests.support.tiny_lake import Drawn, publish

pytestmark = pytest.mark.slow

Batches = Iterable[pa.RecordBatch]
# The JVM says so of itself at its start, before Spark is there.
OF_THE_JVM = ("WARNING: Using incubator modules", "Picked up JAVA_TOOL_OPTIONS")


def failing(raised: BaseException) -> Callable[[Batches], Iterator[pa.RecordBatch]]:
    def fail(batches: Batches) -> Iterator[pa.RecordBatch]:
        yield from batches
        raise raised

    return fail


def dying(batches: Batches) -> Iterator[pa.RecordBatch]:
    yield from batches
    os.kill(os.getpid(), signal.SIGKILL)


def in_a_task(work: Callable[[Batches], Iterator[pa.RecordBatch]]) -> Callable[[SparkSession, Path], object]:
    return lambda spark, folder: spark.range(4).mapInArrow(work, "id long").collect()


def written_from_a_task(spark: SparkSession, folder: Path) -> None:
    failed = spark.range(4).mapInArrow(failing(ValueError("no such frame")), "id long")
    failed.write.format("delta").save(str(folder / "table"))


def by_an_rdd(spark: SparkSession, folder: Path) -> None:
    spark.sparkContext.parallelize(range(4)).map(lambda number: 1 // 0).collect()


def through_delta(spark: SparkSession, folder: Path) -> None:
    spark.range(4).write.format("delta").save(str(folder / "table"))
    for file in folder.rglob("*.parquet"):
        file.unlink()
    spark.read.format("delta").load(str(folder / "table")).collect()


def of_a_damaged_file(spark: SparkSession, folder: Path) -> None:
    spark.range(4).repartition(1).write.parquet(str(folder / "table"))
    (file,) = folder.rglob("*.parquet")
    file.with_name(f".{file.name}.crc").unlink()
    file.write_bytes(file.read_bytes()[:-9])
    spark.read.schema("id long").parquet(str(folder / "table")).collect()


def where_nothing_is(spark: SparkSession, folder: Path) -> None:
    spark.read.parquet(str(folder / "nothing"))


def of_no_column(spark: SparkSession, folder: Path) -> None:
    spark.range(4).select("nope")


def in_sql(spark: SparkSession, folder: Path) -> None:
    spark.range(4).select(F.raise_error(F.lit("said in SQL"))).collect()


@pytest.mark.parametrize(
    ("job", "said"),
    [
        (in_a_task(failing(ValueError("the frame\nhas 3 rows, 4 were promised"))), "ValueError: the frame has 3 rows,"),
        (in_a_task(failing(TrainingError("gave 9 of 10 rows: train again"))), "gave 9 of 10 rows: train again"),
        (in_a_task(failing(KeyError())), "KeyError"),
        (in_a_task(dying), "Python worker exited unexpectedly (crashed)"),
        (written_from_a_task, "ValueError: no such frame"),
        (by_an_rdd, "ZeroDivisionError: integer division or modulo by zero"),
        (through_delta, ".parquet does not exist"),
        # The inner one of two: the outer one only says which file it is about.
        (of_a_damaged_file, ".parquet is not a Parquet file"),
        (where_nothing_is, "[PATH_NOT_FOUND] Path does not exist: file:"),
        (
            of_no_column,
            "[UNRESOLVED_COLUMN.WITH_SUGGESTION] A column, variable, or function parameter with name `nope`",
        ),
        (in_sql, "[USER_RAISED_EXCEPTION] said in SQL"),
    ],
)
def test_the_cause_is_found_in_what_spark_says(
    spark: SparkSession, tmp_path: Path, job: Callable[[SparkSession, Path], object], said: str
) -> None:
    with pytest.raises((PySparkException, Py4JError)) as failed:
        job(spark, tmp_path)
    found = failures.cause(str(failed.value))
    assert said in found
    assert "\n" not in found and "\tat " not in found and "SQLSTATE" not in found and len(found) < 500


def test_a_cause_without_words_or_without_end_is_a_line_all_the_same() -> None:
    assert failures.cause("") == "no reason given"
    assert failures.cause("x" * 2000) == "x" * 499 + "…"
    lost = (
        "An error occurred while calling o1.save.\n: org.apache.spark.SparkException: Job aborted due to stage failure:"
        " Task 3 in stage 2.0 failed 4 times, most recent failure: Lost task 3.3 in stage 2.0 (TID 9) (10.0.0.7 "
        "executor 2): ExecutorLostFailure (executor 2 exited caused by one of the running tasks) Reason: OOMKilled\n"
        "Driver stacktrace:\n\tat org.apache.spark.scheduler.DAGScheduler.abortStage(DAGScheduler.scala:1)\n"
    )
    assert failures.cause(lost) == (
        "ExecutorLostFailure (executor 2 exited caused by one of the running tasks) Reason: OOMKilled"
    )


# A job of ours


@pytest.fixture(scope="module")
def damaged(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The flags of an index job whose workers find another file in place of the model that the driver put there."""
    folder = tmp_path_factory.mktemp("damaged")
    model_id = save_model(folder / "model").manifest.model_id
    overrides = [f"lake.uri={folder / 'lake'}", f"index.model={folder / 'model'}"]
    settings = config.load(overrides=overrides, environ={})
    lake = publish(spark, settings, [Drawn("a", "p", "CT", "CHEST"), Drawn("b", "q", "MR", "BRAIN")])
    there = Path(storage.local_path(lake.models(model_id)))
    shutil.copytree(folder / "model", there)
    with (there / WEIGHTS_FILE).open("ab") as weights:
        weights.write(b"more")
    return [f"--set={override}" for override in overrides]


@pytest.fixture
def on_one_session(spark: SparkSession, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "build", lambda settings, job: spark)
    monkeypatch.setattr(spark, "stop", lambda: None)


@pytest.mark.usefixtures("on_one_session")
def test_traces_are_shown_to_who_asks_for_them(
    damaged: list[str], cbmir: Cbmir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CBMIR_DEBUG", "1")
    status, out, err = cbmir("index", *damaged)
    assert (status, out) == (1, "")
    assert err.splitlines()[-1].startswith("cbmir: Spark aborted the index job: the weights have SHA-256 ")
    assert "PythonException" in err and "index/embed.py" in err, "driver and worker"


@pytest.mark.usefixtures("on_one_session")
def test_errors_of_ours_keep_their_status_when_traces_are_asked_for(
    cbmir: Cbmir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CBMIR_DEBUG", "1")
    status, _, err = cbmir("config", "--set", "retrieval.kk=1")
    assert status == 2 and "Traceback" in err and "did you mean retrieval.k?" in err.splitlines()[-1]
    status, _, err = cbmir("index", "--lake", str(tmp_path / "lake"))
    assert status == 1 and err.splitlines()[-1].endswith("run `cbmir ingest` first")
    monkeypatch.setenv("CBMIR_DEBUG", "0")
    assert cbmir("config", "--set", "retrieval.kk=1")[2].count("\n") == 1


def start(flags: list[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "cbmir_spark", "index", *flags, *(f"--set={each}" for each in DRIVER_OPTIONS)]
    return subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def lines(err: str) -> list[str]:
    return [line for line in err.splitlines() if not line.startswith(OF_THE_JVM)]


def test_a_job_that_spark_gives_up_on_ends_in_one_line(damaged: list[str]) -> None:
    job = start(damaged)
    out, err = job.communicate(timeout=200)
    assert job.returncode == 1 and out == ""
    printed = lines(err)
    assert len(printed) == 1, printed
    assert printed[0].startswith("cbmir: Spark aborted the index job: the weights have SHA-256 ")
    assert printed[0].endswith("fetch the model again (CBMIR_DEBUG=1 shows the whole trace)")


@pytest.mark.soak
def test_a_job_whose_java_was_killed_says_so(damaged: list[str]) -> None:
    job = start(damaged)
    while not (found := below(job.pid, "org.apache.spark.deploy.SparkSubmit")):
        assert job.poll() is None
        time.sleep(0.1)
    # Later than the gateway's start, which has an error of its own.
    time.sleep(6)
    for pid in found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    _, err = job.communicate(timeout=100)
    assert job.returncode == 1
    assert "its Java process ended" in lines(err)[-1]
