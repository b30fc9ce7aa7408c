"""How well vectors rank: precision at k and mean average precision of labelled pictures among labelled pictures.

numpy alone and in one process, for a split that fits into memory; `evaluation` measures what retrieval answers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

K = 10
_QUERIES_AT_A_TIME = 256


@dataclass(frozen=True)
class RankingFigures:
    """Means over queries, and means over the classes of the queries' means.

    Precision at min(K, relevant): a class of three pictures can be ranked perfectly too. Queries of whose class the
    gallery has no picture say nothing and are counted in `without`.
    """

    queries: int
    without: int
    precision: float
    macro_precision: float
    mean_average_precision: float
    macro_mean_average_precision: float


def rank(
    queries: NDArray[np.float32],
    query_labels: Sequence[int] | NDArray[np.int64],
    gallery: NDArray[np.float32],
    gallery_labels: Sequence[int] | NDArray[np.int64],
) -> RankingFigures:
    """Figures of (Q, D) queries that are each ranked against all of a (G, D) gallery by Euclidean distance.

    Equal distances keep the order of the gallery. Averages are over the whole ranking.
    """
    asked, held = np.asarray(query_labels), np.asarray(gallery_labels)
    there = np.isin(asked, held)
    precisions, averages = [], []
    squares = np.einsum("nd,nd->n", gallery, gallery, dtype=np.float64)
    for start in range(0, len(queries), _QUERIES_AT_A_TIME):
        chosen = there[start : start + _QUERIES_AT_A_TIME]
        block = queries[start : start + _QUERIES_AT_A_TIME][chosen]
        # The square of the query's own length is the same for the whole of its ranking.
        order = np.argsort(squares - 2.0 * (block @ gallery.T), axis=1, kind="stable")
        right = held[order] == asked[start : start + _QUERIES_AT_A_TIME][chosen][:, None]
        found = np.cumsum(right, axis=1)
        relevant = found[:, -1]
        depth = np.minimum(K, relevant)
        precisions.append(found[np.arange(len(block)), depth - 1] / depth)
        places = np.arange(1, len(gallery) + 1)
        averages.append((np.where(right, found / places, 0.0)).sum(axis=1) / relevant)
    precision, average = np.concatenate([np.zeros(0), *precisions]), np.concatenate([np.zeros(0), *averages])
    labels = asked[there]
    return RankingFigures(
        queries=int(there.sum()),
        without=int((~there).sum()),
        precision=_mean(precision),
        macro_precision=_macro(precision, labels),
        mean_average_precision=_mean(average),
        macro_mean_average_precision=_macro(average, labels),
    )


def _mean(values: NDArray[np.float64]) -> float:
    return float(values.mean()) if len(values) else 0.0


def _macro(values: NDArray[np.float64], labels: NDArray[np.int64]) -> float:
    return _mean(np.array([values[labels == label].mean() for label in np.unique(labels)]))
