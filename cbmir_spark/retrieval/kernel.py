"""Exact nearest neighbours among blocks of vectors: numpy arrays in, numpy arrays out. No Spark; runs per task.

A matrix product gives every squared distance ‖x‖² − 2q·x + ‖q‖² approximately, with an error that is bounded, not
guessed (see `margin`). Rows that the bound cannot rule out are measured again by the direct difference Σ(x−q)² in
float64, summed in an order that depends on the dimension alone (see `squares`). So what comes out is what brute force
in float64 gives, bit for bit, however the rows were cut into blocks and tasks.

Letters: q a query, x a row, D the dimension, Q, n, t numbers of queries, rows, queries of one tile.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Numbers = NDArray[np.int64]
Texts = NDArray[np.bytes_]

# Half the distance from 1 to the next float32: the greatest relative error of one rounding.
UNIT = 2.0**-24
# Sums are taken over this many columns at a time, and the bound grows with that number instead of with D.
_COLUMNS = 512
_MOST_COLUMNS = 2**16
# Up to here (and with it every partial sum) a square stays below float32's greatest value, 2^128.
GREATEST = 2.0**125
# A pair that is measured directly costs as much as this many within a matrix product.
WORTH = 40
# Bytes of float64 differences measured at a time, so that they stay in the processor's cache.
_CACHE = 2**21


@dataclass(frozen=True)
class Keys:
    """What identifies n rows: `image` and `frame` break ties, `group` is what a hit list holds only once.

    image: (n,) bytes in the order that ties follow. frame: (n,) int64. group: (n,) bytes, or None where every row
    may be a separate hit.
    """

    image: Texts
    frame: Numbers
    group: Texts | None

    def take(self, rows: Numbers) -> "Keys":
        group = None if self.group is None else self.group[rows]
        return Keys(self.image[rows], self.frame[rows], group)


@dataclass(frozen=True)
class Pairs:
    """Query and row numbers that belong together, each (m,) int64."""

    query: Numbers
    row: Numbers


@dataclass(frozen=True)
class ExcludedPairs:
    """Pairs of queries and rows of a block that must not become hits.

    `pairs` lists single ones, each once. rows: (m, n) masks of rows that some queries exclude as a whole; rows_of:
    (Q,) the mask that applies to each query.
    """

    pairs: Pairs
    rows: NDArray[np.bool_] | None = None
    rows_of: Numbers | None = None

    def reordered(self, order: Numbers) -> "ExcludedPairs":
        """Renumber the rows for a block that is taken in this order."""
        position = np.empty_like(order)
        position[order] = np.arange(len(order))
        rows = None if self.rows is None else self.rows[:, order]
        return ExcludedPairs(Pairs(self.pairs.query, position[self.pairs.row]), rows, self.rows_of)

    def for_tile(self, tile: Numbers) -> "ExcludedPairs":
        """Select some of the queries (their numbers, sorted) and renumber them in that order."""
        query, row = self.pairs.query, self.pairs.row
        position = np.minimum(np.searchsorted(tile, query), len(tile) - 1)
        inside = tile[position] == query
        rows_of = None if self.rows_of is None else self.rows_of[tile]
        return ExcludedPairs(Pairs(position[inside], row[inside]), self.rows, rows_of)

    def clear(self, near: NDArray[np.bool_]) -> None:
        """Set the (t, n) mask `near` to False at excluded pairs."""
        if self.rows is not None:
            near &= ~self.rows[self.rows_of]
        near[self.pairs.query, self.pairs.row] = False

    def mask(self, partial: Floats) -> Numbers:
        """Set (t, n) distances to infinity at excluded pairs; return (t,) the number of excluded rows per query."""
        if self.rows is None or self.rows_of is None:
            count = np.bincount(self.pairs.query, minlength=len(partial))
        else:
            mask = self.rows[self.rows_of]
            mask[self.pairs.query, self.pairs.row] = True
            partial[mask] = np.inf
            count = np.count_nonzero(mask, axis=1)
        partial[self.pairs.query, self.pairs.row] = np.inf
        return count


@dataclass(frozen=True)
class Nearest:
    """m results in the order of query, distance, image, frame; `row` numbers all rows that were ever added.

    `square` is the squared distance, under `cosine` of the L2-normalised vectors; see `distances`.
    """

    query: Numbers
    square: Doubles
    row: Numbers


class Search:
    """The nearest groups of each query, each by its nearest row, over all blocks added so far.

    queries: (Q, D) float32, finite. k: (Q,) groups that each takes. `budget` bounds the bytes of one tile of
    approximate distances. Memory besides is proportional to the sum of k. With `cosine` the distance is 1 − cos, which
    is half the squared difference of the L2-normalised vectors; a vector of zeros stays as it is.
    """

    def __init__(self, queries: Floats, k: Numbers, budget: int, cosine: bool = False) -> None:
        if len(k) and k.min() < 1:
            raise ValueError(f"k is {k.min()}, but must be at least 1")
        if queries.shape[1] > _MOST_COLUMNS:
            raise ValueError(f"vectors of {queries.shape[1]} columns; the error bound holds up to {_MOST_COLUMNS}")
        self._cosine = cosine
        self._exact = l2_normalize(queries) if cosine else queries
        self._queries = self._exact.astype(np.float32)
        self._squares = square_norms(self._queries)
        self._k = k
        self._budget = budget
        self.rows_seen = 0
        """Rows added so far, compared or not; the next one gets this number."""
        self._kth = np.full(len(queries), np.inf)
        self._counted = 0
        self._query = np.empty(0, dtype=np.int64)
        self._square = np.empty(0, dtype=np.float64)
        self._row = np.empty(0, dtype=np.int64)
        self._keys: Keys | None = None
        self.candidates: Numbers = np.zeros(len(queries), dtype=np.int64)
        """(Q,) rows that each query was compared with."""

    @property
    def rows(self) -> Numbers:
        """Numbers of the rows that may still be results, sorted; a caller may drop everything else."""
        return np.unique(self._row)

    def add(
        self, vectors: Floats, keys: Keys, queries: Numbers | None = None, excluded: ExcludedPairs | None = None
    ) -> None:
        """Compare n rows, (n, D) float32, with some queries (their numbers, sorted; None: all)."""
        first = self.rows_seen
        self.rows_seen += len(vectors)
        chosen = np.arange(len(self._queries)) if queries is None else queries
        if not len(vectors) or not len(chosen):
            return
        numbers = np.arange(len(vectors))
        starts = None
        if keys.group is not None:
            order, starts = by_group(keys.group)
            if order is not None:
                numbers, vectors, keys = order, vectors[order], keys.take(order)
                excluded = None if excluded is None else excluded.reordered(order)
        exact = l2_normalize(vectors) if self._cosine else vectors
        vectors = exact.astype(np.float32, copy=False)
        norms = square_norms(vectors)
        found_queries, found_rows = [], []
        for tile in tiles(chosen, len(vectors), self._budget):
            pairs = self._near(tile, vectors, norms, starts, None if excluded is None else excluded.for_tile(tile))
            found_queries.append(pairs.query)
            found_rows.append(pairs.row)
        query, row = np.concatenate(found_queries), np.concatenate(found_rows)
        square = squares(self._exact, exact, query, row)
        self._keep(query, square, first + numbers[row], keys.take(row))

    def results(self) -> Nearest:
        """The nearest groups of each query among all rows added."""
        if len(self._query):
            self._prune()
        return Nearest(self._query, self._square, self._row)

    def _near(
        self, tile: Numbers, vectors: Floats, norms: Doubles, starts: Numbers | None, excluded: ExcludedPairs | None
    ) -> Pairs:
        """Pairs of the tile's queries and the rows that may be among their nearest groups."""
        whole = len(tile) == len(self._queries)
        queries = self._queries if whole else self._queries[tile]
        query_squares, k = self._squares[tile], self._k[tile]
        reach = (np.sqrt(query_squares) + np.sqrt(norms.max())) ** 2
        # Where squares may overflow nothing is ruled out; everything is measured directly.
        safe = reach < GREATEST
        error = margin(reach, vectors.shape[1])
        with np.errstate(over="ignore", invalid="ignore"):
            # Without ‖q‖², which is the same for all rows of a query: limits are moved by it instead.
            partial = approximate(queries, vectors, norms)
        self.candidates[tile] += len(vectors)
        if excluded is not None:
            self.candidates[tile] -= excluded.mask(partial)
        limit = np.full(len(tile), np.inf)
        limit[safe] = (self._kth[tile] + error)[safe] - query_squares[safe]
        near = not_above(partial, limit)
        if excluded is not None:
            excluded.clear(near)
        groups = len(vectors) if starts is None else len(starts)
        crowded = np.flatnonzero(safe & (np.count_nonzero(near, axis=1) > k) & (k <= groups))
        if len(crowded):
            ranked = partial if len(crowded) == len(tile) else partial[crowded]
            if starts is not None:
                ranked = np.minimum.reduceat(ranked, starts, axis=1)
            # The true square of the k-th group is at most this much over its approximation, and any row that
            # beats it at most as much below its approximation.
            limit[crowded] = np.minimum(limit[crowded], smallest(ranked, k[crowded]) + 2 * error[crowded])
            near &= not_above(partial, limit)
        rows_of = np.nonzero(near)
        return Pairs(tile[rows_of[0]], rows_of[1])

    def _keep(self, query: Numbers, square: Doubles, row: Numbers, keys: Keys) -> None:
        self._query = np.concatenate([self._query, query])
        self._square = np.concatenate([self._square, square])
        self._row = np.concatenate([self._row, row])
        self._keys = keys if self._keys is None else concatenate([self._keys, keys])
        # Sorting everything for each handful of new pairs would cost more than the pairs that it spares.
        if len(self._query) > self._counted + self._counted // 8:
            self._prune()

    def _prune(self) -> None:
        """Drop all but the nearest groups of each query; record the square of the k-th where there are k."""
        assert self._keys is not None
        order, last = nearest_groups(self._query, self._square, self._keys, self._k, self._cosine)
        self._query, self._square, self._row = self._query[order], self._square[order], self._row[order]
        self._keys = self._keys.take(order)
        self._counted = len(order)
        self._kth[self._query[last]] = self._square[last]


def nearest_groups(
    query: Numbers, square: Doubles, keys: Keys, k: Numbers, cosine: bool = False
) -> tuple[Numbers, Numbers]:
    """Which of m pairs are the k[query] nearest groups of their query, each by its nearest row; k: (Q,).

    Returns their numbers in the order of query, distance, image, frame, and where among them those stand that are the
    k-th of their query. Distances tie as float64, once the root is taken.
    """
    _, image_rank = np.unique(keys.image, return_inverse=True)
    order = np.lexsort((keys.frame, image_rank, distances(square, cosine), query))
    if keys.group is not None:
        _, group_rank = np.unique(keys.group, return_inverse=True)
        pair = query[order] * (group_rank.max(initial=0) + 1) + group_rank[order]
        _, nearest_of_group = np.unique(pair, return_index=True)
        order = order[np.sort(nearest_of_group)]
    sorted_query = query[order]
    begins = np.flatnonzero(np.diff(sorted_query, prepend=-1))
    rank = np.arange(len(order)) - np.repeat(begins, np.diff(begins, append=len(order)))
    most = k[sorted_query]
    inside = rank < most
    return order[inside], np.flatnonzero((rank == most - 1)[inside])


def contenders(
    queries: Floats, query_squares: Doubles, vectors: Floats, pairs: Pairs, limit: Doubles
) -> NDArray[np.bool_]:
    """(m,) which pairs may have a squared distance within the limit, (Q,), of their query; query_squares: (Q,) squares.

    Where pairs are dense a matrix product costs less than measuring each, and rules most of them out.
    """
    asked, place = np.unique(pairs.query, return_inverse=True)
    if len(pairs.query) * WORTH < len(asked) * len(vectors):
        return np.ones(len(pairs.query), dtype=bool)
    norms = square_norms(vectors)
    reach = (np.sqrt(query_squares[asked]) + np.sqrt(norms.max(initial=0))) ** 2
    with np.errstate(over="ignore", invalid="ignore"):
        partial = approximate(queries[asked], vectors, norms)[place, pairs.row]
    error = np.where(reach < GREATEST, margin(reach, vectors.shape[1]), np.inf)
    with np.errstate(invalid="ignore"):
        # Not-a-number, where squares overflowed, is no reason to rule a pair out.
        near: NDArray[np.bool_] = ~(partial > (limit[asked] + error - query_squares[asked])[place])
    return near


def distances(square: Doubles, cosine: bool) -> Doubles:
    """Turn squares into reported distances; under `cosine` they are squares of L2-normalised vectors."""
    return square / 2 if cosine else np.sqrt(square)


def tiles(queries: Numbers, rows: int, budget: int) -> Iterator[Numbers]:
    """Cut the queries into tiles whose (t, rows) matrices stay within `budget` bytes."""
    # Per pair: two float32 of the product, one more where rows are ranked, and a mask.
    height = max(1, budget // (rows * 16))
    for start in range(0, len(queries), height):
        yield queries[start : start + height]


def smallest(values: Floats, k: Numbers) -> Doubles:
    """Return (t,) float64, the k-th smallest value of each row of (t, n); k: (t,) from 1 to n."""
    different = np.unique(k)
    if len(different) == 1:
        found = np.partition(values, different[0] - 1, axis=1)[:, different[0] - 1]
    else:
        parted = np.partition(values, different - 1, axis=1)
        found = parted[np.arange(len(k)), k - 1]
    return found.astype(np.float64)


def l2_normalize(vectors: Floats) -> Doubles:
    """L2-normalise (n, D) float32 vectors to float64; the bytes do not depend on the other rows."""
    rows = np.arange(len(vectors))
    lengths = np.sqrt(squares(np.zeros((1, vectors.shape[1]), np.float32), vectors, np.zeros_like(rows), rows))
    unit: Doubles = vectors / np.where(lengths > 0, lengths, 1.0)[:, None]
    return unit


def square_norms(vectors: Floats) -> Doubles:
    """(n, D) float32 → (n,) float64 squares of their lengths, each off by at most γ_512 of itself (see `margin`)."""
    total = np.zeros(len(vectors))
    with np.errstate(over="ignore"):
        for columns in _column_blocks(vectors.shape[1]):
            part = vectors[:, columns]
            total += np.einsum("nd,nd->n", part, part)
    return total


def approximate(queries: Floats, vectors: Floats, norms: Doubles) -> Floats:
    """(t, D) and (n, D) float32 → (t, n) float32, approximately ‖x‖² − 2q·x; `norms` are the rows' squares."""
    products = np.empty((len(queries), len(vectors)), dtype=np.float32)
    part = np.empty_like(products) if queries.shape[1] > _COLUMNS else products
    for number, columns in enumerate(_column_blocks(queries.shape[1])):
        # Doubling is exact, so −2 may as well be on the smaller matrix.
        np.matmul(queries[:, columns] * np.float32(-2), vectors[:, columns].T, out=part if number else products)
        if number:
            products += part
    products += norms.astype(np.float32)
    return products


def margin(reach: Doubles, dimension: int) -> Doubles:
    """How far `approximate` + ‖q‖² may be from the true square at most, for reach = (‖q‖ + ‖x‖)².

    With u = 2⁻²⁴ and γ_m = m·u / (1 − m·u), a sum of m products in float32 is off by at most γ_m Σ|aᵢbᵢ|, in any
    order and with or without fused operations (Higham, Accuracy and Stability of Numerical Algorithms, 2nd edition,
    section 3.1). Sums here run over at most c = 512 columns, then over the b = ⌈D/c⌉ partial sums:

        q·x by `approximate`     off by at most γ_(c+b) Σ|qᵢxᵢ| ≤ γ_(c+b) ‖q‖‖x‖
        ‖x‖², ‖q‖²               off by at most γ_c of itself, and γ_1 more where ‖x‖² becomes a float32
        the last addition        off by at most γ_1 (‖x‖² + 2‖q‖‖x‖)(1 + γ_(c+b))

    Together at most γ_(c+b+8) (‖q‖² + 2‖q‖‖x‖ + ‖x‖²) = γ_(c+b+8) · reach, so m = c + b + 16 leaves room. Up to
    D = 2¹⁶, m·u ≤ 2⁻¹⁴·1.04, so that 1/(1 − m·u) and what `reach` itself is off by (γ_c) lie far below the factor 1.1,
    and so do the float64 roundings of `squares` and of its square root, which are 2⁻²⁹ of one u. Products below
    float32's normal range lose up to 2⁻¹²⁶ each even where they are flushed to zero: D·2⁻¹²⁴ covers all four sums.
    Vectors that were L2-normalised in float64 and then rounded are each off by u, which moves a square by at most
    2√reach·2u + 4u² ≤ 3u·reach, as reach is 4: four of the eight spare terms.
    """
    columns = min(dimension, _COLUMNS)
    terms = columns + -(-dimension // _COLUMNS) + 16
    error: Doubles = 1.1 * terms * UNIT * reach + dimension * 2.0**-124
    return error


def squares(queries: Floats | Doubles, vectors: Floats | Doubles, query: Numbers, row: Numbers) -> Doubles:
    """(m,) float64 Σ(x−q)² of m pairs of rows of (Q, D) and (n, D).

    The sum is a fold: the upper half of the columns is added to the lower half until one is left. Each step is an
    addition element by element, so IEEE 754 alone decides the result: not BLAS, the processor, numpy's version, or
    how many pairs are measured together.
    """
    dimension = vectors.shape[1]
    result = np.empty(len(query))
    height = max(1, _CACHE // (8 * dimension))
    for start in range(0, len(query), height):
        difference = vectors[row[start : start + height]].astype(np.float64)
        difference -= queries[query[start : start + height]]
        difference *= difference
        width = dimension
        while width > 1:
            half = (width + 1) // 2
            difference[:, : width - half] += difference[:, half:width]
            width = half
        result[start : start + height] = difference[:, 0]
    return result


def _column_blocks(dimension: int) -> Iterator[slice]:
    for start in range(0, dimension, _COLUMNS):
        yield slice(start, min(start + _COLUMNS, dimension))


def not_above(partial: Floats, limit: Doubles) -> NDArray[np.bool_]:
    """(t, n) mask of what does not exceed its query's limit, which is rounded up; not-a-number never exceeds."""
    with np.errstate(over="ignore"):
        rounded = np.nextafter(limit.astype(np.float32), np.float32(np.inf))
    return ~(partial > rounded[:, None])


def by_group(group: NDArray[Any]) -> tuple[Numbers | None, Numbers]:
    """Return an order that puts rows of a group side by side (None: they are), and where each group then starts."""
    changes = np.flatnonzero(np.concatenate([[True], group[1:] != group[:-1]]))
    distinct, codes = np.unique(group, return_inverse=True)
    if len(distinct) == len(changes):
        return None, changes
    order = np.argsort(codes, kind="stable")
    return order, np.flatnonzero(np.diff(codes[order], prepend=-1))


def concatenate(parts: Sequence[Keys]) -> Keys:
    """Concatenate keys; either all parts have groups, or none has."""
    groups = [part.group for part in parts if part.group is not None]
    return Keys(
        np.concatenate([part.image for part in parts]),
        np.concatenate([part.frame for part in parts]),
        np.concatenate(groups) if groups else None,
    )
