"""Rule out rows that cannot be among the nearest of a query, by projections alone: arrays in, arrays out. No Spark.

A model's projection (`model.Projection`) gives each vector x K coordinates b = P(x − mean) and the length s of what
they leave over. For two vectors, with Δb = b₁ − b₂ and P's rows orthonormal but for δ = ‖PPᵀ − I‖₂,

    ‖Δb‖² + (s₁ − s₂)² − δ‖Δb‖²  ≤  ‖x₁ − x₂‖²  ≤  ‖Δb‖² + (s₁ + s₂)² + δ‖Δb‖²

since ‖Pᵀ Δb + Δr‖² = Δbᵀ(2I − PPᵀ)Δb + ‖Δr‖² for residual vectors r = (x − mean) − Pᵀb, whatever P is. If at least k
groups have a row whose upper bound is at most U, no row with a lower bound above U is among the k nearest groups. So a
search reads K + 1 numbers of each vector, and whole vectors only of the rows that remain.

Letters as in kernel.py: Q, n, t numbers of queries, rows, queries of one tile.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cbmir_spark.retrieval.kernel import (
    GREATEST,
    UNIT,
    Doubles,
    ExcludedPairs,
    Floats,
    Numbers,
    Texts,
    approximate,
    by_group,
    margin,
    not_above,
    smallest,
    square_norms,
    tiles,
)

# A number of 64 bits for each of some groups, as `codes` makes them.
Codes = NDArray[np.uint64]

# Where more than one pair in so many remains, reading all vectors costs hardly more than measuring those pairs, and
# the pairs are too many for the driver.
USEFUL = 40
# How far, of itself, a value may be out of its place in the order of `by_query`.
_ORDER = 2.0**-31
_ODD = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Points:
    """Projected vectors: (n, K + 1) float32, their coordinates and last the length of their residual."""

    values: Floats

    @staticmethod
    def of(coordinates: Floats, residuals: Doubles) -> "Points":
        """(n, K) float32 coordinates and (n,) float64 lengths of residuals, as FEATURES holds them."""
        return Points(np.column_stack([coordinates, residuals.astype(np.float32)]))


@dataclass(frozen=True)
class Candidates:
    """Pairs that may be results: m queries and rows, bounds of their squared distance, codes of the rows' groups."""

    query: NDArray[np.signedinteger[Any]]
    row: NDArray[np.signedinteger[Any]]
    lower: NDArray[np.floating[Any]]
    upper: NDArray[np.floating[Any]]
    group: Codes | None

    def take(self, places: Numbers | NDArray[np.bool_]) -> "Candidates":
        group = None if self.group is None else self.group[places]
        return Candidates(self.query[places], self.row[places], self.lower[places], self.upper[places], group)

    def packed(self) -> "Candidates":
        """The same in half the bytes: bounds a little wider, and numbers of fewer than 2³¹ queries and rows."""
        with np.errstate(over="ignore"):
            lower = np.nextafter(self.lower.astype(np.float32), np.float32(-np.inf))
            upper = np.nextafter(self.upper.astype(np.float32), np.float32(np.inf))
        return Candidates(self.query.astype(np.int32), self.row.astype(np.int32), lower, upper, self.group)


class Bounds:
    """The pairs of queries and rows that bounds cannot rule out, over all blocks added so far.

    `queries` are projected as the rows are. k: (Q,) groups that each query takes. `defect` is δ above, `budget` bounds
    the bytes of one tile, `most` the pairs that may remain.
    """

    def __init__(self, queries: Points, k: Numbers, defect: float, budget: int, most: int) -> None:
        self._queries = queries.values
        self._squares = square_norms(queries.values)
        self._k = k
        self._defect = defect
        self._budget = budget
        self._most = most
        self._kth = np.full(len(k), np.inf)
        self._remaining: list[Candidates] = []
        self._pruned = 0
        self._pairs = 0
        self.rows_seen = 0
        """Rows added so far, compared or not; the next one gets this number."""
        self.candidates: Numbers = np.zeros(len(k), dtype=np.int64)
        """(Q,) rows that each query was compared with."""
        self.ineffective = False
        """Whether so many pairs remain that comparing whole vectors is cheaper; nothing more is added then."""

    def add(self, rows: Points, group: Codes | None, queries: Numbers, excluded: ExcludedPairs | None) -> None:
        """Compare n rows with some queries (their numbers, sorted); group: (n,) codes of what lists hold only once."""
        first = self.rows_seen
        self.rows_seen += len(rows.values)
        if self.ineffective or not len(rows.values) or not len(queries):
            return
        points, numbers, starts = rows.values, np.arange(len(rows.values)), None
        if group is not None:
            order, starts = by_group(group)
            if order is not None:
                points, numbers, group = points[order], order, group[order]
                excluded = None if excluded is None else excluded.reordered(order)
        norms = square_norms(points)
        for tile in tiles(queries, len(points), self._budget):
            excluded_here = None if excluded is None else excluded.for_tile(tile)
            found = self._within_reach(tile, points, norms, group, starts, excluded_here)
            if found is None or self._too_many(len(found.query)):
                self.ineffective = True
                self._remaining = []
                return
            self._remaining.append(
                Candidates(found.query, first + numbers[found.row], found.lower, found.upper, found.group)
            )
        if sum(len(part.query) for part in self._remaining) > 2 * self._pruned + 1024:
            self._prune()

    def remaining(self) -> Candidates:
        """The pairs that remain, none where bounds are ineffective."""
        if self._remaining:
            self._prune()
            return self._remaining[0]
        nothing = np.empty(0, dtype=np.int64)
        return Candidates(nothing, nothing, nothing.astype(np.float64), nothing.astype(np.float64), None)

    def _within_reach(
        self,
        tile: Numbers,
        points: Floats,
        norms: Doubles,
        group: Codes | None,
        starts: Numbers | None,
        excluded: ExcludedPairs | None,
    ) -> Candidates | None:
        queries, query_squares, k = self._queries[tile], self._squares[tile], self._k[tile]
        reach = (np.sqrt(query_squares) + np.sqrt(norms.max())) ** 2
        if not (reach < GREATEST).all():
            return None
        error = self._error(reach, points.shape[1])
        lower = approximate(queries, points, norms)
        self.candidates[tile] += len(points)
        self._pairs += lower.size
        if excluded is not None:
            masked = excluded.mask(lower)
            self.candidates[tile] -= masked
            self._pairs -= int(masked.sum())
        # (s₁ + s₂)² = (s₁ − s₂)² + 4 s₁s₂.
        spread = 4 * queries[:, -1].astype(np.float64)
        limit = self._kth[tile] + error - query_squares
        near = not_above(lower, limit)
        groups = len(points) if starts is None else len(starts)
        # Finding a k-th smallest costs more than it spares where few rows are near.
        crowded = np.flatnonzero((np.count_nonzero(near, axis=1) > 2 * k + len(points) // 32) & (k <= groups))
        if len(crowded):
            ranked = lower[crowded] + spread[crowded, None].astype(np.float32) * points[:, -1]
            if starts is not None:
                ranked = np.minimum.reduceat(ranked, starts, axis=1)
            # Both sides are off by one error: the upper bound of the k-th group, and the lower bound of the others.
            limit[crowded] = np.minimum(limit[crowded], smallest(ranked, k[crowded]) + 2 * error[crowded])
            near &= not_above(lower, limit)
        if excluded is not None:
            excluded.clear(near)
        query, row = np.divmod(np.flatnonzero(near), len(points))
        low = lower[query, row].astype(np.float64) + query_squares[query]
        high = low + spread[query] * points[row, -1]
        return Candidates(
            tile[query], row, low - error[query], high + error[query], None if group is None else group[row]
        )

    def _error(self, reach: Doubles, columns: int) -> Doubles:
        """How far a bound, as computed, may be from the one above at most, for reach = (‖(b,s)₁‖ + ‖(b,s)₂‖)².

        `kernel.margin` covers the arithmetic. What was stored is off by u of itself (coordinates and residuals were
        made in float64, whose errors are 2⁻²⁰ of one u, and rounded once): that moves a distance by at most √reach·u,
        and its square by less than 3u·reach. δ‖Δb‖² ≤ δ·reach; 2δ allows for P's own rounding when δ was measured.
        """
        return margin(reach, columns) + (3 * UNIT + 2 * self._defect) * reach

    def _too_many(self, further: int) -> bool:
        limit = min(self._most, self._pairs // USEFUL + 8 * int(self._k.sum()))
        if further + sum(len(part.query) for part in self._remaining) > limit and self._remaining:
            self._prune()
        return further + sum(len(part.query) for part in self._remaining) > limit

    def _prune(self) -> None:
        merged, kth = prune(concatenate(self._remaining), self._k)
        self._kth = np.minimum(self._kth, kth)
        self._remaining = [merged]
        self._pruned = len(merged.query)


def concatenate(parts: list[Candidates]) -> Candidates:
    """Concatenate candidates whose rows are numbered alike; either all have groups, or none has."""
    groups = [part.group for part in parts if part.group is not None]
    return Candidates(
        np.concatenate([part.query for part in parts]),
        np.concatenate([part.row for part in parts]),
        np.concatenate([part.lower for part in parts]),
        np.concatenate([part.upper for part in parts]),
        np.concatenate(groups) if groups else None,
    )


def prune(candidates: Candidates, k: Numbers) -> tuple[Candidates, Doubles]:
    """The pairs that are still possible, and for each query, (Q,), what the k-th smallest upper bound over groups does
    not exceed.

    That is infinite where a query has met fewer groups than it takes.
    """
    kth = np.full(len(k), np.inf)
    order = by_query(candidates.query, candidates.upper)
    if candidates.group is not None:
        order = order[_first_of_each(candidates.group[order] + candidates.query[order].astype(np.uint64) * _ODD)]
    query = candidates.query[order]
    begins = np.flatnonzero(np.diff(query, prepend=-1))
    rank = np.arange(len(order)) - np.repeat(begins, np.diff(begins, append=len(order)))
    last = rank == k[query] - 1
    kth[query[last]] = candidates.upper[order[last]].astype(np.float64) * (1 + 2 * _ORDER)
    possible = candidates.lower <= kth[candidates.query]
    return (candidates if possible.all() else candidates.take(possible)), kth


def by_query(query: NDArray[np.signedinteger[Any]], value: NDArray[np.floating[Any]]) -> Numbers:
    """The order of m pairs by query, and within one by a value, to 2⁻³¹ of it; what is below zero counts as zero.

    One key of 64 bits is sorted eight times as fast as two keys are.
    """
    width = 63 - int(query.max(initial=0)).bit_length()
    assert width >= 42, "more than two million queries at a time"
    # Bits of doubles that are not negative are in the order of their values; adding zero takes a zero's sign away.
    bits = (np.maximum(value.astype(np.float64), 0.0) + 0.0).view(np.int64)
    return np.argsort((query.astype(np.int64) << width) | (bits >> (63 - width)))


def codes(texts: Texts) -> Codes:
    """(n,) a number for each text, the same in every task.

    Two texts may have one number. Bounds take two groups for one then, which leaves more pairs and never fewer.
    """
    words = -(-texts.dtype.itemsize // 8)
    found = np.zeros(len(texts), dtype=np.uint64)
    for number, word in enumerate(texts.astype(f"S{8 * words}").view(np.uint64).reshape(len(texts), words).T):
        # What a longer text beside it would add to a text is nothing: words of zeros.
        mixed = word * (_ODD + np.uint64(2 * number))
        mixed ^= mixed >> np.uint64(32)
        found += mixed * _ODD
    return found


def _first_of_each(keys: Codes) -> Numbers:
    """Where each distinct key comes first, in the order of places."""
    order = np.argsort(keys)
    if not len(order):
        return order
    begins = np.flatnonzero(np.concatenate([[True], np.diff(keys[order]) != 0]))
    return np.sort(np.minimum.reduceat(order, begins))
