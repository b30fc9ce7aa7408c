"""An index over many nights: what is compared, how files stay few, what is found when it is not whole, and kills."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from cbmir_spark import config, storage
from cbmir_spark.config import Settings
from cbmir_spark.errors import TableError
from cbmir_spark.index import job as index_job
from cbmir_spark.index import verify as index_verify
from cbmir_spark.index.layout import FEATURES, place_of
from cbmir_spark.lake import columns as cols
from cbmir_spark.lake import delta, publication, schemas
from cbmir_spark.lake.paths import LakePaths
from cbmir_spark.retrieval import search
from cbmir_spark.retrieval.answer import base_of
from cbmir_spark.retrieval.query import Query
from cbmir_spark.storage import ObjectStore
from tests.support.cluster import DRIVER_OPTIONS, environment
from tests.support.models import open_index, save_model
from tests.support.tiny_lake import Drawn, publish

pytestmark = pytest.mark.more

PLACES = (("CT", "CHEST"), ("MR", "BRAIN"))


def night(batch: int, images: int = 4, frames: int = 1) -> list[Drawn]:
    return [Drawn(f"{batch}-{n}", f"p{batch}-{n}", *PLACES[n % 2], frames=frames) for n in range(images)]


def overrides_for(folder: Path) -> list[str]:
    save_model(folder / "model")
    given = [f"lake.uri={folder / 'lake'}", "index.max_extra_files=2"]
    return given + [f"{section}.model={folder / 'model'}" for section in ("index", "retrieval")]


def files_of(spark: SparkSession, report: index_job.Report) -> Counter[tuple[str, str]]:
    return Counter(place_of(uri) for uri in delta.live_files(spark, report.table, report.version))


def test_nights_are_followed_by_what_changed_and_small_files_become_few(
    spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config.load(overrides=overrides_for(tmp_path), environ={})
    looked_at: list[frozenset[int] | None] = []
    plain = index_job._changed_batches

    def spy(*given: object) -> frozenset[int] | None:
        looked_at.append(plain(*given))  # type: ignore[arg-type]
        return looked_at[-1]

    monkeypatch.setattr(index_job, "_changed_batches", spy)
    most = []
    for batch in (1, 2, 3, 4):
        publish(spark, settings, night(batch), batch)
        report = index_job.run(spark, settings)
        assert (report.embedded, report.deleted, report.rows) == (4, 0, 4 * batch)
        most.append(max(files_of(spark, report).values()))
    assert looked_at == [None, frozenset({2}), frozenset({3}), frozenset({4})]
    # A file a night and partition, until there are more than two beyond the one that is needed.
    assert most == [1, 2, 3, 1]
    before = open_index(spark, settings)
    # Batch 2 is replaced by one that has an image less.
    publish(spark, settings, night(2)[1:], 2)
    report = index_job.run(spark, settings)
    assert looked_at[-1] == frozenset({2})
    assert (report.embedded, report.deleted, report.rows) == (0, 1, 15)
    again = index_job.run(spark, settings)
    assert (looked_at[-1], again.version) == (frozenset(), report.version)
    assert index_verify.run(spark, settings).rows == 15
    # The rows of the four nights went through the rewriting as they were.
    after = open_index(spark, settings).rows.toPandas().set_index([cols.IMAGE_ID, cols.FRAME])
    old = before.rows.toPandas().set_index([cols.IMAGE_ID, cols.FRAME]).loc[after.index]
    assert [v.tobytes() for v in map(np.array, after[cols.VECTOR])] == [
        v.tobytes() for v in map(np.array, old[cols.VECTOR])
    ]

    rows = open_index(spark, settings).rows
    lost = rows.limit(1).select(cols.MODALITY, cols.BODY_PART, cols.IMAGE_ID, cols.FRAME)
    delta.delete_rows(spark, FEATURES, report.table, spark.createDataFrame(lost.collect(), lost.schema), "true")
    with pytest.raises(TableError, match="lacks 1 frames, has 0 rows without a frame and 0 duplicate rows"):
        index_verify.run(spark, settings)
    # Nothing was published since, so a night does not look there; a full comparison does.
    assert index_job.run(spark, settings).embedded == 0


def test_a_search_keeps_to_the_version_that_it_opened(spark: SparkSession, tmp_path: Path) -> None:
    settings = config.load(overrides=overrides_for(tmp_path), environ={})
    publish(spark, settings, night(1, images=8), 1)
    index_job.run(spark, settings)
    index = open_index(spark, settings)
    base = base_of(index, ObjectStore(settings.storage))
    vectors = [np.array(row[cols.VECTOR], dtype=np.float32) for row in index.rows.limit(3).collect()]
    queries = [Query(f"q{n}", vector) for n, vector in enumerate(vectors)]
    whole = settings.retrieval.replace(prefilter="none", unique="none", k=50)
    first = search.search(spark, base, queries, whole)
    for batch in (2, 3, 4):
        publish(spark, settings, night(batch), batch)
        index_job.run(spark, settings)
    publish(spark, settings, night(1, images=8)[:3], 1)
    index_job.run(spark, settings)
    assert search.search(spark, base, queries, whole).hits.equals(first.hits)
    now = base_of(open_index(spark, settings), ObjectStore(settings.storage))
    assert len(search.search(spark, now, queries, whole).hits) == 3 * 15


# --- kills ---


def start(overrides: list[str], command: str = "index") -> subprocess.Popen[bytes]:
    given = [f"--set={each}" for each in (*overrides, *DRIVER_OPTIONS)]
    return subprocess.Popen(
        [sys.executable, "-m", "cbmir_spark", command, "--json", *given],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def kill(job: subprocess.Popen[bytes]) -> bool:
    """End the job and its JVM; whether it was still at work."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(job.pid, signal.SIGKILL)
    job.communicate()
    return job.returncode == -signal.SIGKILL


def assert_whole(spark: SparkSession, settings: Settings) -> None:
    lake = LakePaths.of(settings.lake)
    frames = delta.read(spark, lake.path(schemas.PIXELS), publication.require_published(spark, lake).pixels).select(
        cols.IMAGE_ID, cols.FRAME
    )
    rows = open_index(spark, settings).rows.select(cols.IMAGE_ID, cols.FRAME)
    assert sorted(map(tuple, rows.collect())) == sorted(map(tuple, frames.collect()))
    index_verify.run(spark, settings)


def log_length(settings: Settings) -> int:
    """Commits of all FEATURES tables so far."""
    folder = Path(storage.local_path(LakePaths.of(settings.lake).uri)) / FEATURES.name
    return len(list(folder.rglob("_delta_log/*.json")))


@pytest.mark.timeout(600)
def test_an_index_job_killed_while_it_writes_leaves_no_vector_twice(spark: SparkSession, tmp_path: Path) -> None:
    overrides = overrides_for(tmp_path)
    settings = config.load(overrides=overrides, environ={})
    publish(spark, settings, night(1), 1)
    first = index_job.run(spark, settings)
    # A batch changes and one comes: a commit that deletes, and another that appends.
    publish(spark, settings, night(1)[2:], 1)
    publish(spark, settings, night(2, images=6, frames=3), 2)
    job = start(overrides)
    try:
        while log_length(settings) == first.version + 1 and job.poll() is None:
            time.sleep(0.01)
    finally:
        assert kill(job), "it ended before it could be killed"
    index_job.run(spark, settings)
    assert_whole(spark, settings)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", [1, 2])
def test_ten_kills_at_random_moments_leave_no_vector_twice_and_none_missing(
    spark: SparkSession, tmp_path: Path, seed: int
) -> None:
    """Each kill comes to a job with something to delete, to embed and to rearrange; half follow one another at once."""
    overrides = overrides_for(tmp_path)
    settings = config.load(overrides=overrides, environ={})
    draws = random.Random(seed)
    publish(spark, settings, night(1, images=6), 1)
    began = time.monotonic()
    whole = start(overrides)
    assert whole.communicate() and whole.returncode == 0
    lasts = time.monotonic() - began
    killed = 0
    batch = 1
    while killed < 10:
        if draws.random() < 0.5:
            publish(spark, settings, night(batch, images=6)[draws.randint(1, 3) :], batch)
            batch += 1
            publish(spark, settings, night(batch, images=6, frames=draws.randint(1, 4)), batch)
        job = start(overrides)
        time.sleep(draws.uniform(0.4, 1.0) * lasts)
        killed += kill(job)
        if draws.random() < 0.3:
            last = start(overrides)
            said, _ = last.communicate()
            assert last.returncode == 0 and json.loads(said)["rows"] > 0
            assert_whole(spark, settings)
    index_job.run(spark, settings)
    assert_whole(spark, settings)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_searches_beside_index_jobs_answer_from_one_version_each(spark: SparkSession, tmp_path: Path) -> None:
    overrides = overrides_for(tmp_path)
    settings = config.load(overrides=overrides, environ={})
    publish(spark, settings, night(1, images=20), 1)
    index_job.run(spark, settings)
    whole = settings.retrieval.replace(prefilter="none", unique="none", k=1000)
    answers: list[tuple[int, set[tuple[str, int]]]] = []
    for batch in range(2, 6):
        publish(spark, settings, night(batch, images=6), batch)
        publish(spark, settings, night(1, images=20)[batch:], 1)
        job = start(overrides)
        while job.poll() is None:
            index = open_index(spark, settings)
            base = base_of(index, ObjectStore(settings.storage))
            vector = np.zeros(base.dimension, dtype=np.float32)
            hits = search.search(spark, base, [Query("q", vector)], whole).hits
            found = set(zip(hits.column(cols.IMAGE_ID).to_pylist(), hits.column(cols.FRAME).to_pylist(), strict=True))
            answers.append((index.version, found))
        job.communicate()
        assert job.returncode == 0
    path = open_index(spark, settings).path
    assert len({version for version, _ in answers}) > 2
    for version, found in answers:
        rows = delta.read(spark, path, version).select(cols.IMAGE_ID, F.col(cols.FRAME)).collect()
        assert found == set(map(tuple, rows)), version
