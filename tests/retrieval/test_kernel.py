"""The kernel against brute force in float64 that shares no line with it, and that brute force against a hand's work."""

import itertools
import math

import numpy as np
import pytest
from numpy.typing import NDArray

from cbmir_spark.retrieval import kernel

Floats = NDArray[np.float32]
Hit = tuple[float, int]

BUDGETS = (2_000, 2**20)


def oracle(
    queries: Floats,
    vectors: Floats,
    images: list[str],
    frames: list[int],
    groups: list[str] | None,
    k: int,
    apart: frozenset[tuple[int, int]] = frozenset(),
) -> list[list[Hit]]:
    """For each query its k nearest groups, as (distance, row): correctly rounded sums, plain Python sorting."""
    answers = []
    for q, query in enumerate(queries.astype(np.float64)):
        ranked = sorted(
            (math.sqrt(math.fsum((row - query) ** 2)), images[x], frames[x], x)
            for x, row in enumerate(vectors.astype(np.float64))
            if (q, x) not in apart
        )
        seen: set[str] = set()
        hits: list[Hit] = []
        for distance, _, _, x in ranked:
            group = groups[x] if groups else str(x)
            if group not in seen and len(hits) < k:
                seen.add(group)
                hits.append((distance, x))
        answers.append(hits)
    return answers


def search(
    queries: Floats,
    vectors: Floats,
    images: list[str],
    frames: list[int],
    groups: list[str] | None,
    k: int,
    apart: frozenset[tuple[int, int]] = frozenset(),
    blocks: int = 1,
    budget: int = 2**20,
) -> list[list[Hit]]:
    found = kernel.Search(queries, np.full(len(queries), k), budget)
    edges = np.linspace(0, len(vectors), blocks + 1).astype(int)
    for start, stop in itertools.pairwise(edges):
        keys = kernel.Keys(
            np.array(images[start:stop], dtype="S8"),
            np.array(frames[start:stop], dtype=np.int64),
            None if groups is None else np.array(groups[start:stop], dtype="S8"),
        )
        inside = sorted((q, x - start) for q, x in apart if start <= x < stop)
        pairs = kernel.Pairs(
            np.array([q for q, _ in inside], dtype=np.int64), np.array([x for _, x in inside], dtype=np.int64)
        )
        found.add(vectors[start:stop], keys, excluded=kernel.ExcludedPairs(pairs))
    nearest = found.results()
    answers: list[list[Hit]] = [[] for _ in queries]
    for q, distance, row in zip(nearest.query, np.sqrt(nearest.square), nearest.row, strict=True):
        answers[q].append((float(distance), int(row)))
    left = [len(vectors) - sum(1 for a, _ in apart if a == q) for q in range(len(queries))]
    assert found.candidates.tolist() == left
    assert set(found.rows) == set(nearest.row)
    return answers


def named(count: int, prefix: str = "i") -> list[str]:
    return [f"{prefix}{number:05d}" for number in range(count)]


def test_the_oracle_on_a_case_worked_by_hand() -> None:
    # From (0, 0): a at 5, b at 5, c at 13, d at 1. Groups: s holds a and d, u holds b, v holds c.
    queries = np.array([[0, 0]], dtype=np.float32)
    vectors = np.array([[3, 4], [4, 3], [5, 12], [0, 1]], dtype=np.float32)
    images, frames = ["b", "a", "c", "d"], [0, 0, 0, 0]
    assert oracle(queries, vectors, images, frames, None, 3) == [[(1.0, 3), (5.0, 1), (5.0, 0)]]
    assert oracle(queries, vectors, images, frames, ["s", "u", "v", "s"], 3) == [[(1.0, 3), (5.0, 1), (13.0, 2)]]
    apart = frozenset({(0, 3)})
    assert oracle(queries, vectors, images, frames, ["s", "u", "v", "s"], 2, apart) == [[(5.0, 1), (5.0, 0)]]


@pytest.mark.parametrize("blocks", [1, 2, 9])
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("k", [1, 7, 500])
def test_whole_numbers_with_many_ties_are_bit_for_bit_brute_force(
    blocks: int, budget: int, grouped: bool, k: int
) -> None:
    # Small whole numbers: every sum is exact in any order, so the oracle's distances must be equal, not close.
    random = np.random.default_rng(k)
    queries = random.integers(0, 3, (17, 6)).astype(np.float32)
    vectors = random.integers(0, 3, (300, 6)).astype(np.float32)
    images = [f"i{number:05d}" for number in random.permutation(100).repeat(3)]
    frames = [2, 0, 1] * 100
    # Rows of a group are scattered over the blocks.
    groups = [f"s{number:02d}" for number in random.integers(0, 40, 300)] if grouped else None
    apart = frozenset((int(q), int(x)) for q, x in random.integers(0, (17, 300), (200, 2)))
    expected = oracle(queries, vectors, images, frames, groups, k, apart)
    assert search(queries, vectors, images, frames, groups, k, apart, blocks, budget) == expected


@pytest.mark.parametrize("dimension", [1, 2, 3, 512, 700, 4096])
def test_random_vectors_at_every_dimension(dimension: int) -> None:
    random = np.random.default_rng(dimension)
    queries = random.standard_normal((8, dimension), dtype=np.float32)
    vectors = random.standard_normal((250, dimension), dtype=np.float32)
    images, frames = named(250), [0] * 250
    expected = oracle(queries, vectors, images, frames, None, 10)
    found = [search(queries, vectors, images, frames, None, 10, blocks=blocks) for blocks in (1, 4, 250)]
    assert found[0] == found[1] == found[2]
    for hits, wanted in zip(found[0], expected, strict=True):
        assert [row for _, row in hits] == [row for _, row in wanted]
        np.testing.assert_allclose([d for d, _ in hits], [d for d, _ in wanted], rtol=1e-14)


def crowded(random: np.random.Generator, dimension: int) -> tuple[Floats, Floats]:
    """Neighbouring slices: 400 rows of length about 170 whose squared distances to a query are about 1e-5."""
    centre = np.abs(random.standard_normal(dimension)) * 170 / math.sqrt(dimension)
    near = centre + random.standard_normal((400, dimension)) * 1e-4 / math.sqrt(dimension) * 30
    queries = centre + random.standard_normal((5, dimension)) * 1e-4
    return queries.astype(np.float32), near.astype(np.float32)


@pytest.mark.parametrize("dimension", [512, 4096])
def test_near_duplicates_at_large_norms(dimension: int) -> None:
    queries, vectors = crowded(np.random.default_rng(3), dimension)
    images, frames = named(400), [0] * 400
    products = queries.astype(np.float32) @ vectors.T
    naive = kernel.square_norms(vectors).astype(np.float32) - 2 * products
    expected = oracle(queries, vectors, images, frames, None, 10)
    # The case is as hard as it is meant to be: the matrix product alone ranks it wrongly.
    assert [row for _, row in expected[0]] != np.argsort(naive[0], kind="stable")[:10].tolist()
    for blocks in (1, 6):
        found = search(queries, vectors, images, frames, None, 10, blocks=blocks)
        assert [[row for _, row in hits] for hits in found] == [[row for _, row in hits] for hits in expected]


def test_the_margin_is_what_keeps_near_duplicates_right(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, vectors = crowded(np.random.default_rng(3), 4096)
    images, frames = named(400), [0] * 400
    expected = oracle(queries, vectors, images, frames, None, 10)
    monkeypatch.setattr(kernel, "margin", lambda reach, dimension: np.zeros_like(reach))
    found = search(queries, vectors, images, frames, None, 10)
    assert [[row for _, row in hits] for hits in found] != [[row for _, row in hits] for hits in expected]


@pytest.mark.parametrize(("dimension", "scale"), [(3, 1.0), (512, 170.0), (4096, 1.0), (4096, 1e6), (600, 1e-20)])
def test_the_margin_holds_for_the_worst_that_is_seen(dimension: int, scale: float) -> None:
    random = np.random.default_rng(5)
    queries = (random.random((20, dimension)) * scale).astype(np.float32)
    vectors = np.concatenate([queries, (random.random((200, dimension)) * scale).astype(np.float32)])
    norms, own = kernel.square_norms(vectors), kernel.square_norms(queries)
    partial = kernel.approximate(queries, vectors, norms).astype(np.float64)
    exact = np.array([[math.fsum((x - q) ** 2) for x in vectors.astype(float)] for q in queries.astype(float)])
    reach = (np.sqrt(own)[:, None] + np.sqrt(norms)[None, :]) ** 2
    assert (np.abs(partial + own[:, None] - exact) <= kernel.margin(reach, dimension)).all()


def test_more_asked_for_than_there_is() -> None:
    random = np.random.default_rng(1)
    queries, vectors = random.random((3, 8), dtype=np.float32), random.random((5, 8), dtype=np.float32)
    images, frames, groups = named(5), [0] * 5, ["s", "s", "t", "t", "t"]
    assert [len(hits) for hits in search(queries, vectors, images, frames, None, 99)] == [5, 5, 5]
    assert [len(hits) for hits in search(queries, vectors, images, frames, groups, 99, blocks=5)] == [2, 2, 2]
    everything = frozenset((q, x) for q in range(3) for x in range(5))
    assert search(queries, vectors, images, frames, None, 2, everything) == [[], [], []]


def test_blank_pictures_are_all_as_near_and_come_by_name() -> None:
    queries = np.full((1, 64), 12.5, dtype=np.float32)
    vectors = np.full((50, 64), 12.5, dtype=np.float32)
    images, frames = list(reversed(named(50))), [0] * 50
    assert search(queries, vectors, images, frames, None, 3, blocks=7) == [[(0.0, 49), (0.0, 48), (0.0, 47)]]
    zeros = np.zeros_like(vectors)
    assert search(np.zeros_like(queries), zeros, images, frames, None, 2) == [[(0.0, 49), (0.0, 48)]]


@pytest.mark.parametrize("scale", [1e19, 3e37, 1e-30, 1e-44])
def test_lengths_whose_squares_leave_float32(scale: float) -> None:
    random = np.random.default_rng(2)
    queries = (random.random((4, 16)) * scale).astype(np.float32)
    vectors = (random.random((60, 16)) * scale).astype(np.float32)
    images, frames = named(60), [0] * 60
    expected = oracle(queries, vectors, images, frames, None, 5)
    for blocks in (1, 3):
        found = search(queries, vectors, images, frames, None, 5, blocks=blocks)
        assert [[row for _, row in hits] for hits in found] == [[row for _, row in hits] for hits in expected]


@pytest.mark.parametrize("dimension", [1, 5, 64, 511, 4096])
def test_a_square_does_not_depend_on_what_is_measured_beside_it(dimension: int) -> None:
    random = np.random.default_rng(9)
    queries = random.standard_normal((7, dimension), dtype=np.float32)
    vectors = random.standard_normal((40, dimension), dtype=np.float32)
    query, row = random.integers(0, 7, 3000), random.integers(0, 40, 3000)
    merge = kernel.squares(queries, vectors, query, row)
    alone = [
        kernel.squares(queries[q : q + 1], np.asfortranarray(vectors[x : x + 1]), np.zeros(1, int), np.zeros(1, int))[0]
        for q, x in zip(query, row, strict=True)
    ]
    assert merge.tobytes() == np.array(alone).tobytes()


def test_some_queries_only_meet_some_rows() -> None:
    random = np.random.default_rng(4)
    queries, vectors = random.random((6, 8), dtype=np.float32), random.random((30, 8), dtype=np.float32)
    found = kernel.Search(queries, np.full(6, 2), 2**20)
    for start, wanted in ((0, [1, 4]), (15, [0, 1])):
        keys = kernel.Keys(np.array(named(15), dtype="S8"), np.zeros(15, dtype=np.int64), None)
        found.add(vectors[start : start + 15], keys, np.array(wanted))
    assert found.candidates.tolist() == [15, 30, 0, 0, 15, 0]
    nearest = found.results()
    assert nearest.query.tolist() == [0, 0, 1, 1, 4, 4]
    assert set(nearest.row[:2]) <= set(range(15, 30))
    assert set(nearest.row[4:]) <= set(range(15))


@pytest.mark.parametrize("blocks", [1, 3, 8])
@pytest.mark.parametrize("grouped", [False, True])
def test_queries_may_differ_in_their_hits_and_in_the_rows_that_they_meet(blocks: int, grouped: bool) -> None:
    random = np.random.default_rng(6)
    queries = random.integers(0, 3, (20, 6)).astype(np.float32)
    vectors = random.integers(0, 3, (120, 6)).astype(np.float32)
    images, frames = named(120), [0] * 120
    groups = [f"s{number:02d}" for number in random.integers(0, 30, 120)] if grouped else None
    k = random.integers(1, 40, 20)
    bars = random.random((3, 120)) < 0.3
    bars[2] = True
    of = random.integers(0, 3, 20)
    single = frozenset((int(q), int(x)) for q, x in random.integers(0, (20, 120), (60, 2)))
    apart = single | {(q, x) for q in range(20) for x in range(120) if bars[of[q], x]}
    found = kernel.Search(queries, k, 5_000)
    for start, stop in itertools.pairwise(np.linspace(0, 120, blocks + 1).astype(int)):
        inside = np.array(sorted((q, x - start) for q, x in single if start <= x < stop)).reshape(-1, 2)
        hidden = kernel.ExcludedPairs(kernel.Pairs(inside[:, 0], inside[:, 1]), bars[:, start:stop], of)
        group = None if groups is None else np.array(groups[start:stop], dtype="S8")
        keys = kernel.Keys(np.array(images[start:stop], dtype="S8"), np.zeros(stop - start, dtype=np.int64), group)
        found.add(vectors[start:stop], keys, excluded=hidden)
    nearest = found.results()
    for q in range(20):
        expected = oracle(
            queries[q : q + 1], vectors, images, frames, groups, k[q], frozenset((0, x) for p, x in apart if p == q)
        )
        of_query = nearest.query == q
        told = zip(np.sqrt(nearest.square[of_query]), nearest.row[of_query], strict=True)
        assert [(float(distance), int(row)) for distance, row in told] == expected[0]
    assert found.candidates.tolist() == [120 - sum(1 for p, _ in apart if p == q) for q in range(20)]


@pytest.mark.parametrize("dimension", [3, 512, 1500])
def test_cosine_is_brute_force_on_vectors_of_length_one(dimension: int) -> None:
    random = np.random.default_rng(dimension)
    queries, vectors = crowded(random, dimension)
    vectors *= random.random((len(vectors), 1), dtype=np.float32) * 100 + 0.01
    images = named(len(vectors))

    def long(rows: Floats) -> NDArray[np.float64]:
        wide = rows.astype(np.float64)
        return wide / np.array([[math.sqrt(math.fsum(row**2))] for row in wide])

    unit, ones = long(vectors), long(queries)
    found = []
    for blocks in (1, 7):
        searched = kernel.Search(queries, np.full(len(queries), 10), 2**20, cosine=True)
        for part in np.array_split(np.arange(len(vectors)), blocks):
            keys = kernel.Keys(np.array(images, dtype="S8")[part], np.zeros(len(part), dtype=np.int64), None)
            searched.add(vectors[part], keys)
        nearest = searched.results()
        found.append((nearest.row.tolist(), kernel.distances(nearest.square, cosine=True).tolist()))
    assert found[0] == found[1]
    exact = np.array([[math.fsum((row - one) ** 2) / 2 for row in unit] for one in ones])
    rows = np.array(found[0][0]).reshape(len(queries), 10)
    told = np.array(found[0][1]).reshape(rows.shape)
    for q, best in enumerate(np.argsort(exact, axis=1, kind="stable")[:, :10]):
        np.testing.assert_allclose(told[q], exact[q, best], rtol=1e-9)
        np.testing.assert_allclose(exact[q, rows[q]], exact[q, best], rtol=1e-9)
    np.testing.assert_allclose(told[0, 0], 1 - ones[0] @ unit[rows[0, 0]], atol=1e-15)


def test_no_hits_and_too_many_columns_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        kernel.Search(np.zeros((1, 2), dtype=np.float32), np.array([0]), 1)
    with pytest.raises(ValueError, match="up to 65536"):
        kernel.Search(np.zeros((1, 70_000), dtype=np.float32), np.array([1]), 1)
