"""Figures of classification and ranking: arrays in, numbers out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Figures:
    """Precision, recall, F1 and images of each class, and their means over the classes that have images."""

    accuracy: float
    macro_precision: float
    macro_recall: float
    macro_f1: float
    by_class: Mapping[str, Mapping[str, float]]


def figures(confusion: NDArray[np.int64], classes: Sequence[str]) -> Figures:
    """Figures of a (true, predicted) confusion matrix of counts; classes without images are left out of the means."""
    right = np.diag(confusion).astype(float)
    true, predicted = confusion.sum(axis=1).astype(float), confusion.sum(axis=0).astype(float)
    recall = np.divide(right, true, out=np.zeros_like(right), where=true > 0)
    precision = np.divide(right, predicted, out=np.zeros_like(right), where=predicted > 0)
    both = precision + recall
    f1 = np.divide(2 * precision * recall, both, out=np.zeros_like(right), where=both > 0)
    there = true > 0
    return Figures(
        accuracy=float(right.sum() / max(true.sum(), 1.0)),
        macro_precision=float(precision[there].mean()) if there.any() else 0.0,
        macro_recall=float(recall[there].mean()) if there.any() else 0.0,
        macro_f1=float(f1[there].mean()) if there.any() else 0.0,
        by_class={
            name: {
                "precision": float(precision[i]),
                "recall": float(recall[i]),
                "f1": float(f1[i]),
                "images": int(true[i]),
            }
            for i, name in enumerate(classes)
        },
    )


@dataclass(frozen=True)
class Curve:
    """Precision and recall of one class at every threshold of its score, from the strictest to the loosest."""

    precision: NDArray[np.float64]
    recall: NDArray[np.float64]

    @property
    def average_precision(self) -> float:
        """The mean of the precision over the recall that each threshold adds."""
        return float(np.sum(np.diff(self.recall, prepend=0.0) * self.precision))


def precision_recall(scores: NDArray[np.float32], targets: NDArray[np.int64]) -> list[Curve | None]:
    """A curve for each class of (N, classes) scores; None for a class without a picture."""
    curves: list[Curve | None] = []
    for number in range(scores.shape[1]):
        order = np.argsort(-scores[:, number], kind="stable")
        right = np.cumsum(targets[order] == number)
        if not len(right) or not right[-1]:
            curves.append(None)
            continue
        # Of pictures with one score none is above the threshold without the others.
        ends = np.flatnonzero(np.append(np.diff(scores[order, number]) != 0, True))
        curves.append(Curve(right[ends] / (ends + 1), right[ends] / right[-1]))
    return curves


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
