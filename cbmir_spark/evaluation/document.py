"""The result of an evaluation: what evaluation.json holds, and the figures, page and metrics made of it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from cbmir_spark.config import PixelsSettings
from cbmir_spark.evaluation.measures import AVERAGE_PRECISION, PRECISION, Figures
from cbmir_spark.models.artifact import LabelKind
from cbmir_spark.reports import page, plots

PAGE, DOCUMENT = "report.html", "evaluation.json"
CONFUSION, BY_CLASS = "confusion_matrix.png", "by_class.png"


@dataclass(frozen=True)
class MacroFigures:
    """Means over classes, each counting once, and the number of classes; None where there is none."""

    precision: float | None
    recall: float | None
    f1: float | None
    classes: int


@dataclass(frozen=True)
class Confusion:
    """Counts by true (rows) and predicted (columns) class."""

    classes: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Classification:
    """Figures of the index's predicted classes; `macro_of_many` counts classes with many patients only."""

    accuracy: float
    macro: MacroFigures
    macro_of_many: MacroFigures
    by_class: Mapping[str, Mapping[str, float]]
    confusion: Confusion


@dataclass(frozen=True)
class SearchSpace:
    """Means over the queries: rows compared, their share of the index, and partitions searched."""

    candidates: float
    share: float
    partitions: float


@dataclass(frozen=True)
class RetrievalFigures:
    """Figures of one prefilter; `circular` is yes, partly or no, see `measures.circularity`."""

    circular: str
    answered: int
    mean: Figures
    macro: Figures
    macro_of_many: Figures
    by_class: Mapping[str, Figures]
    space: SearchSpace


@dataclass(frozen=True)
class Evaluation:
    """Everything that an evaluation measured; its fields are the keys of evaluation.json."""

    model_id: str
    label: LabelKind
    snapshot: str
    queries: int
    patients: int
    test_images: int
    indexed: int
    k: int
    depth: int
    many: int
    classification: Classification
    retrieval: Mapping[str, RetrievalFigures]
    notes: Sequence[str]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"


def notes_on(
    pixels: PixelsSettings, unanswerable: int, queries: int, images: int, single_patient_classes: Sequence[str]
) -> list[str]:
    """Write the notes below the figures: what a hit means here, and what limits the figures."""
    notes = [
        "A hit is relevant when its tags give it the query's class. Rows whose body part is predicted or unknown are "
        "searched too, but they are no ground truth and take no rank.",
        "Predictions are chosen among the classes that the image's modality can have, as in the index.",
        "If a class comes from one scanner or one source, the network may have learned the source instead.",
    ]
    if any(len(set(parts.values())) > 1 for parts in pixels.windows.values()):
        notes.append(
            "Images in absolute units are windowed by the body part that their tags name (pixels.windows): classes "
            "with windows of their own can be told apart by contrast alone, and an untagged image looks different."
        )
    if queries < images:
        notes.append(
            f"{queries:,} of {images:,} test images were searched with, drawn as evenly over the classes as can be."
        )
    if unanswerable:
        notes.append(
            f"{unanswerable:,} queries have nothing to find in other patients; they are in no retrieval figure."
        )
    if single_patient_classes:
        notes.append(f"Classes with a single patient cannot be tested: {', '.join(single_patient_classes)}.")
    return notes


def files_of(evaluation: Evaluation) -> dict[str, bytes]:
    """Render the report's files by name: JSON, HTML page and figures."""
    confusion, by_class = evaluation.classification.confusion, evaluation.classification.by_class
    bars: dict[str, Mapping[str, float | None]] = {"recall": {label: of["recall"] for label, of in by_class.items()}}
    for prefilter in ("none", "predicted"):
        if prefilter in evaluation.retrieval:
            of_class = evaluation.retrieval[prefilter].by_class
            series = f"P@{evaluation.k}, prefilter {prefilter}"
            bars[series] = {label: of[PRECISION] for label, of in of_class.items()}
    matrix = plots.png(plots.confusion_figure(np.array(confusion.counts), confusion.classes))
    bar_chart = plots.png(plots.class_figure(bars, {label: int(of["images"]) for label, of in by_class.items()}))
    captions = {
        "Test images by true and predicted class; the colour is the share of the true class": matrix,
        f"Recall of the class, and precision at {evaluation.k}; test images in brackets": bar_chart,
    }
    return {
        DOCUMENT: evaluation.to_json().encode(),
        PAGE: page.render_evaluation(asdict(evaluation), captions).encode(),
        CONFUSION: matrix,
        BY_CLASS: bar_chart,
    }


def metrics_of(evaluation: Evaluation) -> dict[str, float]:
    """Choose the figures that the model's MLflow run gets."""
    classification = evaluation.classification
    values = {
        "eval_accuracy": classification.accuracy,
        "eval_macro_recall": classification.macro.recall,
        "eval_macro_f1": classification.macro.f1,
        "eval_macro_recall_of_many": classification.macro_of_many.recall,
    }
    for prefilter, figures in evaluation.retrieval.items():
        for name in (PRECISION, AVERAGE_PRECISION):
            values[f"eval_{prefilter}_{name}"] = figures.mean[name]
            values[f"eval_{prefilter}_macro_{name}"] = figures.macro[name]
        values[f"eval_{prefilter}_search_share"] = figures.space.share
    return {name: value for name, value in values.items() if value is not None}
