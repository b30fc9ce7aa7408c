"""The evaluate job: how well a model classifies and retrieves images of patients that training never saw.

Queries are test images of the snapshot that the model was trained on; retrieval's `search` searches the whole index
for them without the query's patient, once per prefilter. A hit is relevant when its tags give it the query's label. A
predicted body part is no ground truth: hits with one take no rank.

The driver sees the hits of one batch of queries at a time and keeps the ranks of the relevant ones: at most
`evaluation.max_queries` × `evaluation.depth` integers. The measures are those of Manning, Raghavan and Schütze,
"Introduction to Information Retrieval" (2008), chapter 8.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd
from pyspark.sql import SparkSession

from cbmir_spark import storage
from cbmir_spark.config import Prefilter, RetrievalSettings, Settings
from cbmir_spark.errors import InputError
from cbmir_spark.evaluation import queries as test_queries
from cbmir_spark.evaluation.document import (
    DOCUMENT,
    PAGE,
    Classification,
    Confusion,
    Evaluation,
    MacroFigures,
    RetrievalFigures,
    SearchSpace,
    files_of,
    metrics_of,
    notes_on,
)
from cbmir_spark.evaluation.measures import by_label, circularity, confusion_matrix, macro, mean, ranking
from cbmir_spark.index.open import open_index
from cbmir_spark.lake import columns as cols
from cbmir_spark.lake.open import OpenLake, open_lake
from cbmir_spark.lake.runs import Record
from cbmir_spark.models.artifact import LabelKind
from cbmir_spark.models.registry import Registry
from cbmir_spark.retrieval.answer import Base, base_of, batches
from cbmir_spark.retrieval.query import Query, Status
from cbmir_spark.retrieval.search import search
from cbmir_spark.training import metrics
from cbmir_spark.training.manifest import LABEL

# Classes with fewer patients decide nothing; macro figures are also given without them.
MANY_PATIENTS = 5


@dataclass(frozen=True)
class Report:
    """The main figures of an evaluation; everything else is in the two files that it names."""

    model_id: str
    queries: int
    patients: int
    indexed: int
    classes: int
    accuracy: float
    macro_precision: float | None
    macro_recall: float | None
    macro_f1: float | None
    macro_recall_of_many: float | None
    by_class: Mapping[str, Mapping[str, float]]
    retrieval: Mapping[str, Mapping[str, float | None]]
    circular: Mapping[str, str]
    document: str
    page: str
    mlflow_run: str | None
    seconds: Mapping[str, float]


@dataclass(frozen=True)
class _Asked:
    """The queries with what is needed to judge their hits.

    `rows` has query_id, patient_id and label; `relevant` (queries,) the relevant rows there are; `indexed` the rows of
    the index; `many` the classes with MANY_PATIENTS or more.
    """

    rows: pd.DataFrame
    queries: Sequence[Query]
    relevant: Sequence[int]
    label: LabelKind
    indexed: int
    many: Sequence[str]


def run(spark: SparkSession, settings: Settings) -> Report:
    """Evaluate the model whose index `retrieval.model` names; write figures, JSON and an HTML page.

    Raises ModelError where the model's training snapshot is not in this lake, InputError where none of its test
    images is in the index.
    """
    record = Record.begin("evaluate")
    lake = open_lake(spark, settings)
    index = open_index(lake, Registry(settings.mlflow, lake.paths.uri, lake.store), settings.retrieval.model)
    kind = index.manifest.label
    with record.stage("queries"):
        snapshot = test_queries.snapshot_of(lake, index.manifest)
        patients_of = test_queries.patients_of_class(spark, snapshot)
        tested = test_queries.predictions(spark, snapshot, index.rows)
        if not tested:
            raise InputError(f"no test image of snapshot {snapshot.digest} is in the index: run `cbmir index` first")
        rows = test_queries.choose_queries(spark, snapshot, index.rows, settings.evaluation.max_queries)
        asked = _Asked(
            rows=rows,
            queries=test_queries.resolved(lake, index, rows),
            relevant=test_queries.relevant_counts(spark, index.rows, rows, kind),
            label=kind,
            indexed=index.rows.count(),
            many=[label for label, patients in patients_of.items() if patients >= MANY_PATIENTS],
        )
        base = base_of(index, lake.store)
    k, depth = settings.evaluation.k, settings.evaluation.depth
    results: dict[str, RetrievalFigures] = {}
    for prefilter in settings.evaluation.prefilters:
        with record.stage(f"search_{prefilter}"):
            results[prefilter] = _searched(lake, base, asked, _options(settings, prefilter), k, depth)
    images = sum(tested.values())
    unanswerable = sum(count < 1 for count in asked.relevant)
    evaluation = Evaluation(
        model_id=index.manifest.model_id,
        label=kind,
        snapshot=snapshot.digest,
        queries=len(rows),
        patients=int(rows[cols.PATIENT_ID].nunique()),
        test_images=images,
        indexed=asked.indexed,
        k=k,
        depth=depth,
        many=MANY_PATIENTS,
        classification=_classified(tested, snapshot.classes, patients_of, asked.many),
        retrieval=results,
        notes=notes_on(settings.pixels, unanswerable, len(rows), images, snapshot.single_patient_classes),
    )
    with record.stage("write"):
        given = settings.evaluation.out
        out = storage.canonical(given) if given else lake.paths.evaluation(record.run_id)
        files = files_of(evaluation)
        for name, content in files.items():
            lake.store.write_bytes(storage.join(out, name), content)
        registry = Registry(settings.mlflow, lake.paths.uri, lake.store)
        mlflow_run = registry.log_evaluation(index.manifest.model_id, metrics_of(evaluation), files)
    report = _report(evaluation, len(snapshot.classes), out, mlflow_run, record.seconds)
    record.write(
        spark,
        lake.paths,
        counts={"queries": report.queries, "patients": report.patients, "indexed": asked.indexed},
        versions_read={"features": index.version},
    )
    return report


def _options(settings: Settings, prefilter: Prefilter) -> RetrievalSettings:
    """Set up a search that judges: all ranks, every row, no hit of the query's patient."""
    asked_for = {
        "k": max(settings.evaluation.k, settings.evaluation.depth),
        "prefilter": prefilter,
        "unique": "none",
        "exclude_same": "patient",
    }
    # Without a prefilter everything is searched; the others' search space is measured by that.
    whole = {"imputed": "include", "unknown": "include"} if prefilter == "none" else {}
    return settings.retrieval.replace(**asked_for, **whole)


def _searched(
    lake: OpenLake, base: Base, asked: _Asked, options: RetrievalSettings, k: int, depth: int
) -> RetrievalFigures:
    """Search for the queries with one prefilter, and judge the hits."""
    labels = dict(zip(asked.rows[cols.QUERY_ID], asked.rows[LABEL], strict=True))
    found: dict[str, list[int]] = {}
    statuses: list[Status] = []
    for batch in batches(lake.spark, asked.queries, options.k, options):
        answer = search(lake.spark, base, batch, options)
        found |= test_queries.relevant_ranks(answer.hits, labels, asked.label)
        statuses += answer.statuses
    ranks = [found.get(query, []) for query in asked.rows[cols.QUERY_ID]]
    figures = ranking(ranks, asked.relevant, k, depth)
    by_class = by_label(figures, asked.rows[LABEL].tolist())
    candidates = np.array([status.candidates for status in statuses], dtype=np.float64)
    return RetrievalFigures(
        circular=circularity(options.prefilter, asked.label),
        answered=sum(status.hits > 0 for status in statuses),
        mean=mean(figures),
        macro=macro(by_class),
        macro_of_many=macro(by_class, asked.many),
        by_class=by_class,
        space=SearchSpace(
            candidates=float(candidates.mean()),
            share=float(candidates.mean() / asked.indexed),
            partitions=float(np.mean([len(status.partitions) for status in statuses])),
        ),
    )


def _classified(
    tested: Mapping[tuple[str, str], int], classes: Sequence[str], patients_of: Mapping[str, int], many: Sequence[str]
) -> Classification:
    """Judge the stored predictions; a prediction outside the classes is wrong, whatever it says."""
    outside = sorted({predicted for _, predicted in tested} - set(classes))
    counts = confusion_matrix(tested, [*classes, *outside])
    figures = metrics.classification_figures(counts, [*classes, *outside])
    by_class = {
        label: {**figures.by_class[label], "patients": patients_of.get(label, 0)}
        for label in classes
        if figures.by_class[label]["images"]
    }
    shown = {label: {name: of[name] for name in ("precision", "recall", "f1")} for label, of in by_class.items()}
    return Classification(
        accuracy=figures.accuracy,
        macro=MacroFigures(**macro(shown), classes=len(shown)),
        macro_of_many=MacroFigures(**macro(shown, many), classes=len(set(shown) & set(many))),
        by_class=by_class,
        confusion=Confusion((*classes, *outside), tuple(tuple(row) for row in counts.tolist())),
    )


def _report(
    evaluation: Evaluation, classes: int, out: str, mlflow_run: str | None, seconds: Mapping[str, float]
) -> Report:
    classification = evaluation.classification
    return Report(
        model_id=evaluation.model_id,
        queries=evaluation.queries,
        patients=evaluation.patients,
        indexed=evaluation.indexed,
        classes=classes,
        accuracy=classification.accuracy,
        macro_precision=classification.macro.precision,
        macro_recall=classification.macro.recall,
        macro_f1=classification.macro.f1,
        macro_recall_of_many=classification.macro_of_many.recall,
        by_class=classification.by_class,
        retrieval={
            name: {**of.mean, **{f"macro_{m}": value for m, value in of.macro.items()}, **asdict(of.space)}
            for name, of in evaluation.retrieval.items()
        },
        circular={name: of.circular for name, of in evaluation.retrieval.items()},
        document=storage.join(out, DOCUMENT),
        page=storage.join(out, PAGE),
        mlflow_run=mlflow_run,
        seconds=seconds,
    )
