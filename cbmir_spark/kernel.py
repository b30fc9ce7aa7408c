"""Exact nearest neighbours among blocks of vectors: numpy arrays in, numpy arrays out. No Spark; runs per task.

A matrix product gives every squared distance ‖x‖² − 2q·x + ‖q‖² approximately, with an error that is bounded, not
guessed (see `margin`). Rows that the bound cannot rule out are measured again by the direct difference Σ(x−q)² in
float64, summed in an order that depends on the dimension alone (see `squares`). So what comes out is what brute force
in float64 gives, bit for bit, however the rows were cut into blocks and tasks.

Letters: q a query, x a row, D the dimension, Q, n, t numbers of queries, rows, queries of one tile.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Numbers = NDArray[np.int64]
Texts = NDArray[np.bytes_]

# Half the distance from 1 to the next float32: the greatest relative error of one rounding.
_UNIT = 2.0**-24
# Sums are taken over this many columns at a time, and the bound grows with that number instead of with D.
_COLUMNS = 512
_MOST_COLUMNS = 2**16
# Up to here (and with it every partial sum) a square stays below float32's greatest value, 2^128.
_GREATEST = 2.0**125
# Bytes of float64 differences measured at a time, so that they stay in the processor's cache.
_CACHE = 2**21


@dataclass(frozen=True)
class Keys:
    """What identifies n rows: `image` and `frame` break ties, `group` is what a hit list holds only once.

    image: (n,) bytes in the order that ties follow. frame: (n,) int64. group: (n,) bytes, or None where every row
    may be a hit of its own.
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
class Nearest:
    """m results in the order of query, distance, image, frame; `row` counts all rows that were ever added."""

    query: Numbers
    distance: Doubles
    row: Numbers


class Search:
    """The k nearest groups of each query, each by its nearest row, over all blocks added so far.

    queries: (Q, D) float32, finite. `budget` bounds the bytes of one tile of approximate distances. Memory besides
    is proportional to Q × k.
    """

    def __init__(self, queries: Floats, k: int, budget: int) -> None:
        if k < 1:
            raise ValueError(f"k is {k}; it has to be at least 1")
        if queries.shape[1] > _MOST_COLUMNS:
            raise ValueError(f"vectors of {queries.shape[1]} columns; the error bound holds up to {_MOST_COLUMNS}")
        self._queries = queries
        self._squares = square_norms(queries)
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

    def add(self, vectors: Floats, keys: Keys, queries: Numbers | None = None, excluded: Pairs | None = None) -> None:
        """Compare n rows, (n, D) float32, with some queries (their numbers, sorted; None: all).

        `excluded` names pairs that must not meet, each once; its rows are numbered within this block.
        """
        first = self.rows_seen
        self.rows_seen += len(vectors)
        wanted = np.arange(len(self._queries)) if queries is None else queries
        if not len(vectors) or not len(wanted):
            return
        numbers = np.arange(len(vectors))
        starts = None
        if keys.group is not None:
            order, starts = _by_group(keys.group)
            if order is not None:
                numbers, vectors, keys = order, vectors[order], keys.take(order)
                if excluded is not None:
                    place = np.empty_like(order)
                    place[order] = np.arange(len(order))
                    excluded = Pairs(excluded.query, place[excluded.row])
        norms = square_norms(vectors)
        found_queries, found_rows = [], []
        for tile in self._tiles(wanted, len(vectors)):
            pairs = self._near(tile, vectors, norms, starts, excluded)
            found_queries.append(pairs.query)
            found_rows.append(pairs.row)
        query, row = np.concatenate(found_queries), np.concatenate(found_rows)
        square = squares(self._queries, vectors, query, row)
        self._keep(query, square, first + numbers[row], keys.take(row))

    def results(self) -> Nearest:
        """The nearest groups of each query among all rows added."""
        if len(self._query):
            self._settle()
        return Nearest(self._query, np.sqrt(self._square), self._row)

    def _tiles(self, wanted: Numbers, rows: int) -> Iterator[Numbers]:
        # Per pair: two float32 of the product, one more where rows are ranked, and a mask.
        height = max(1, self._budget // (rows * 16))
        for start in range(0, len(wanted), height):
            yield wanted[start : start + height]

    def _near(
        self, tile: Numbers, vectors: Floats, norms: Doubles, starts: Numbers | None, excluded: Pairs | None
    ) -> Pairs:
        """Pairs of the tile's queries and the rows that may be among their k nearest groups."""
        whole = len(tile) == len(self._queries)
        queries = self._queries if whole else self._queries[tile]
        own = self._squares[tile]
        reach = (np.sqrt(own) + np.sqrt(norms.max())) ** 2
        # Where squares may overflow nothing is ruled out; everything is measured directly.
        safe = reach < _GREATEST
        error = margin(reach, vectors.shape[1])
        with np.errstate(over="ignore", invalid="ignore"):
            # Without ‖q‖², which is the same for all rows of a query: limits are moved by it instead.
            partial = approximate(queries, vectors, norms)
        apart = _within(tile, excluded)
        self.candidates[tile] += len(vectors)
        if apart is not None:
            np.subtract.at(self.candidates, tile[apart.query], 1)
            partial[apart.query, apart.row] = np.inf
        limit = np.full(len(tile), np.inf)
        limit[safe] = (self._kth[tile] + error)[safe] - own[safe]
        near = _not_above(partial, limit)
        if apart is not None:
            near[apart.query, apart.row] = False
        crowded = np.flatnonzero(safe & (np.count_nonzero(near, axis=1) > self._k))
        groups = len(vectors) if starts is None else len(starts)
        if len(crowded) and groups >= self._k:
            ranked = partial if len(crowded) == len(tile) else partial[crowded]
            if starts is not None:
                ranked = np.minimum.reduceat(ranked, starts, axis=1)
            # The true square of the k-th group is at most this much over its approximation, and any row that
            # beats it at most as much below its own.
            kth = np.partition(ranked, self._k - 1, axis=1)[:, self._k - 1].astype(np.float64)
            limit[crowded] = np.minimum(limit[crowded], kth + 2 * error[crowded])
            near &= _not_above(partial, limit)
        rows_of = np.nonzero(near)
        return Pairs(tile[rows_of[0]], rows_of[1])

    def _keep(self, query: Numbers, square: Doubles, row: Numbers, keys: Keys) -> None:
        self._query = np.concatenate([self._query, query])
        self._square = np.concatenate([self._square, square])
        self._row = np.concatenate([self._row, row])
        self._keys = keys if self._keys is None else _joined(self._keys, keys)
        # Sorting everything for each handful of new pairs would cost more than the pairs that it spares.
        if len(self._query) > self._counted + self._counted // 8:
            self._settle()

    def _settle(self) -> None:
        """Keep the k nearest groups of each query, and note the square of the k-th."""
        assert self._keys is not None
        keys = self._keys
        _, image_rank = np.unique(keys.image, return_inverse=True)
        order = np.lexsort((keys.frame, image_rank, np.sqrt(self._square), self._query))
        if keys.group is not None:
            _, group_rank = np.unique(keys.group, return_inverse=True)
            pair = self._query[order] * (group_rank.max() + 1) + group_rank[order]
            _, nearest_of_group = np.unique(pair, return_index=True)
            order = order[np.sort(nearest_of_group)]
        query = self._query[order]
        begins = np.flatnonzero(np.diff(query, prepend=-1))
        counts = np.diff(begins, append=len(query))
        rank = np.arange(len(query)) - np.repeat(begins, counts)
        order = order[rank < self._k]
        self._query, self._square, self._row = self._query[order], self._square[order], self._row[order]
        self._keys = keys.take(order)
        self._counted = len(order)
        full = begins[counts >= self._k]
        last = np.flatnonzero(rank[rank < self._k] == self._k - 1)
        self._kth[query[full]] = self._square[last]


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
    """
    columns = min(dimension, _COLUMNS)
    terms = columns + -(-dimension // _COLUMNS) + 16
    error: Doubles = 1.1 * terms * _UNIT * reach + dimension * 2.0**-124
    return error


def squares(queries: Floats, vectors: Floats, query: Numbers, row: Numbers) -> Doubles:
    """(m,) float64 Σ(x−q)² of m pairs of rows of (Q, D) and (n, D) float32.

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


def _not_above(partial: Floats, limit: Doubles) -> NDArray[np.bool_]:
    """(t, n) mask of what does not exceed its query's limit, which is rounded up; not-a-number never exceeds."""
    with np.errstate(over="ignore"):
        rounded = np.nextafter(limit.astype(np.float32), np.float32(np.inf))
    return ~(partial > rounded[:, None])


def _by_group(group: Texts) -> tuple[Numbers | None, Numbers]:
    """An order that puts rows of a group side by side (None: they are), and where each group then starts."""
    changes = np.flatnonzero(np.concatenate([[True], group[1:] != group[:-1]]))
    distinct, codes = np.unique(group, return_inverse=True)
    if len(distinct) == len(changes):
        return None, changes
    order = np.argsort(codes, kind="stable")
    return order, np.flatnonzero(np.diff(codes[order], prepend=-1))


def _within(tile: Numbers, excluded: Pairs | None) -> Pairs | None:
    """The excluded pairs whose query is in the tile, numbered within it."""
    if excluded is None or not len(excluded.query):
        return None
    place = np.minimum(np.searchsorted(tile, excluded.query), len(tile) - 1)
    inside = tile[place] == excluded.query
    return Pairs(place[inside], excluded.row[inside]) if inside.any() else None


def _joined(one: Keys, other: Keys) -> Keys:
    group = None if one.group is None or other.group is None else np.concatenate([one.group, other.group])
    return Keys(np.concatenate([one.image, other.image]), np.concatenate([one.frame, other.frame]), group)
