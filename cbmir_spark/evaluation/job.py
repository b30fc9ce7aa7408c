"""How well a model classifies and retrieves, judged with the images of patients that training never saw.

Queries are the test images of the snapshot the model was trained on; they are searched by retrieval's own `search`, in
the whole index without the query's own patient, once for each prefilter. A hit is relevant when its tags give it the
query's label. What an index row's body part is only by prediction is no ground truth: such hits take no rank.

The driver sees the hits of some queries at a time and keeps the ranks of the relevant: at most
`evaluation.max_queries` × `evaluation.depth` integers. The figures are numpy, after Manning, Raghavan and Schütze,
"Introduction to Information Retrieval" (2008), chapter 8.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from pyspark.sql import Column, DataFrame, SparkSession, Window
from pyspark.sql import functions as F

from cbmir_spark import storage
from cbmir_spark.config import Prefilter, Settings
from cbmir_spark.errors import InputError, ModelError
from cbmir_spark.evaluation.measures import (
    AVERAGE_PRECISION,
    PRECISION,
    by_label,
    circularity,
    confusion_matrix,
    macro,
    mean,
    ranking,
)
from cbmir_spark.index import open as index_open
from cbmir_spark.index.open import Index
from cbmir_spark.lake import columns as cols
from cbmir_spark.lake.paths import LakePaths
from cbmir_spark.lake.runs import Record
from cbmir_spark.models import registry
from cbmir_spark.models.artifact import LabelKind, Manifest
from cbmir_spark.reports import page as reports_page
from cbmir_spark.reports.plots import class_figure, confusion_figure
from cbmir_spark.retrieval import search
from cbmir_spark.retrieval.query import Query, Status, Wanted
from cbmir_spark.retrieval.resolve import resolve
from cbmir_spark.storage import ObjectStore
from cbmir_spark.training import metrics
from cbmir_spark.training.manifest import LABEL, SPLITS, TEST, Snapshot

# Classes with fewer patients than this decide nothing; macro figures are also given without them.
MANY_PATIENTS = 5

PAGE, DOCUMENT = "report.html", "evaluation.json"
CONFUSION, BY_CLASS = "confusion_matrix.png", "by_class.png"


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


# --- transforms ---


def label_of(kind: LabelKind) -> Column:
    """The label that an index row's or a hit's own tags give it; null where the body part was predicted or unknown."""
    name: Column = F.col(cols.BODY_PART) if kind == "body_part" else F.concat_ws("/", cols.MODALITY, cols.BODY_PART)
    return F.when(F.col(cols.BODY_PART_SOURCE) == cols.FROM_TAG, name)


def relevant_ranks(hits: pa.Table, labels: Mapping[str, str], kind: LabelKind) -> dict[str, list[int]]:
    """RESULTS hits by query and rank, and labels by query → ranks of the relevant among the judged, rising."""
    found: dict[str, list[int]] = {}
    judged: Counter[str] = Counter()
    columns = (cols.QUERY_ID, cols.MODALITY, cols.BODY_PART, cols.BODY_PART_SOURCE)
    for query, modality, part, source in zip(*(hits.column(name).to_pylist() for name in columns), strict=True):
        if source != cols.FROM_TAG:
            continue
        judged[query] += 1
        if labels[query] == (part if kind == "body_part" else f"{modality}/{part}"):
            found.setdefault(query, []).append(judged[query])
    return found


def sample(images: DataFrame, most: int) -> DataFrame:
    """At most `most` of the rows, as evenly over the labels as they allow; the same rows each time."""
    key = F.sha2(F.concat_ws(":", cols.IMAGE_ID, cols.FRAME), 256)
    turn = F.row_number().over(Window.partitionBy(LABEL).orderBy("key"))
    return (
        images.withColumn("key", key)
        .withColumn("turn", turn)
        .orderBy("turn", "key")
        .limit(most)
        .select(*images.columns)
    )


# --- the run ---


def run(spark: SparkSession, settings: Settings) -> Report:
    """Judge the model whose index is searched (`retrieval.model`), and write figures, JSON and an HTML page.

    Raises ModelError where the model's training snapshot is not in this lake, InputError where none of its test
    images is in the index.
    """
    record = Record("evaluate")
    lake = LakePaths.of(settings.lake)
    index = index_open.open_index(spark, settings)
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
        base = search.base_of(spark, index, ObjectStore(settings.storage))
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
        "patients": int(asked[cols.PATIENT_ID].nunique()),
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
            ObjectStore(settings.storage).write_bytes(storage.join(out, name), content)
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


def snapshot_of(settings: Settings, lake: LakePaths, manifest: Manifest) -> Snapshot:
    """The snapshot that a model was trained on. Raises ModelError where it is not here, or has no test images."""
    uri = storage.join(lake.snapshots, manifest.snapshot)
    try:
        text = ObjectStore(settings.storage).read_bytes(storage.join(uri, "manifest.json"))
    except OSError:
        raise ModelError(
            f"model {manifest.model_id} was trained on snapshot {manifest.snapshot}, which is not in {lake.uri}: "
            "its test patients are not known here; train a model on this lake"
        ) from None
    snapshot = Snapshot.from_json(text, uri)
    if not snapshot.rows(TEST):
        raise ModelError(
            f"snapshot {snapshot.digest} holds no test images: set dataset.test_fraction above 0 and train again"
        )
    return snapshot


def _frames(spark: SparkSession, snapshot: Snapshot, *splits: str) -> DataFrame:
    """Keys and labels of the snapshot's frames; its pixels are not read."""
    files = [storage.join(snapshot.uri, file.path) for split in splits for file in snapshot.files[split]]
    return spark.read.parquet(*files).select(cols.IMAGE_ID, cols.FRAME, cols.PATIENT_ID, LABEL)


def _patients_of_class(spark: SparkSession, snapshot: Snapshot) -> dict[str, int]:
    counted = _frames(spark, snapshot, *SPLITS).groupBy(LABEL)
    rows = counted.agg(F.countDistinct(cols.PATIENT_ID).alias("patients")).collect()
    return {row[LABEL]: row["patients"] for row in rows}


def _tested(spark: SparkSession, snapshot: Snapshot, rows: DataFrame) -> dict[tuple[str, str], int]:
    """Test images in the index by true and predicted class: at most classes² numbers."""
    predicted = rows.select(cols.IMAGE_ID, cols.FRAME, cols.PREDICTED)
    found = _frames(spark, snapshot, TEST).join(predicted, on=[cols.IMAGE_ID, cols.FRAME], how="inner")
    counted = found.groupBy(LABEL, cols.PREDICTED).count().collect()
    return {(row[LABEL], row[cols.PREDICTED]): row["count"] for row in counted}


def _asked(spark: SparkSession, snapshot: Snapshot, rows: DataFrame, most: int) -> pd.DataFrame:
    """The queries: query_id, image_id, frame, patient_id and label of at most `most` test images in the index."""
    keys = rows.select(cols.IMAGE_ID, cols.FRAME)
    found = _frames(spark, snapshot, TEST).join(keys, on=[cols.IMAGE_ID, cols.FRAME], how="inner")
    chosen: pd.DataFrame = sample(found, most).toPandas()
    return chosen.assign(**{cols.QUERY_ID: chosen[cols.IMAGE_ID] + ":" + chosen[cols.FRAME].astype(str)})


def _resolved(spark: SparkSession, settings: Settings, index: Index, asked: pd.DataFrame) -> list[Query]:
    """The queries with their vectors, as retrieval takes them from the index."""
    rows = [
        Wanted(query, cols.IMAGE_ID, image, int(frame))
        for query, image, frame in zip(asked[cols.QUERY_ID], asked[cols.IMAGE_ID], asked[cols.FRAME], strict=True)
    ]
    resolved = resolve(spark, rows, index, settings)
    if resolved.failed:
        raise InputError(f"{len(resolved.failed)} test images have left the index: run `cbmir evaluate` again")
    return [resolved.queries[row.query_id] for row in rows]


def _relevant(spark: SparkSession, rows: DataFrame, asked: pd.DataFrame, kind: LabelKind) -> list[int]:
    """How many index rows of other patients have each query's label, by their own tags."""
    labelled = rows.select(cols.PATIENT_ID, label_of(kind).alias(LABEL)).where(F.col(LABEL).isNotNull())
    total = {row[LABEL]: row["count"] for row in labelled.groupBy(LABEL).count().collect()}
    patients = spark.createDataFrame(asked[[cols.PATIENT_ID]].drop_duplicates())
    of_patients = labelled.join(F.broadcast(patients), on=cols.PATIENT_ID, how="inner")
    own = {
        (row[LABEL], row[cols.PATIENT_ID]): row["count"]
        for row in of_patients.groupBy(LABEL, cols.PATIENT_ID).count().collect()
    }
    pairs = zip(asked[LABEL], asked[cols.PATIENT_ID], strict=True)
    return [total.get(label, 0) - own.get((label, patient), 0) for label, patient in pairs]


def _searched(
    spark: SparkSession,
    settings: Settings,
    index: Index,
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
    options = settings.retrieval.replace(**asked_for, **whole)
    labels = dict(zip(asked[cols.QUERY_ID], asked[LABEL], strict=True))
    found: dict[str, list[int]] = {}
    statuses: list[Status] = []
    for portion in search.portions(spark, queries, options.k, options):
        answer = search.search(spark, base, portion, options)
        found |= relevant_ranks(answer.hits, labels, index.manifest.label)
        statuses += answer.statuses
    figures = ranking([found.get(query, []) for query in asked[cols.QUERY_ID]], relevant, k, depth)
    by_class = by_label(figures, asked[LABEL].tolist())
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
    figures = metrics.figures(counts, [*classes, *outside])
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
        PAGE: reports_page.render_evaluation(document, captions).encode(),
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
