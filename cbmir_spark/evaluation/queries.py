"""The queries of an evaluation: test images of the model's snapshot in the index, and what they should find."""

from collections import Counter
from collections.abc import Mapping

import pandas as pd
import pyarrow as pa
from pyspark.sql import Column, DataFrame, SparkSession, Window
from pyspark.sql import functions as F

from cbmir_spark import storage
from cbmir_spark.errors import InputError, ModelError
from cbmir_spark.index.open import Index
from cbmir_spark.lake import columns as cols
from cbmir_spark.lake.open import OpenLake
from cbmir_spark.models.artifact import LabelKind, Manifest
from cbmir_spark.retrieval.query import Query, QueryRow
from cbmir_spark.retrieval.resolve import look_up
from cbmir_spark.training.manifest import LABEL, MANIFEST, SPLITS, TEST, Snapshot


def snapshot_of(lake: OpenLake, manifest: Manifest) -> Snapshot:
    """Load the snapshot that a model was trained on. Raises ModelError where it is not here, or has no test images."""
    uri = lake.paths.snapshot(manifest.snapshot)
    try:
        text = lake.store.read_bytes(storage.join(uri, MANIFEST))
    except OSError:
        raise ModelError(
            f"model {manifest.model_id} was trained on snapshot {manifest.snapshot}, which is not in {lake.paths.uri}: "
            "its test patients are unknown; train a model on this lake"
        ) from None
    snapshot = Snapshot.from_json(text, uri)
    if not snapshot.rows(TEST):
        raise ModelError(
            f"snapshot {snapshot.digest} holds no test images: set dataset.test_fraction above 0 and train again"
        )
    return snapshot


def label_of(kind: LabelKind) -> Column:
    """Label rows by their tags; null where the body part was predicted or is unknown."""
    name: Column = F.col(cols.BODY_PART) if kind == "body_part" else F.concat_ws("/", cols.MODALITY, cols.BODY_PART)
    return F.when(F.col(cols.BODY_PART_SOURCE) == cols.FROM_TAG, name)


def relevant_ranks(hits: pa.Table, labels: Mapping[str, str], kind: LabelKind) -> dict[str, list[int]]:
    """Rank the relevant hits of each query among the judged ones, rising; hits are RESULTS by query and rank."""
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
    """Sample at most `most` rows, as evenly over the labels as possible; the same rows each time."""
    key = F.sha2(F.concat_ws(":", cols.IMAGE_ID, cols.FRAME), 256)
    turn = F.row_number().over(Window.partitionBy(LABEL).orderBy("key"))
    return (
        images.withColumn("key", key)
        .withColumn("turn", turn)
        .orderBy("turn", "key")
        .limit(most)
        .select(*images.columns)
    )


def _frames(spark: SparkSession, snapshot: Snapshot, *splits: str) -> DataFrame:
    """Read keys and labels of the snapshot's frames, not their pixels."""
    files = [storage.join(snapshot.uri, file.path) for split in splits for file in snapshot.files[split]]
    return spark.read.parquet(*files).select(cols.IMAGE_ID, cols.FRAME, cols.PATIENT_ID, LABEL)


def patients_of_class(spark: SparkSession, snapshot: Snapshot) -> dict[str, int]:
    counted = _frames(spark, snapshot, *SPLITS).groupBy(LABEL)
    rows = counted.agg(F.countDistinct(cols.PATIENT_ID).alias("patients")).collect()
    return {row[LABEL]: row["patients"] for row in rows}


def predictions(spark: SparkSession, snapshot: Snapshot, rows: DataFrame) -> dict[tuple[str, str], int]:
    """Count test images in the index by true and predicted class."""
    predicted = rows.select(cols.IMAGE_ID, cols.FRAME, cols.PREDICTED)
    found = _frames(spark, snapshot, TEST).join(predicted, on=[cols.IMAGE_ID, cols.FRAME], how="inner")
    counted = found.groupBy(LABEL, cols.PREDICTED).count().collect()
    return {(row[LABEL], row[cols.PREDICTED]): row["count"] for row in counted}


def choose_queries(spark: SparkSession, snapshot: Snapshot, rows: DataFrame, most: int) -> pd.DataFrame:
    """Choose at most `most` test images in the index: query_id, image_id, frame, patient_id and label."""
    keys = rows.select(cols.IMAGE_ID, cols.FRAME)
    found = _frames(spark, snapshot, TEST).join(keys, on=[cols.IMAGE_ID, cols.FRAME], how="inner")
    chosen: pd.DataFrame = sample(found, most).toPandas()
    return chosen.assign(**{cols.QUERY_ID: chosen[cols.IMAGE_ID] + ":" + chosen[cols.FRAME].astype(str)})


def resolved(lake: OpenLake, index: Index, asked: pd.DataFrame) -> list[Query]:
    """Fetch the queries' vectors from the index, as retrieval does."""
    rows = [
        QueryRow(query, cols.IMAGE_ID, image, int(frame))
        for query, image, frame in zip(asked[cols.QUERY_ID], asked[cols.IMAGE_ID], asked[cols.FRAME], strict=True)
    ]
    found = look_up(lake, rows, index)
    if found.failed:
        raise InputError(f"{len(found.failed)} test images have left the index: run `cbmir evaluate` again")
    return [found.queries[row.query_id] for row in rows]


def relevant_counts(spark: SparkSession, rows: DataFrame, asked: pd.DataFrame, kind: LabelKind) -> list[int]:
    """Count the index rows of other patients that have each query's label, by their tags."""
    labelled = rows.select(cols.PATIENT_ID, label_of(kind).alias(LABEL)).where(F.col(LABEL).isNotNull())
    total = {row[LABEL]: row["count"] for row in labelled.groupBy(LABEL).count().collect()}
    patients = spark.createDataFrame(asked[[cols.PATIENT_ID]].drop_duplicates())
    of_patients = labelled.join(F.broadcast(patients), on=cols.PATIENT_ID, how="inner")
    same_patient = {
        (row[LABEL], row[cols.PATIENT_ID]): row["count"]
        for row in of_patients.groupBy(LABEL, cols.PATIENT_ID).count().collect()
    }
    pairs = zip(asked[LABEL], asked[cols.PATIENT_ID], strict=True)
    return [total.get(label, 0) - same_patient.get((label, patient), 0) for label, patient in pairs]
