"""Figures of a ranking, against one worked by hand and one by the definitions."""

import numpy as np
import pytest

from cbmir_spark.training.metrics import PRECISION_AT, ranking_figures


def test_a_ranking_worked_by_hand() -> None:
    gallery = np.array([[0.0], [1.0], [2.0], [3.0], [9.0]], dtype=np.float32)
    labels = [0, 1, 0, 0, 1]
    # Right, wrong, right, right, wrong; then for the other one: right, wrong, wrong, right, wrong.
    found = ranking_figures(np.array([[-1.0], [9.5], [0.0]], dtype=np.float32), [0, 1, 7], gallery, labels)
    first, second = (1 + 2 / 3 + 3 / 4) / 3, (1 + 2 / 4) / 2
    assert (found.queries, found.without) == (2, 1)
    assert found.mean_average_precision == pytest.approx((first + second) / 2)
    # Of three relevant ones two are among the first three, of two one among the first two.
    assert found.precision == pytest.approx((2 / 3 + 1 / 2) / 2) == pytest.approx(found.macro_precision)


def test_many_random_rankings_against_the_definitions() -> None:
    chance = np.random.default_rng(4)
    gallery, queries = (chance.normal(size=(n, 6)).astype(np.float32) for n in (300, 600))
    gallery_labels, asked = chance.integers(0, 5, 300), chance.integers(0, 5, 600)
    averages, precisions = [], []
    for query, label in zip(queries, asked, strict=True):
        right = gallery_labels[np.argsort(((gallery.astype(float) - query) ** 2).sum(1), kind="stable")] == label
        hits = np.flatnonzero(right)
        averages.append(np.mean([(i + 1) / (place + 1) for i, place in enumerate(hits)]))
        precisions.append(right[: min(PRECISION_AT, len(hits))].mean())
    found = ranking_figures(queries, asked, gallery, gallery_labels)
    assert found.mean_average_precision == pytest.approx(np.mean(averages))
    assert found.precision == pytest.approx(np.mean(precisions))
    by_class = [np.mean([a for a, other in zip(averages, asked, strict=True) if other == label]) for label in range(5)]
    assert found.macro_mean_average_precision == pytest.approx(np.mean(by_class))


def test_nothing_to_rank_is_no_division_by_nothing() -> None:
    none, two = np.zeros((0, 3), dtype=np.float32), np.ones((2, 3), dtype=np.float32)
    assert ranking_figures(none, [], two, [0, 1]).mean_average_precision == 0.0
    assert ranking_figures(two, [5, 5], two, [0, 1]).without == 2
