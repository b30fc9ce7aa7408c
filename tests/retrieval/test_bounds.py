"""Bounds of distances: never on the wrong side of them, and of use where vectors are nearly of low rank."""

import itertools
import math

import numpy as np
import pytest
from numpy.typing import NDArray

from cbmir_spark.models.projection import Projection
from cbmir_spark.retrieval import bounds, kernel
from cbmir_spark.retrieval.bounds import Bounds, Points

Floats = NDArray[np.float32]


def drawn(kind: str, seed: int, rows: int = 400, dimension: int = 96) -> tuple[Floats, Floats]:
    """Queries and rows of a kind that features may be of."""
    random = np.random.default_rng(seed)
    if kind == "low rank":
        base = random.standard_normal((rows + 30, 5)) @ random.standard_normal((5, dimension)) * 10
        made = base + random.standard_normal(base.shape) * 0.05
    elif kind == "random":
        made = random.standard_normal((rows + 30, dimension))
    elif kind == "near duplicates":
        centre = np.abs(random.standard_normal(dimension)) * 170 / math.sqrt(dimension)
        made = centre + random.standard_normal((rows + 30, dimension)) * 1e-4
    elif kind == "whole numbers":
        made = random.integers(0, 3, (rows + 30, dimension)).astype(float)
    else:
        made = np.full((rows + 30, dimension), 12.5)
    return made[:30].astype(np.float32), made[30:].astype(np.float32)


def projected(projection: Projection, vectors: Floats) -> Points:
    return Points.of(*projection.apply(vectors))


KINDS = ("low rank", "random", "near duplicates", "whole numbers", "blank")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("directions", [1, 8, 96])
@pytest.mark.parametrize("blocks", [1, 5])
@pytest.mark.parametrize("grouped", ["no", "by code", "by codes that several groups have"])
def test_what_may_be_a_result_is_left(
    kind: str, directions: int, blocks: int, grouped: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounds, "USEFUL", 1)
    random = np.random.default_rng(directions)
    queries, vectors = drawn(kind, directions)
    projection = Projection.fit([vectors[::3]], directions)
    k = random.integers(1, 60, len(queries))
    groups = np.array([f"s{n}" for n in random.integers(0, 90, len(vectors))], dtype=np.bytes_)
    codes = bounds.codes(groups) % np.uint64(2**64 - 1 if grouped == "by code" else 29)
    if grouped == "no":
        groups = np.arange(len(vectors))
    bars = np.stack([np.zeros(len(vectors), dtype=bool), random.random(len(vectors)) < 0.5])
    of = random.integers(0, 2, len(queries))
    search = Bounds(projected(projection, queries), k, projection.defect, 20_000, 10**9)
    everyone = np.arange(len(queries))
    none = np.empty(0, dtype=np.int64)
    for start, stop in itertools.pairwise(np.linspace(0, len(vectors), blocks + 1).astype(int)):
        hidden = kernel.ExcludedPairs(kernel.Pairs(none, none), bars[:, start:stop], of)
        group = None if grouped == "no" else codes[start:stop]
        search.add(projected(projection, vectors[start:stop]), group, everyone, hidden)
    left = search.remaining()
    squares = ((vectors[None].astype(np.float64) - queries[:, None].astype(np.float64)) ** 2).sum(axis=2)
    pairs = set(zip(left.query.tolist(), left.row.tolist(), strict=True))
    assert len(pairs) == len(left.query)
    for q in range(len(queries)):
        seen: set[object] = set()
        for row in np.argsort(squares[q], kind="stable"):
            if bars[of[q], row] or len(seen) == k[q]:
                continue
            if groups[row] not in seen:
                seen.add(groups[row])
                # Another row may be as near to the last digit and stand for this one.
                same = squares[q] <= squares[q, row] * (1 + 1e-12)
                assert (q, row) in pairs or same.sum() > len(seen)
    exact = squares[left.query, left.row]
    assert (left.lower <= exact * (1 + 1e-12)).all() and (left.upper >= exact * (1 - 1e-12)).all()
    assert not bars[of[left.query], left.row].any()
    assert search.candidates.tolist() == [int((~bars[of[q]]).sum()) for q in range(len(queries))]


def test_little_is_left_of_vectors_of_nearly_low_rank() -> None:
    queries, vectors = drawn("low rank", 1, rows=4000)
    projection = Projection.fit([vectors[::3]], 8)
    search = Bounds(projected(projection, queries), np.full(30, 10), projection.defect, 2**20, 10**9)
    search.add(projected(projection, vectors), None, np.arange(30), None)
    assert not search.ineffective
    assert 300 <= len(search.remaining().query) < 0.02 * 30 * 4000


def test_random_vectors_are_given_up_at_once() -> None:
    queries, vectors = drawn("random", 1, rows=4000)
    projection = Projection.fit([vectors[::3]], 8)
    search = Bounds(projected(projection, queries), np.full(30, 10), projection.defect, 2**20, 10**9)
    for part in np.array_split(vectors, 4):
        search.add(projected(projection, part), None, np.arange(30), None)
    assert search.ineffective and len(search.remaining().query) == 0
    assert search.candidates.tolist() == [1000] * 30


def test_no_more_pairs_are_left_than_the_driver_can_hold() -> None:
    queries, vectors = drawn("low rank", 1, rows=4000)
    projection = Projection.fit([vectors[::3]], 8)
    for most, ineffective in ((300, True), (3000, False)):
        search = Bounds(projected(projection, queries), np.full(30, 10), projection.defect, 2**20, most)
        for part in np.array_split(vectors, 8):
            search.add(projected(projection, part), None, np.arange(30), None)
        assert search.ineffective == ineffective and len(search.remaining().query) <= most


def test_the_rounding_that_is_allowed_for_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """NearestVolumes duplicates at large norms: without the margin, bounds contradict distances."""
    monkeypatch.setattr(bounds, "USEFUL", 1)
    monkeypatch.setattr(Bounds, "_error", lambda self, reach, columns: np.zeros_like(reach))
    queries, vectors = drawn("near duplicates", 3)
    vectors, queries = vectors + 100, queries + 100
    projection = Projection(np.zeros(96), Projection.fit([vectors], 8).directions)
    search = Bounds(projected(projection, queries), np.full(30, 400), projection.defect, 2**20, 10**9)
    search.add(projected(projection, vectors), None, np.arange(30), None)
    left = search.remaining()
    exact = ((vectors[left.row].astype(np.float64) - queries[left.query]) ** 2).sum(axis=1)
    assert (left.lower > exact).any()


def test_a_projection_far_from_orthonormal_is_allowed_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "USEFUL", 1)
    queries, vectors = drawn("low rank", 4)
    good = Projection.fit([vectors], 6)
    skewed = Projection(good.mean, good.directions + 0.02 * np.roll(good.directions, 1, axis=0))
    assert skewed.defect > 0.03
    search = Bounds(projected(skewed, queries), np.full(30, 400), skewed.defect, 2**20, 10**9)
    search.add(projected(skewed, vectors), None, np.arange(30), None)
    left = search.remaining()
    assert len(left.query) == 30 * 400
    exact = ((vectors[left.row].astype(np.float64) - queries[left.query]) ** 2).sum(axis=1)
    assert (left.lower <= exact).all() and (left.upper >= exact).all()


def test_squares_beyond_float32_are_left_to_the_scan() -> None:
    vectors = (np.random.default_rng(1).random((50, 4)) * 1e30).astype(np.float32)
    projection = Projection(np.zeros(4), np.eye(4)[:2])
    search = Bounds(projected(projection, vectors[:3]), np.full(3, 2), 0.0, 2**20, 10**9)
    search.add(projected(projection, vectors), None, np.arange(3), None)
    assert search.ineffective


def test_codes_are_of_texts_alone() -> None:
    texts = [b"", b"a", b"b", b"ab", b"a" * 8, b"a" * 16, b"a" * 9, *(b"%032x" % number for number in range(50_000))]
    found = bounds.codes(np.array(texts, dtype=np.bytes_))
    assert len(np.unique(found)) == len(texts)
    beside = [
        bounds.codes(np.array([text, b"x" * width], dtype=np.bytes_))[0] for text in texts[:9] for width in (1, 40)
    ]
    assert beside == np.repeat(found[:9], 2).tolist()
    assert len(bounds.codes(np.empty(0, dtype=np.bytes_))) == 0


@pytest.mark.parametrize("queries", [1, 3, 8192])
def test_pairs_are_in_the_order_of_query_and_value(queries: int) -> None:
    random = np.random.default_rng(queries)
    query = random.integers(0, queries, 20_000)
    value = np.exp(random.uniform(-700, 700, 20_000))
    value[::7] = random.choice([0.0, -0.0, -1e-9, np.inf, 1.0, 1 + 2.0**-40], len(value[::7]))
    order = bounds.by_query(query, value)
    assert sorted(order.tolist()) == list(range(20_000))
    assert (np.diff(query[order]) >= 0).all()
    one = np.diff(query[order]) == 0
    counted = np.maximum(value[order], 0)
    assert (counted[:-1][one] <= counted[1:][one] * (1 + 2.0**-31)).all()


@pytest.mark.parametrize("grouped", [False, True])
def test_a_limit_is_never_below_the_kth_smallest_upper_bound(grouped: bool) -> None:
    random = np.random.default_rng(2)
    query = random.integers(0, 40, 3000)
    # So near to each other that their order is not told apart.
    upper = 1 + random.random(3000) * 2.0**-33
    group = random.integers(0, 30, 3000)
    k = random.integers(1, 40, 40)
    given = bounds.codes(group.astype(np.bytes_)) if grouped else None
    left, limit = bounds.prune(bounds.Candidates(query, np.arange(3000), upper - 1e-3, upper, given), k)
    assert len(left.query) == 3000
    for number in range(40):
        mine = query == number
        best = [upper[mine & (group == each)].min(initial=np.inf) for each in range(30)] if grouped else upper[mine]
        kth = np.sort(best)[k[number] - 1] if k[number] <= len(best) else np.inf
        assert kth <= limit[number] <= kth * (1 + 2.0**-29)
