"""How well a model classifies and retrieves, judged with the images of patients that training never saw.

Queries are the test images of the snapshot the model was trained on; they are searched by retrieval's own `search`, in
the whole index without the query's own patient, once for each prefilter. A hit is relevant when its tags give it the
query's label. What an index row's body part is only by prediction is no ground truth: such hits take no rank.

The driver sees the hits of some queries at a time and keeps the ranks of the relevant: at most
`evaluation.max_queries` × `evaluation.depth` integers. The figures are numpy, after Manning, Raghavan and Schütze,
"Introduction to Information Retrieval" (2008), chapter 8.
"""

import io
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from matplotlib.figure import Figure
from numpy.typing import NDArray
from pyspark.sql import Column, DataFrame, SparkSession, Window
from pyspark.sql import functions as F

from cbmir_spark import dataset, features, fitting, registry, report, search, storage
from cbmir_spark import tables as t
from cbmir_spark.config import Prefilter, Settings
from cbmir_spark.errors import InputError, ModelError
from cbmir_spark.model import LabelKind, Manifest
from cbmir_spark.queries import Query, Status, Wanted, resolve
from cbmir_spark.record import Record

# Classes with fewer patients than this decide nothing; macro figures are also given without them.
MANY_PATIENTS = 5

PAGE, DOCUMENT = "report.html", "evaluation.json"
CONFUSION, BY_CLASS = "confusion_matrix.png", "by_class.png"

PRECISION = "precision_at_k"
PRECISION_AT_MIN = "precision_at_min"
RECALL = "recall_at_k"
AVERAGE_PRECISION = "average_precision"
RECIPROCAL_RANK = "reciprocal_rank"
MEASURES = (PRECISION, PRECISION_AT_MIN, RECALL, AVERAGE_PRECISION, RECIPROCAL_RANK)

Figures = dict[str, float | None]


@dataclass(frozen=True)
class Report:
    """What an evaluation ended in; everything else is in the two files it names."""

    model_id: str
    queries: int
    patients: int
    indexed: int
    classes: int
    accuracy: float
    macro_precision: float
    macro_recall: float
    macro_f1: float
    macro_recall_of_many: float
    by_class: Mapping[str, Mapping[str, float]]
    retrieval: Mapping[str, Mapping[str, float | None]]
    circular: Mapping[str, str]
    document: str
    page: str
    mlflow_run: str | None
    seconds: Mapping[str, float]


# --- figures: arrays in, numbers out ---


def ranking(found: Sequence[Sequence[int]], relevant: Sequence[int], k: int, depth: int) -> dict[str, NDArray[Any]]:
    """Each measure of MEASURES for each query, float64 (queries,), NaN where there is nothing to find.

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
    """Mean of each measure over the queries that have one; None where none has."""
    chosen = {name: column if where is None else column[where] for name, column in values.items()}
    return {name: float(np.nanmean(column)) if np.isfinite(column).any() else None for name, column in chosen.items()}


def by_label(values: Mapping[str, NDArray[Any]], labels: Sequence[str]) -> dict[str, Figures]:
    """Means over the queries of each label, for the labels that have something to find."""
    of = np.asarray(labels)
    means = {str(label): mean(values, of == label) for label in np.unique(of)}
    return {label: figures for label, figures in means.items() if figures[PRECISION] is not None}


def macro(by_class: Mapping[str, Mapping[str, Any]], labels: Sequence[str] | None = None) -> Figures:
    """Means of the classes' figures, each class counting once; of `labels` alone where they are given."""
    chosen = [figures for label, figures in by_class.items() if labels is None or label in labels]
    names = list(next(iter(by_class.values()), {}))
    return {name: float(np.mean([figures[name] for figures in chosen])) if chosen else None for name in names}


def confusion_matrix(pairs: Mapping[tuple[str, str], int], classes: Sequence[str]) -> NDArray[np.int64]:
    """Counts by (true, predicted) label as an int64 (classes, classes) matrix."""
    place = {label: number for number, label in enumerate(classes)}
    counts = np.zeros((len(classes), len(classes)), dtype=np.int64)
    for (true, predicted), count in pairs.items():
        counts[place[true], place[predicted]] += count
    return counts


def circularity(prefilter: Prefilter, label: LabelKind) -> str:
    """Whether a prefilter uses the label that it is judged by: `yes`, `partly` (its modality) or `no`."""
    if prefilter == "tags":
        return "yes"
    # The predicted class too is chosen among those of the query's modality.
    return "partly" if prefilter in ("modality", "predicted") and label == "modality/body_part" else "no"


# --- transforms ---


def label_of(kind: LabelKind) -> Column:
    """The label that an index row's or a hit's own tags give it; null where the body part was predicted or unknown."""
    name: Column = F.col(t.BODY_PART) if kind == "body_part" else F.concat_ws("/", t.MODALITY, t.BODY_PART)
    return F.when(F.col(t.BODY_PART_SOURCE) == t.FROM_TAG, name)


def relevant_ranks(hits: pa.Table, labels: Mapping[str, str], kind: LabelKind) -> dict[str, list[int]]:
    """RESULTS hits by query and rank, and labels by query → ranks of the relevant among the judged, rising."""
    found: dict[str, list[int]] = {}
    judged: Counter[str] = Counter()
    columns = (t.QUERY_ID, t.MODALITY, t.BODY_PART, t.BODY_PART_SOURCE)
    for query, modality, part, source in zip(*(hits.column(name).to_pylist() for name in columns), strict=True):
        if source != t.FROM_TAG:
            continue
        judged[query] += 1
        if labels[query] == (part if kind == "body_part" else f"{modality}/{part}"):
            found.setdefault(query, []).append(judged[query])
    return found


def sample(images: DataFrame, most: int) -> DataFrame:
    """At most `most` of the rows, as evenly over the labels as they allow; the same rows each time."""
    key = F.sha2(F.concat_ws(":", t.IMAGE_ID, t.FRAME), 256)
    turn = F.row_number().over(Window.partitionBy(dataset.LABEL).orderBy("key"))
    return (
        images.withColumn("key", key)
        .withColumn("turn", turn)
        .orderBy("turn", "key")
        .limit(most)
        .select(*images.columns)
    )


# --- figures for people ---


def confusion_figure(counts: NDArray[np.int64], classes: Sequence[str]) -> bytes:
    """The confusion matrix as a PNG: shares of each true class, counts written in."""
    side = max(4.6, 0.4 * len(classes) + 2.2)
    # The object interface: pyplot would look for a display and keep every figure alive.
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    rows = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, rows, out=np.zeros(counts.shape), where=rows > 0)
    axes.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.0)
    axes.set_xticks(range(len(classes)), classes, rotation=90, fontsize=8)
    axes.set_yticks(range(len(classes)), classes, fontsize=8)
    axes.set(xlabel="predicted", ylabel="true")
    axes.tick_params(length=0)
    for edge in axes.spines.values():
        edge.set_visible(False)
    for row, column in zip(*np.nonzero(counts), strict=True):
        colour = "white" if shares[row, column] > 0.55 else "#1b1d1f"
        axes.text(column, row, counts[row, column], ha="center", va="center", fontsize=7, color=colour)
    return _png(figure)


def class_figure(rows: Mapping[str, Mapping[str, float | None]], images: Mapping[str, int]) -> bytes:
    """Bars of each class as a PNG: `rows` gives for each series its figure by class, in 0…1."""
    classes = list(images)
    # Okabe and Ito's colours, and a hatch for those who see none of them.
    styles = [("#0072b2", ""), ("#e69f00", "//"), ("#009e73", ".."), ("#cc79a7", "xx")]
    figure = Figure(figsize=(7.2, max(3.2, (0.16 * len(rows) + 0.18) * len(classes) + 1.3)), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / max(1, len(rows))
    places = np.arange(len(classes))
    for number, ((name, values), (colour, hatch)) in enumerate(zip(rows.items(), styles, strict=False)):
        widths = [values.get(label) or 0.0 for label in classes]
        offset = (number - (len(rows) - 1) / 2) * height
        axes.barh(places + offset, widths, height, color=colour, hatch=hatch, edgecolor="white", label=name)
    axes.set_yticks(places, [f"{label}  ({images[label]})" for label in classes], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.margins(y=0.01)
    axes.grid(axis="x", color="#dfe1e3", linewidth=0.7)
    axes.set_axisbelow(True)
    for edge in ("top", "right", "left"):
        axes.spines[edge].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=3, frameon=False, fontsize=8)
    return _png(figure)


def _png(figure: Figure) -> bytes:
    stream = io.BytesIO()
    # No software version in the file: the same figures give the same bytes.
    figure.savefig(stream, format="png", dpi=130, metadata={"Software": None})
    return stream.getvalue()


# --- the run ---


def run(spark: SparkSession, settings: Settings) -> Report:
    """Judge the model whose index is searched (`retrieval.model`), and write figures, JSON and an HTML page.

    Raises ModelError where the model's training snapshot is not in this lake, InputError where none of its test
    images is in the index.
    """
    record = Record("evaluate")
    lake = t.Lake.of(settings)
    index = features.open_index(spark, settings)
    kind = index.manifest.label
    with record.stage("queries"):
        snapshot = snapshot_of(settings, lake, index.manifest)
        patients_of = _patients_of_class(spark, snapshot)
        tested = _tested(spark, snapshot, index.rows)
        if not tested:
            raise InputError(f"no test image of snapshot {snapshot.digest} is in the index: run `cbmir index` first")
        asked = _asked(spark, snapshot, index.rows, settings.evaluation.max_queries)
        relevant = _relevant(spark, index.rows, asked, kind)
        queries = _resolved(spark, settings, index, asked)
        indexed = index.rows.count()
        base = search.base_of(spark, index, settings.storage)
    results: dict[str, dict[str, Any]] = {}
    many = [label for label, patients in patients_of.items() if patients >= MANY_PATIENTS]
    for prefilter in settings.evaluation.prefilters:
        with record.stage(f"search_{prefilter}"):
            results[prefilter] = _searched(
                spark, settings, index, base, queries, asked, relevant, prefilter, indexed, many
            )
    classified = _classified(tested, snapshot.classes, patients_of, many)
    images = sum(tested.values())
    document: dict[str, Any] = {
        "model_id": index.manifest.model_id,
        "label": kind,
        "snapshot": snapshot.digest,
        "queries": len(asked),
        "patients": int(asked[t.PATIENT_ID].nunique()),
        "test_images": images,
        "indexed": indexed,
        "k": settings.evaluation.k,
        "depth": settings.evaluation.depth,
        "many": MANY_PATIENTS,
        "classification": classified,
        "retrieval": results,
        "notes": _notes(settings, sum(n < 1 for n in relevant), len(asked), images, snapshot.lonely),
    }
    with record.stage("write"):
        out = storage.canonical(settings.evaluation.out or storage.join(lake.uri, "evaluation", record.run_id))
        files = _files(document)
        for name, content in files.items():
            storage.write_bytes(storage.join(out, name), content, settings.storage)
        mlflow_run = registry.log_evaluation(settings, index.manifest.model_id, _metrics(document), files)
    ended = Report(
        model_id=index.manifest.model_id,
        queries=len(asked),
        patients=document["patients"],
        indexed=indexed,
        classes=len(snapshot.classes),
        accuracy=classified["accuracy"],
        macro_precision=classified["macro"]["precision"],
        macro_recall=classified["macro"]["recall"],
        macro_f1=classified["macro"]["f1"],
        macro_recall_of_many=classified["macro_of_many"]["recall"],
        by_class=classified["by_class"],
        retrieval={
            name: {**result["mean"], **{f"macro_{m}": v for m, v in result["macro"].items()}, **result["space"]}
            for name, result in results.items()
        },
        circular={name: result["circular"] for name, result in results.items()},
        document=storage.join(out, DOCUMENT),
        page=storage.join(out, PAGE),
        mlflow_run=mlflow_run,
        seconds=record.seconds,
    )
    record.write(
        spark,
        lake,
        counts={"queries": ended.queries, "patients": ended.patients, "indexed": indexed},
        versions_read={"features": index.version},
    )
    return ended


def snapshot_of(settings: Settings, lake: t.Lake, manifest: Manifest) -> dataset.Snapshot:
    """The snapshot that a model was trained on. Raises ModelError where it is not here, or has no test images."""
    uri = storage.join(lake.snapshots(), manifest.snapshot)
    try:
        text = storage.read_bytes(storage.join(uri, "manifest.json"), settings.storage)
    except OSError:
        raise ModelError(
            f"model {manifest.model_id} was trained on snapshot {manifest.snapshot}, which is not in {lake.uri}: "
            "its test patients are not known here; train a model on this lake"
        ) from None
    snapshot = dataset.Snapshot.from_json(text, uri)
    if not snapshot.rows(dataset.TEST):
        raise ModelError(
            f"snapshot {snapshot.digest} holds no test images: set dataset.test_fraction above 0 and train again"
        )
    return snapshot


def _frames(spark: SparkSession, snapshot: dataset.Snapshot, *splits: str) -> DataFrame:
    """Keys and labels of the snapshot's frames; its pixels are not read."""
    files = [storage.join(snapshot.uri, file.path) for split in splits for file in snapshot.files[split]]
    return spark.read.parquet(*files).select(t.IMAGE_ID, t.FRAME, t.PATIENT_ID, dataset.LABEL)


def _patients_of_class(spark: SparkSession, snapshot: dataset.Snapshot) -> dict[str, int]:
    counted = _frames(spark, snapshot, *dataset.SPLITS).groupBy(dataset.LABEL)
    rows = counted.agg(F.countDistinct(t.PATIENT_ID).alias("patients")).collect()
    return {row[dataset.LABEL]: row["patients"] for row in rows}


def _tested(spark: SparkSession, snapshot: dataset.Snapshot, rows: DataFrame) -> dict[tuple[str, str], int]:
    """Test images in the index by true and predicted class: at most classes² numbers."""
    predicted = rows.select(t.IMAGE_ID, t.FRAME, t.PREDICTED)
    found = _frames(spark, snapshot, dataset.TEST).join(predicted, on=[t.IMAGE_ID, t.FRAME], how="inner")
    counted = found.groupBy(dataset.LABEL, t.PREDICTED).count().collect()
    return {(row[dataset.LABEL], row[t.PREDICTED]): row["count"] for row in counted}


def _asked(spark: SparkSession, snapshot: dataset.Snapshot, rows: DataFrame, most: int) -> pd.DataFrame:
    """The queries: query_id, image_id, frame, patient_id and label of at most `most` test images in the index."""
    keys = rows.select(t.IMAGE_ID, t.FRAME)
    found = _frames(spark, snapshot, dataset.TEST).join(keys, on=[t.IMAGE_ID, t.FRAME], how="inner")
    chosen: pd.DataFrame = sample(found, most).toPandas()
    return chosen.assign(**{t.QUERY_ID: chosen[t.IMAGE_ID] + ":" + chosen[t.FRAME].astype(str)})


def _resolved(spark: SparkSession, settings: Settings, index: features.Index, asked: pd.DataFrame) -> list[Query]:
    """The queries with their vectors, as retrieval takes them from the index."""
    rows = [
        Wanted(query, t.IMAGE_ID, image, int(frame))
        for query, image, frame in zip(asked[t.QUERY_ID], asked[t.IMAGE_ID], asked[t.FRAME], strict=True)
    ]
    resolved = resolve(spark, rows, index, settings)
    if resolved.failed:
        raise InputError(f"{len(resolved.failed)} test images have left the index: run `cbmir evaluate` again")
    return [resolved.queries[row.query_id] for row in rows]


def _relevant(spark: SparkSession, rows: DataFrame, asked: pd.DataFrame, kind: LabelKind) -> list[int]:
    """How many index rows of other patients have each query's label, by their own tags."""
    labelled = rows.select(t.PATIENT_ID, label_of(kind).alias(dataset.LABEL)).where(F.col(dataset.LABEL).isNotNull())
    total = {row[dataset.LABEL]: row["count"] for row in labelled.groupBy(dataset.LABEL).count().collect()}
    patients = spark.createDataFrame(asked[[t.PATIENT_ID]].drop_duplicates())
    of_patients = labelled.join(F.broadcast(patients), on=t.PATIENT_ID, how="inner")
    own = {
        (row[dataset.LABEL], row[t.PATIENT_ID]): row["count"]
        for row in of_patients.groupBy(dataset.LABEL, t.PATIENT_ID).count().collect()
    }
    pairs = zip(asked[dataset.LABEL], asked[t.PATIENT_ID], strict=True)
    return [total.get(label, 0) - own.get((label, patient), 0) for label, patient in pairs]


def _searched(
    spark: SparkSession,
    settings: Settings,
    index: features.Index,
    base: search.Base,
    queries: Sequence[Query],
    asked: pd.DataFrame,
    relevant: Sequence[int],
    prefilter: Prefilter,
    indexed: int,
    many: Sequence[str],
) -> dict[str, Any]:
    """One prefilter: the queries through retrieval's own search, and what came of them."""
    k, depth = settings.evaluation.k, settings.evaluation.depth
    asked_for = {"k": max(k, depth), "prefilter": prefilter, "unique": "none", "exclude_same": "patient"}
    # Without a prefilter everything is searched, which is what the others' search space is measured by.
    whole = {"imputed": "include", "unknown": "include"} if prefilter == "none" else {}
    options = settings.retrieval.model_copy(update=asked_for | whole)
    labels = dict(zip(asked[t.QUERY_ID], asked[dataset.LABEL], strict=True))
    found: dict[str, list[int]] = {}
    statuses: list[Status] = []
    for portion in search.portions(spark, queries, options.k, options):
        answer = search.search(spark, base, portion, options)
        found |= relevant_ranks(answer.hits, labels, index.manifest.label)
        statuses += answer.statuses
    figures = ranking([found.get(query, []) for query in asked[t.QUERY_ID]], relevant, k, depth)
    by_class = by_label(figures, asked[dataset.LABEL].tolist())
    candidates = np.array([status.candidates for status in statuses], dtype=np.float64)
    return {
        "circular": circularity(prefilter, index.manifest.label),
        "answered": sum(status.hits > 0 for status in statuses),
        "mean": mean(figures),
        "macro": macro(by_class),
        "macro_of_many": macro(by_class, many),
        "by_class": by_class,
        "space": {
            "candidates": float(candidates.mean()),
            "share": float(candidates.mean() / indexed),
            "partitions": float(np.mean([len(status.partitions) for status in statuses])),
        },
    }


def _classified(
    tested: Mapping[tuple[str, str], int], classes: Sequence[str], patients_of: Mapping[str, int], many: Sequence[str]
) -> dict[str, Any]:
    """Figures of the stored predictions; a prediction outside the classes is wrong, whatever it says."""
    outside = sorted({predicted for _, predicted in tested} - set(classes))
    counts = confusion_matrix(tested, [*classes, *outside])
    figures = fitting.figures(counts, [*classes, *outside])
    by_class = {
        label: {**figures.by_class[label], "patients": patients_of.get(label, 0)}
        for label in classes
        if figures.by_class[label]["images"]
    }
    shown = {label: {name: of[name] for name in ("precision", "recall", "f1")} for label, of in by_class.items()}
    return {
        "accuracy": figures.accuracy,
        "macro": {**macro(shown), "classes": len(shown)},
        "macro_of_many": {**macro(shown, many), "classes": len(set(shown) & set(many))},
        "by_class": by_class,
        "confusion": {"classes": [*classes, *outside], "counts": counts.tolist()},
    }


def _notes(settings: Settings, unanswerable: int, queries: int, images: int, lonely: Sequence[str]) -> list[str]:
    notes = [
        "A hit is relevant when its own tags give it the query's class. Rows whose body part is only predicted, or not "
        "known, are searched too, but they are no ground truth and take no rank.",
        "Predictions are chosen among the classes that the image's modality can have, as they are in the index.",
        "If a class comes from one scanner or one source, the network may have learned the source instead.",
    ]
    if any(len(set(parts.values())) > 1 for parts in settings.pixels.windows.values()):
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
    if lonely:
        notes.append(f"Classes with a single patient cannot be tested: {', '.join(lonely)}.")
    return notes


def _files(document: Mapping[str, Any]) -> dict[str, bytes]:
    """The report's files by name."""
    confusion, by_class = document["classification"]["confusion"], document["classification"]["by_class"]
    bars = {"recall": {label: of["recall"] for label, of in by_class.items()}}
    for mode in ("none", "predicted"):
        if mode in document["retrieval"]:
            of_class = document["retrieval"][mode]["by_class"]
            bars[f"P@{document['k']}, prefilter {mode}"] = {label: of[PRECISION] for label, of in of_class.items()}
    matrix = confusion_figure(np.array(confusion["counts"]), confusion["classes"])
    bar_chart = class_figure(bars, {label: of["images"] for label, of in by_class.items()})
    captions = {
        "Test images by true and predicted class; the colour is the share of the true class": matrix,
        f"Recall of the class, and precision at {document['k']}; test images in brackets": bar_chart,
    }
    return {
        DOCUMENT: (json.dumps(document, indent=2) + "\n").encode(),
        PAGE: report.render_evaluation(document, captions).encode(),
        CONFUSION: matrix,
        BY_CLASS: bar_chart,
    }


def _metrics(document: Mapping[str, Any]) -> dict[str, float]:
    """The figures that the model's MLflow run gets."""
    classified = document["classification"]
    values = {
        "eval_accuracy": classified["accuracy"],
        "eval_macro_recall": classified["macro"]["recall"],
        "eval_macro_f1": classified["macro"]["f1"],
        "eval_macro_recall_of_many": classified["macro_of_many"]["recall"],
    }
    for mode, result in document["retrieval"].items():
        for name in (PRECISION, AVERAGE_PRECISION):
            values[f"eval_{mode}_{name}"] = result["mean"][name]
            values[f"eval_{mode}_macro_{name}"] = result["macro"][name]
        values[f"eval_{mode}_search_share"] = result["space"]["share"]
    return {name: value for name, value in values.items() if value is not None}
