"""Measures of ranking and classification: arrays in, numbers out."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cbmir_spark.config import Prefilter
from cbmir_spark.models.artifact import LabelKind

PRECISION = "precision_at_k"
PRECISION_AT_MIN = "precision_at_min"
RECALL = "recall_at_k"
AVERAGE_PRECISION = "average_precision"
RECIPROCAL_RANK = "reciprocal_rank"
MEASURES = (PRECISION, PRECISION_AT_MIN, RECALL, AVERAGE_PRECISION, RECIPROCAL_RANK)

Figures = dict[str, float | None]


def ranking(found: Sequence[Sequence[int]], relevant: Sequence[int], k: int, depth: int) -> dict[str, NDArray[Any]]:
    """Compute each of MEASURES for each query, float64 (queries,), NaN where there is nothing to find.

    `found` holds the ranks (from 1, rising, of those judged) of a query's relevant hits, `relevant` how many relevant
    images there are to find. Missing hits count as wrong ones. precision_at_min is precision at rank
    min(k, relevant), which a perfect ranking always gives as 1; average precision is cut at `depth` and divided by
    min(depth, relevant).
    """
    figures = {measure: np.full(len(relevant), math.nan) for measure in MEASURES}
    for query, (ranks, total) in enumerate(zip(found, relevant, strict=True)):
        if total < 1:
            continue
        places = np.asarray(ranks, dtype=np.int64)
        within = places[places <= depth]
        cut = min(k, total)
        figures[PRECISION][query] = (places <= k).sum() / k
        figures[PRECISION_AT_MIN][query] = (places <= cut).sum() / cut
        figures[RECALL][query] = (places <= k).sum() / total
        figures[AVERAGE_PRECISION][query] = (np.arange(1, len(within) + 1) / within).sum() / min(depth, total)
        figures[RECIPROCAL_RANK][query] = 1 / within[0] if len(within) else 0.0
    return figures


def mean(values: Mapping[str, NDArray[Any]], where: NDArray[np.bool_] | None = None) -> Figures:
    """Average each measure over the queries that have one; None where none has."""
    chosen = {name: column if where is None else column[where] for name, column in values.items()}
    return {name: float(np.nanmean(column)) if np.isfinite(column).any() else None for name, column in chosen.items()}


def by_label(values: Mapping[str, NDArray[Any]], labels: Sequence[str]) -> dict[str, Figures]:
    """Average over the queries of each label, for labels that have something to find."""
    of = np.asarray(labels)
    means = {str(label): mean(values, of == label) for label in np.unique(of)}
    return {label: figures for label, figures in means.items() if figures[PRECISION] is not None}


def macro(by_class: Mapping[str, Mapping[str, Any]], labels: Sequence[str] | None = None) -> Figures:
    """Average the classes' figures, each class counting once; only those in `labels` if given."""
    chosen = [figures for label, figures in by_class.items() if labels is None or label in labels]
    names = list(next(iter(by_class.values()), {}))
    return {name: float(np.mean([figures[name] for figures in chosen])) if chosen else None for name in names}


def confusion_matrix(pairs: Mapping[tuple[str, str], int], classes: Sequence[str]) -> NDArray[np.int64]:
    """Arrange counts by (true, predicted) label as an int64 (classes, classes) matrix."""
    place = {label: number for number, label in enumerate(classes)}
    counts = np.zeros((len(classes), len(classes)), dtype=np.int64)
    for (true, predicted), count in pairs.items():
        counts[place[true], place[predicted]] += count
    return counts


def circularity(prefilter: Prefilter, label: LabelKind) -> str:
    """Say whether a prefilter uses the label that it is judged by: `yes`, `partly` (its modality) or `no`."""
    if prefilter == "tags":
        return "yes"
    # The predicted class too is chosen among those of the query's modality.
    return "partly" if prefilter in ("modality", "predicted") and label == "modality/body_part" else "no"
