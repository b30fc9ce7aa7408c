"""The report of an evaluation reads at a glance, whatever its model is called."""

import pytest

from cbmir_spark.reports import page as reports_page
from tests.support.browser import PAYLOADS, ParsedPage


def evaluation_of(text: str) -> dict[str, object]:
    measures = dict.fromkeys(
        ("precision_at_k", "precision_at_min", "recall_at_k", "average_precision", "reciprocal_rank"), 0.25
    )
    of_class = {"precision": 0.5, "recall": 0.75, "f1": 0.6, "images": 4, "patients": 2}
    macro = {"precision": 0.5, "recall": 0.75, "f1": 0.6, "classes": 1}
    space = {"candidates": 12.0, "share": 0.125, "partitions": 1.5}
    mode = {
        "answered": 3,
        "mean": measures,
        "macro": measures,
        "macro_of_many": dict.fromkeys(measures),
        "space": space,
    }
    return {
        "model_id": text,
        "label": text,
        "snapshot": text,
        "queries": 4,
        "patients": 2,
        "indexed": 96,
        "k": 10,
        "depth": 1000,
        "many": 5,
        "classification": {
            "accuracy": 0.875,
            "macro": macro,
            "macro_of_many": {**macro, "recall": None, "classes": 0},
            "by_class": {text: of_class, "CT/CHEST": of_class},
        },
        "retrieval": {
            "none": {**mode, "circular": "no", "by_class": {"CT/CHEST": measures}},
            "tags": {**mode, "circular": "yes", "by_class": {"CT/CHEST": measures}},
        },
        "notes": [text],
    }


def test_an_evaluation_reads_at_a_glance() -> None:
    page = reports_page.render_evaluation(evaluation_of("alexnet-small-0123"), {"a figure": b"\x89PNG"})
    text = " ".join(ParsedPage(page).text.split())
    for said in ("0.875 accuracy", "0.750 macro recall", "mean over 1 classes", "12.5 %", "3 of 4", "tags circular"):
        assert said in text, said
    # What cannot be computed is a dash, not a zero: no class has five patients, and one was never searched for.
    assert text.count("–") == 1 + 2 + 2
    assert "data:image/png;base64," in page and "none circular" not in text


@pytest.mark.parametrize("payload", PAYLOADS)
def test_an_evaluation_of_a_model_with_a_hostile_name_is_a_page_like_any_other(payload: str) -> None:
    calm = ParsedPage(reports_page.render_evaluation(evaluation_of("m"), {"f": b""}))
    seen = ParsedPage(reports_page.render_evaluation(evaluation_of(payload), {payload: b""}))
    assert (seen.tags, seen.attributes) == (calm.tags, calm.attributes)
    assert seen.text.count(reports_page.visible(payload)) >= 5
