"""Figures of classification and ranking: arrays in, numbers out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Depth of the precision of a ranking.
PRECISION_AT = 10
_QUERIES_PER_BLOCK = 256


@dataclass(frozen=True)
class ClassificationFigures:
    """Precision, recall, F1 and images of each class, and their means over the classes that have images."""

    accuracy: float
    macro_precision: float
    macro_recall: float
    macro_f1: float
    by_class: Mapping[str, Mapping[str, float]]


def classification_figures(confusion: NDArray[np.int64], classes: Sequence[str]) -> ClassificationFigures:
    """Judge a (true, predicted) matrix of counts; classes without images do not enter the means."""
    right = np.diag(confusion).astype(float)
    true, predicted = confusion.sum(axis=1).astype(float), confusion.sum(axis=0).astype(float)
    recall = np.divide(right, true, out=np.zeros_like(right), where=true > 0)
    precision = np.divide(right, predicted, out=np.zeros_like(right), where=predicted > 0)
    both = precision + recall
    f1 = np.divide(2 * precision * recall, both, out=np.zeros_like(right), where=both > 0)
    present = true > 0
    return ClassificationFigures(
        accuracy=float(right.sum() / max(true.sum(), 1.0)),
        macro_precision=_mean(precision[present]),
        macro_recall=_mean(recall[present]),
        macro_f1=_mean(f1[present]),
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
class PrecisionRecall:
    """Precision and recall of one class at every threshold of its score, from the strictest to the loosest."""

    precision: NDArray[np.float64]
    recall: NDArray[np.float64]

    @property
    def average_precision(self) -> float:
        """The mean precision, weighted by the recall that each threshold adds."""
        return float(np.sum(np.diff(self.recall, prepend=0.0) * self.precision))


def precision_recall(scores: NDArray[np.float32], targets: NDArray[np.int64]) -> list[PrecisionRecall | None]:
    """Trace a curve for each class of (N, classes) scores and (N,) class numbers; None for a class without images."""
    curves: list[PrecisionRecall | None] = []
    for number in range(scores.shape[1]):
        order = np.argsort(-scores[:, number], kind="stable")
        right = np.cumsum(targets[order] == number)
        if not len(right) or not right[-1]:
            curves.append(None)
            continue
        # Images with equal scores pass a threshold together.
        ends = np.flatnonzero(np.append(np.diff(scores[order, number]) != 0, True))
        curves.append(PrecisionRecall(right[ends] / (ends + 1), right[ends] / right[-1]))
    return curves


@dataclass(frozen=True)
class RankingFigures:
    """Means over queries, and means over classes of the means of their queries.

    The precision is that of the first min(PRECISION_AT, relevant) places, since a class of three images can be ranked
    perfectly too. `without` counts the queries of whose class the gallery has no image; they enter no mean.
    """

    queries: int
    without: int
    precision: float
    macro_precision: float
    mean_average_precision: float
    macro_mean_average_precision: float


def ranking_figures(
    queries: NDArray[np.float32],
    query_labels: Sequence[int] | NDArray[np.int64],
    gallery: NDArray[np.float32],
    gallery_labels: Sequence[int] | NDArray[np.int64],
) -> RankingFigures:
    """Rank all of a (G, D) gallery by Euclidean distance from each of (Q, D) queries, and judge the rankings.

    Equal distances keep the order of the gallery. Average precision is that of the whole ranking.
    """
    wanted, labels = np.asarray(query_labels), np.asarray(gallery_labels)
    answerable = np.isin(wanted, labels)
    precisions, averages = [], []
    squares = np.einsum("nd,nd->n", gallery, gallery, dtype=np.float64)
    for start in range(0, len(queries), _QUERIES_PER_BLOCK):
        chosen = answerable[start : start + _QUERIES_PER_BLOCK]
        block = queries[start : start + _QUERIES_PER_BLOCK][chosen]
        # A query's squared norm is the same for all of its ranking.
        order = np.argsort(squares - 2.0 * (block @ gallery.T), axis=1, kind="stable")
        right = labels[order] == wanted[start : start + _QUERIES_PER_BLOCK][chosen][:, None]
        found = np.cumsum(right, axis=1)
        relevant = found[:, -1]
        depth = np.minimum(PRECISION_AT, relevant)
        precisions.append(found[np.arange(len(block)), depth - 1] / depth)
        places = np.arange(1, len(gallery) + 1)
        averages.append((np.where(right, found / places, 0.0)).sum(axis=1) / relevant)
    precision, average = np.concatenate([np.zeros(0), *precisions]), np.concatenate([np.zeros(0), *averages])
    by_query = wanted[answerable]
    return RankingFigures(
        queries=int(answerable.sum()),
        without=int((~answerable).sum()),
        precision=_mean(precision),
        macro_precision=_macro(precision, by_query),
        mean_average_precision=_mean(average),
        macro_mean_average_precision=_macro(average, by_query),
    )


def _mean(values: NDArray[np.float64]) -> float:
    return float(values.mean()) if len(values) else 0.0


def _macro(values: NDArray[np.float64], labels: NDArray[np.int64]) -> float:
    return _mean(np.array([values[labels == label].mean() for label in np.unique(labels)]))
