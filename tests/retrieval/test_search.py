"""The search against a brute force that shares no line with it, whatever it is asked and however the work is cut."""

import itertools
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import SparkSession

from cbmir_spark import storage
from cbmir_spark.config import StorageSettings
from cbmir_spark.errors import InputError, ModelError
from cbmir_spark.lake import columns as cols
from cbmir_spark.lake import schemas
from cbmir_spark.retrieval import answer as answers
from cbmir_spark.retrieval import search
from cbmir_spark.retrieval.query import HitFilter, Query, QueryOverrides, QueryStatus
from cbmir_spark.storage import ObjectStore
from tests.support.fault_proxy import FaultProxy
from tests.support.s3_server import S3Server
from tests.support.search_oracle import (
    DIMENSION,
    MODES,
    PLACES,
    Made,
    ask,
    assert_same,
    collected,
    distance,
    make,
    mixed,
    options,
    oracle,
)

pytestmark = pytest.mark.slow


def test_the_oracle_on_a_case_worked_by_hand() -> None:
    # From (0, 0): a at 5, b at 5, c at 13, d at 1; a and d of one series.
    vectors = np.array([[3, 4], [4, 3], [5, 12], [0, 1]], dtype=np.float32)
    made = make(vectors, 1)
    columns = made.columns
    columns[cols.IMAGE_ID], columns[cols.FRAME] = ["b", "a", "c", "d"], [0, 0, 0, 0]
    columns[cols.SERIES_ID] = ["s", "u", "v", "s"]
    columns[cols.MODALITY], columns[cols.BODY_PART] = ["CT"] * 4, ["CHEST", "CHEST", "CHEST", "UNKNOWN"]
    columns[cols.AGE_YEARS] = [30.0, None, 50.0, 40.0]
    query = Query("q", np.zeros(2, np.float32), "CT", "CHEST", image_id="c")
    assert oracle(made, [query], options(unique="none", k=5)) == (
        [[("q", 1, 5.0, "a", 0), ("q", 2, 5.0, "b", 0)]],
        [2],
    )
    wide = options(unique="series", exclude_same="none", unknown="include", k=2)
    assert oracle(made, [query], wide)[0] == [[("q", 1, 1.0, "d", 0), ("q", 2, 5.0, "a", 0)]]
    own = QueryOverrides(hit_filter=HitFilter(age_min=30.0, age_max=40.0), exclude_same="none", unique="none")
    assert oracle(made, [replace(query, overrides=own)], options(unknown="include"))[0] == [
        [("q", 1, 1.0, "d", 0), ("q", 2, 5.0, "b", 0)]
    ]
    assert distance(np.array([3.0, 0.0]), np.array([0.0, 9.0]), "cosine") == pytest.approx(1.0)


# --- the tests ---


@pytest.fixture(scope="module")
def whole_numbers() -> tuple[Made, list[Query]]:
    """Vectors of small whole numbers: ties everywhere, and distances exact in any order of sums."""
    random = np.random.default_rng(7)
    made = make(random.integers(0, 2, (1000, DIMENSION)).astype(np.float32), 1)
    return made, ask(made, random.integers(0, 2, (200, DIMENSION)).astype(np.float32), 2)


@pytest.mark.parametrize("method", ["bounds", "scan"])
def test_queries_are_byte_for_byte_brute_force_however_the_work_is_cut(
    spark: SparkSession, whole_numbers: tuple[Made, list[Query]], tmp_path: Path, method: str
) -> None:
    made, queries = whole_numbers
    chosen = options(k=5, tasks_per_core=25, block_mb=1, method=method)
    expected, candidates = oracle(made, queries, chosen)
    for cut in (1, 2, 7, 40):
        answer = search.search(spark, made.store(tmp_path / str(cut), cut, seed=cut), queries, chosen)
        assert [status.candidates for status in answer.statuses] == candidates
        assert collected(answer) == list(itertools.chain(*expected))
    assert [status.query_id for status in answer.statuses] == [query.query_id for query in queries]
    for status, count in zip(answer.statuses, candidates, strict=True):
        assert (status.status == QueryStatus.ANSWERED) == (count > 0) == (status.hits > 0)
    assert {status.status for status in answer.statuses} == {QueryStatus.ANSWERED, QueryStatus.NO_CANDIDATES}


@pytest.mark.parametrize("values", MODES)
@pytest.mark.parametrize("method", ["bounds", "scan"])
def test_every_mode_and_every_wish_is_brute_force(
    spark: SparkSession, tmp_path: Path, values: dict[str, Any], method: str
) -> None:
    made, queries = mixed(3, rows=700, asked=60)
    chosen = options(method=method, **values)
    answer = search.search(spark, made.store(tmp_path, 3), queries, chosen)
    assert_same(made, queries, chosen, collected(answer))
    assert [status.candidates for status in answer.statuses] == oracle(made, queries, chosen)[1]


@pytest.mark.soak
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("cut", [1, 2, 7, 200])
def test_ten_thousand_queries_are_brute_force(spark: SparkSession, tmp_path: Path, cut: int) -> None:
    for number, (values, method) in enumerate(itertools.product(MODES, ("bounds", "scan"))):
        made, queries = mixed(100 + 10 * number, rows=900, asked=1000)
        chosen = options(method=method, tasks_per_core=100 if cut == 200 else 3, **values)
        base = made.store(tmp_path / str(number), cut, seed=cut)
        assert_same(made, queries, chosen, collected(search.search(spark, base, queries, chosen)))


def test_near_duplicates_are_the_same_bytes_for_any_cut_and_method(spark: SparkSession, tmp_path: Path) -> None:
    random = np.random.default_rng(11)
    slices = np.abs(random.standard_normal((30, 512))) * 7
    vectors = (slices.repeat(10, axis=0) + random.standard_normal((300, 512)) * 1e-4).astype(np.float32)
    made = make(vectors, 4)
    queries = ask(made, (slices + random.standard_normal((30, 512)) * 1e-4).astype(np.float32), 5)
    whole = options(k=12, prefilter="none", unknown="include", unique="none", exclude_same="none", tasks_per_core=9)
    found = []
    for cut, method in ((1, "bounds"), (7, "scan"), (17, "bounds")):
        base = made.store(tmp_path / str(cut), cut, seed=cut)
        found.append(collected(search.search(spark, base, queries, whole.replace(method=method))))
    assert found[0] == found[1] == found[2]
    assert_same(made, queries, whole, found[0])


def test_a_bound_that_helps_reads_few_vectors_and_one_that_does_not_reads_all(
    spark: SparkSession, tmp_path: Path
) -> None:
    random = np.random.default_rng(12)
    whole = options(k=3, prefilter="none", unknown="include", unique="none", exclude_same="none")
    low = (random.standard_normal((2000, 3)) @ random.standard_normal((3, DIMENSION)) * 9).astype(np.float32)
    for vectors, useful in ((low, True), (random.standard_normal((2000, DIMENSION)).astype(np.float32), False)):
        made = make(vectors, 1)
        base = made.store(tmp_path / str(useful), 2)
        queries = ask(made, vectors[:4], 1)
        answer = search.search(spark, base, queries, whole)
        everything = search.search(spark, base, queries, whole.replace(method="scan"))
        assert collected(answer) == collected(everything)
        assert everything.scanned.vectors == 2000
        assert answer.scanned.vectors < 400 if useful else answer.scanned.vectors == 2000
        assert everything.scanned.bytes < sum(file.bytes for file in base.files)


def test_tasks_judge_for_themselves_whether_bounds_help(spark: SparkSession, tmp_path: Path) -> None:
    """One partition of which three directions tell nearly everything, and one of noise; two tasks."""
    random = np.random.default_rng(13)
    vectors = random.standard_normal((3000, DIMENSION)).astype(np.float32) * 40
    made = make(vectors, 1)
    low = np.array([place == "BRAIN" for place in made.columns[cols.BODY_PART]])
    vectors[low] = (random.standard_normal((low.sum(), 3)) @ random.standard_normal((3, DIMENSION)) * 400).astype("f4")
    made.columns[cols.MODALITY] = ["MR" if each else "CT" for each in low]
    made.columns[cols.BODY_PART] = ["BRAIN" if each else "CHEST" for each in low]
    base = made.store(tmp_path)
    queries = ask(made, np.concatenate([vectors[low][:2], vectors[~low][:2]]), 1)
    whole = options(k=3, prefilter="none", unique="none", exclude_same="none")
    answer = search.search(spark, base, queries, whole)
    assert_same(made, queries, whole, collected(answer))
    assert {status.candidates for status in answer.statuses} == {3000}
    assert (~low).sum() < answer.scanned.vectors < (~low).sum() + 0.5 * low.sum()


def test_only_the_files_of_the_named_partitions_are_opened(spark: SparkSession, tmp_path: Path) -> None:
    made = make(np.random.default_rng(1).random((240, DIMENSION), dtype=np.float32), 1)
    base = made.store(tmp_path, 3)
    vector = np.full(DIMENSION, 0.5, dtype=np.float32)
    queries = [Query("a", vector, "CT", "CHEST"), Query("b", vector, "MR", "BRAIN"), Query("c", vector, "CT", "CHEST")]
    named = (("CT", "CHEST"), ("MR", "BRAIN"))
    # What the plan does not name is not even there.
    for file in base.files:
        if file.place not in named:
            Path(storage.local_path(file.uri)).unlink()
    for method in ("bounds", "scan"):
        answer = search.search(spark, base, queries, options(method=method))
        assert answer.scanned.files == sum(file.place in named for file in base.files) == 6
        assert answer.partitions == named
        assert base.places == tuple(sorted(PLACES))
        assert answer.statuses[0].partitions == ("CT/CHEST",)
    # PySpark 4.2 translates what 4.0 lets through.
    with pytest.raises((Py4JJavaError, PySparkException), match="No such file"):
        search.search(spark, base, queries, options(prefilter="none"))


def test_partitions_that_do_not_exist_are_not_searched(spark: SparkSession, tmp_path: Path) -> None:
    base = make(np.ones((60, DIMENSION), dtype=np.float32), 1).store(tmp_path)
    vector = np.full(DIMENSION, 0.5, dtype=np.float32)
    queries = [Query("knee", vector, "CT", "KNEE"), Query("xa", vector, "XA")]
    answer = search.search(spark, base, queries, options())
    assert (len(answer.hits), answer.scanned) == (0, answers.Scanned())
    assert [status.status for status in answer.statuses] == [QueryStatus.NO_CANDIDATES] * 2
    assert "CT/KNEE" in (answer.statuses[0].reason or "")
    nothing = search.search(spark, base, [], options())
    assert (nothing.statuses, len(nothing.hits)) == ((), 0)
    assert nothing.hits.schema.names == schemas.RESULTS_HITS.schema.names


def test_queries_that_cannot_be_searched_are_refused(spark: SparkSession, tmp_path: Path) -> None:
    base = make(np.ones((60, DIMENSION), dtype=np.float32), 1).store(tmp_path)
    vector = np.zeros(DIMENSION, dtype=np.float32)
    with pytest.raises(InputError, match="not unique"):
        search.search(spark, base, [Query("a", vector), Query("a", vector)], options())
    with pytest.raises(ModelError, match="8 values, the index has 24"):
        search.search(spark, base, [Query("a", vector[:8])], options(prefilter="none"))
    with pytest.raises(ModelError, match="different shapes"):
        search.search(spark, base, [Query("a", vector), Query("b", vector[:8])], options())


@pytest.mark.parametrize("method", ["bounds", "scan"])
def test_object_storage_sends_what_the_plan_names_and_nothing_else(
    spark: SparkSession, s3: S3Server, tmp_path: Path, method: str
) -> None:
    """In every mode, by the server's own log."""
    bucket = f"search-{method}"
    random = np.random.default_rng(8)
    rows = (random.standard_normal((3000, 3)) @ random.standard_normal((3, 1024)) * 9).astype(np.float32)
    made = make(rows, 8)
    stored = made.store(s3.bucket(bucket), 3, rows_per_group=50)
    root = storage.canonical(str(s3.root))
    files = tuple(replace(file, uri=file.uri.replace(root, "s3a:/")) for file in stored.files)
    vector = rows[5] + np.float32(0.01)
    query = Query("q", vector, "CT", "CHEST", predicted="CT/HEAD", probability=0.9)
    modes: list[tuple[dict[str, Any], set[tuple[str, str]]]] = [
        ({"prefilter": "tags"}, {("CT", "CHEST")}),
        ({"prefilter": "tags", "unknown": "include"}, {("CT", "CHEST"), ("CT", "UNKNOWN")}),
        ({"prefilter": "predicted"}, {("CT", "HEAD")}),
        ({"prefilter": "modality"}, {("CT", "CHEST"), ("CT", "HEAD")}),
        ({"prefilter": "none", "unknown": "include"}, set(PLACES)),
    ]
    for values, places in modes:
        chosen = options(method=method, k=3, **values)
        near = search.search(spark, stored, [query], chosen)
        before = len(s3.read(bucket))
        with FaultProxy(s3.host, s3.port) as proxy:
            far = ObjectStore(StorageSettings(endpoint=proxy.endpoint, region="us-east-1", path_style=True, attempts=3))
            answer = search.search(spark, replace(stored, files=files, store=far), [query], chosen)
        assert answer.hits.equals(near.hits)
        assert replace(answer.scanned, bytes=0) == replace(near.scanned, bytes=0)
        named = {file.uri.removeprefix(f"s3a://{bucket}/"): file.bytes for file in files if file.place in places}
        assert set(s3.read(bucket)[before:]) == set(named) and answer.scanned.files == len(named)
        asked = [re.search(rb"(?i)range: bytes=(\d+)-(\d+)", request.head) for request, _ in proxy.seen]
        sent = sum(int(found[2]) - int(found[1]) + 1 for found in asked if found)
        # Beside the columns that it wants, a task reads a file's footer, as often as it opens the file: the last 64 KB,
        # and all of it where it is longer.
        lengths = [pq.read_metadata(storage.local_path(file.uri)).serialized_size for file in stored.files]
        footers = (2**16 + max(lengths) + 8) * len(named) * (2 if method == "bounds" else 1)
        assert answer.scanned.bytes <= sent <= answer.scanned.bytes * 1.2 + footers
        assert answer.scanned.bytes < (0.6 if method == "bounds" else 1.0) * sum(named.values())
