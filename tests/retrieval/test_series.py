"""Series against series: by an independent brute force, and as the job answers lists of them."""

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pyspark.sql import SparkSession

from cbmir_spark.lake import columns as cols
from cbmir_spark.lake import schemas
from cbmir_spark.retrieval import series as retrieval_series
from cbmir_spark.retrieval import series_tasks
from cbmir_spark.retrieval.query import HitFilter, Query, QueryStatus
from cbmir_spark.retrieval.series_tasks import (
    READ_STATISTICS,
    ComparisonInputs,
    Part,
    QueryVolume,
    describe,
    distance,
    fixed_point,
    merge,
)
from cbmir_spark.retrieval.tasks import SearchInputs, Share
from cbmir_spark.storage import ObjectStore
from tests.support.search_oracle import DIMENSION, LOCAL, PLACES, make, options, with_wishes
from tests.support.series_oracle import (
    answered,
    ask_series,
    assert_same_series,
    is_volume_of,
    series_oracle,
    volumes_of,
)

Floats = NDArray[np.float32]
# query, rank, distance, series, partition, image and frame that match best
Hit = tuple[str, int, float, str, tuple[str, str], str, int]
Key = tuple[tuple[str, str], str]


# --- arrays ---


def test_a_volume_is_the_same_bytes_in_whatever_order_its_frames_are_met() -> None:
    random = np.random.default_rng(1)
    vectors = (random.standard_normal((40, 9)) * 10.0 ** random.integers(-20, 20, (40, 1))).astype(np.float32)
    numbers = random.permutation(40)
    image, frame = np.array([f"{number // 2:032x}" for number in numbers], dtype=np.bytes_), numbers % 2
    order = np.lexsort((frame, image))

    def part(rows: NDArray[np.int64]) -> Part:
        where = np.stack([rows, rows, rows]).astype(np.int32)
        first = rows[np.lexsort((frame[rows], image[rows]))[0]]
        return Part(fixed_point(vectors[rows]).sum(axis=0), image[rows], frame[rows], where, {"first": int(first)})

    whole, vector = describe((("CT", "CHEST"), "s"), part(np.arange(40)))
    for seed in range(5):
        pieces = np.array_split(np.random.default_rng(seed).permutation(40), 7)
        merge_values = part(pieces[0])
        for piece in pieces[1:]:
            merge_values = merge(merge_values, part(piece))
        again, same = describe((("CT", "CHEST"), "s"), merge_values)
        assert same.tobytes() == vector.tobytes()
        assert (again.where == whole.where).all() and again.facts == whole.facts == {"first": int(order[0])}
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1)
    assert np.allclose(vector, (vectors / lengths[:, None]).mean(axis=0), atol=1e-7)


def test_a_volume_is_as_far_as_its_best_matching_frames() -> None:
    own = np.array([[2, 0, 0], [0, 5, 0]], dtype=np.float32)
    other = np.array([[0, 0, 1], [3, 4, 0], [7, 0, 0]], dtype=np.float32)
    # (1,0,0) is there; (0,1,0) is nearest to (0.6,0.8,0), at √(0.36 + 0.04).
    far, pair = distance(own, other, False, 2**20)
    assert (far, pair) == (pytest.approx(math.sqrt(0.4) / 2), (0, 2))
    assert distance(own, other, True, 2**20)[0] == pytest.approx(0.2 / 2)
    # What matches a frame of the query need not match one of the other.
    assert distance(own[:1], other, False, 2**20)[0] == 0.0
    assert distance(other, own[:1], False, 2**20)[0] > 0.5


def test_work_in_small_pieces_is_the_same_as_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums that are given away early, descriptors compared a few at a time, frames that are read again."""
    made = make(np.random.default_rng(6).standard_normal((300, DIMENSION)).astype(np.float32), 6)
    base = made.store(tmp_path, 2, rows_per_group=20)
    queries, _ = ask_series(made, 6, 6)
    places = dict.fromkeys(sorted(PLACES), 0)
    found = []
    for at_once, block_bytes in ((2048, 2**26), (3, 2**11)):
        monkeypatch.setattr(series_tasks, "_VOLUMES_AT_ONCE", at_once)
        files = {file.number: file for file in base.files}
        comparison = ComparisonInputs(files, DIMENSION, False, block_bytes, ObjectStore(LOCAL))
        merged: dict[Key, Any] = {}
        shares = [Share(file) for file in base.files]
        given = 0
        for key, part in series_tasks.parts(shares, None, DIMENSION, True, comparison):
            merged[key] = series_tasks.merge_values(merged[key], part) if key in merged else part
            given += 1
        read = merged.pop(READ_STATISTICS)
        assert read.vectors == 300
        assert (given > len(merged) + 1) == (at_once == 3)
        volumes_there = [describe(key, part) for key, part in merged.items()]
        vectors = np.stack([query.vector for query in queries])
        everyone = (np.arange(len(queries)),)
        job = SearchInputs(
            vectors,
            np.full(len(queries), 7),
            places,
            everyone,
            {},
            (),
            np.zeros(6, int),
            None,
            True,
            False,
            2**20,
            ObjectStore(LOCAL),
        )
        near = series_tasks.nearest(volumes_there, job)
        by_key = {volume.key: volume for volume, _ in volumes_there}
        own = [key for query in queries for key in volumes_of(made) if is_volume_of(made, query, key)]
        compared = [
            QueryVolume(number, 4, by_key[own[number]], others)
            for number, others in enumerate(near.by_query(len(queries)))
        ]
        hits = series_tasks.rank(compared, comparison)
        shown = hits.rows.take(hits.row).select([cols.SERIES_ID, cols.IMAGE_ID, cols.FRAME]).to_pylist()
        found.append((hits.query.tolist(), hits.distance.tolist(), shown, near.square.tolist()))
    assert found[0] == found[1]
    assert len(found[0][0]) == 24


# --- searches ---


@pytest.mark.parametrize(
    ("seed", "values"),
    [
        (1, {"prefilter": "tags", "unknown": "include"}),
        (2, {"prefilter": "none", "series_candidates": 3, "k": 2}),
        (3, {"prefilter": "modality", "unique": "patient", "exclude_same": "study", "metric": "cosine"}),
        (4, {"prefilter": "predicted", "imputed": "exclude", "unique": "none", "unknown": "include"}),
        (5, {"prefilter": "none", "exclude_same": "none", "unknown": "include", "k": 200}),
    ],
)
def test_series_are_brute_force_in_every_mode(
    spark: SparkSession, tmp_path: Path, seed: int, values: dict[str, Any]
) -> None:
    chosen = options(**({"k": 5, "series_candidates": 8, "tasks_per_core": seed} | values))
    made = make(np.random.default_rng(seed).standard_normal((400, DIMENSION)).astype(np.float32), seed)
    queries, rows = ask_series(made, 12, seed)
    queries = with_wishes(queries, seed)
    told, candidates = answered(spark, made.store(tmp_path, seed, seed), made, queries, chosen)
    expected = [series_oracle(made, query, rows[query.query_id], chosen) for query in queries]
    assert_same_series(told, list(itertools.chain(*(hits for hits, _ in expected))))
    assert candidates == tuple(count for _, count in expected)


def test_answers_are_the_same_bytes_however_the_work_is_cut(spark: SparkSession, tmp_path: Path) -> None:
    """With series that are copies of others, so that everything ties."""
    vectors = np.random.default_rng(3).integers(0, 3, (300, DIMENSION)).astype(np.float32)
    vectors[150:] = vectors[:150]
    vectors[vectors.sum(axis=1) == 0] = 1
    made = make(vectors, 3)
    queries, _ = ask_series(made, 6, 3)
    found = []
    for cut in (1, 4, 9):
        chosen = options(prefilter="none", unknown="include", k=20, tasks_per_core=cut, block_mb=cut)
        base = made.store(tmp_path / str(cut), cut, cut, rows_per_group=7)
        found.append(answered(spark, base, made, queries, chosen))
    assert found[0] == found[1] == found[2]


def test_only_the_files_of_the_named_partitions_are_read(spark: SparkSession, tmp_path: Path) -> None:
    made = make(np.random.default_rng(4).standard_normal((300, DIMENSION)).astype(np.float32), 4)
    base = made.store(tmp_path, 2)
    place = ("CT", "CHEST")
    keys = [key for key in sorted(volumes_of(made)) if key[0] == place][:2]
    for file in base.files:
        if file.place != place:
            Path(file.uri.removeprefix("file://")).unlink()
    found = retrieval_series.describe(spark, base, frozenset(keys), options())
    queries = [Query(key[1], found[key][1], *place, series_id=key[1]) for key in keys]
    answer = retrieval_series.search(spark, base, queries, {key[1]: found[key][0] for key in keys}, options())
    assert answer.partitions == (place,) and base.places == tuple(sorted(PLACES))
    assert answer.scanned.files == sum(file.place == place for file in base.files)
    assert {status.status for status in answer.statuses} == {QueryStatus.ANSWERED}


def test_a_query_without_candidates_says_so(spark: SparkSession, tmp_path: Path) -> None:
    made = make(np.random.default_rng(5).standard_normal((60, DIMENSION)).astype(np.float32), 5)
    base = made.store(tmp_path)
    key = sorted(volumes_of(made))[0]
    volume, vector = retrieval_series.describe(spark, base, frozenset([key]), options())[key]
    nowhere = Query("a", vector, "CT", "KNEE", series_id=key[1])
    too_old = replace(nowhere, query_id="b", body_part="UNKNOWN")
    too_old = replace(too_old, overrides=replace(too_old.overrides, hit_filter=HitFilter(age_min=150.0)))
    answer = retrieval_series.search(spark, base, [nowhere, too_old], {"a": volume, "b": volume}, options())
    assert [status.status for status in answer.statuses] == [QueryStatus.NO_CANDIDATES] * 2
    assert len(answer.hits) == 0 and answer.hits.schema.names == schemas.RESULTS_HITS.schema.names
    assert retrieval_series.search(spark, base, [], {}, options()).statuses == ()
