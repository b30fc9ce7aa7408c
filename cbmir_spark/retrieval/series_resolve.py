"""Rows of a query list → query series and their volumes. Runs on the driver; volumes are built in tasks."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pyspark.sql import functions as F

from cbmir_spark.config import RetrievalSettings
from cbmir_spark.dicom.vocabulary_tables import UNKNOWN
from cbmir_spark.index.open import Index
from cbmir_spark.lake import columns as cols
from cbmir_spark.lake import schemas
from cbmir_spark.lake.open import OpenLake
from cbmir_spark.retrieval.answer import Base, Resolved
from cbmir_spark.retrieval.query import Query, QueryOverrides, QueryRow, QueryStatus, Status
from cbmir_spark.retrieval.query_list import SERIES_INSTANCE_UID, SOP_INSTANCE_UID
from cbmir_spark.retrieval.series import describe
from cbmir_spark.retrieval.series_tasks import Key, Volume


def resolve_series(
    lake: OpenLake, rows: Sequence[QueryRow], index: Index, base: Base, options: RetrievalSettings
) -> tuple[Resolved, Mapping[str, Volume]]:
    """Resolve rows that name a series, or any image of one; return the queries and their volumes by query_id.

    A query is the volume that the image is in, or the largest one of a named series. Its vector is the descriptor;
    image, frame and predicted class are those of its middle frame.
    """
    if not rows:
        return Resolved.nothing(), {}
    uids = {SOP_INSTANCE_UID, SERIES_INSTANCE_UID}
    names = lake.names if any(row.naming in uids for row in rows) else None
    named: dict[str, tuple[str, str]] = {}
    for row in rows:
        kind = "series" if row.naming in (cols.SERIES_ID, SERIES_INSTANCE_UID) else "image"
        value = names.of_kind(kind, row.value) if names is not None and row.naming in uids else row.value
        named[row.query_id] = (schemas.OWNERS[kind], value)
    frames = _frames(index, set(named.values()))
    by_name: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for frame in frames:
        for column in (cols.SERIES_ID, cols.IMAGE_ID):
            by_name.setdefault((column, frame[column]), []).append(frame)
    volume_of = {name: _largest(by_name[name]) for name in set(named.values()) if name in by_name}
    found = describe(lake.spark, base, frozenset(volume_of.values()), options)
    overrides = {row.query_id: row.overrides for row in rows}
    queries, volumes, failed = {}, {}, {}
    for query_id, name in named.items():
        if name not in volume_of:
            what = "series" if name[0] == cols.SERIES_ID else "image"
            reason = f"the {what} is not in the index of {index.manifest.model_id}"
            failed[query_id] = Status(query_id, QueryStatus.NOT_FOUND, reason)
            continue
        key = volume_of[name]
        volumes[query_id], vector = found[key]
        queries[query_id] = _query(query_id, key, by_name[cols.SERIES_ID, key[1]], vector, overrides[query_id])
    return Resolved(queries, failed, {}), volumes


_OF_FRAME = (
    cols.IMAGE_ID,
    cols.FRAME,
    cols.SERIES_ID,
    cols.STUDY_ID,
    cols.PATIENT_ID,
    cols.PREDICTED,
    cols.PROBABILITY,
    cols.BODY_PART_SOURCE,
    cols.MODALITY,
    cols.BODY_PART,
)


def _frames(index: Index, named: set[tuple[str, str]]) -> list[dict[str, Any]]:
    """Read the keys of all frames of the series that are named, or that have a named image; without vectors."""
    spark = index.rows.sparkSession
    rows = index.rows.select(*_OF_FRAME)
    series = {value for column, value in named if column == cols.SERIES_ID}
    images = [(value,) for column, value in sorted(named) if column == cols.IMAGE_ID]
    if images:
        wanted = F.broadcast(spark.createDataFrame(images, f"{cols.IMAGE_ID} string"))
        found = rows.join(wanted, on=cols.IMAGE_ID, how="left_semi").select(cols.SERIES_ID).distinct().collect()
        series |= {row[cols.SERIES_ID] for row in found}
    if not series:
        return []
    wanted = F.broadcast(spark.createDataFrame([(each,) for each in sorted(series)], f"{cols.SERIES_ID} string"))
    return [row.asDict() for row in rows.join(wanted, on=cols.SERIES_ID, how="left_semi").collect()]


def _key(frame: Mapping[str, Any]) -> Key:
    return (frame[cols.MODALITY], frame[cols.BODY_PART]), frame[cols.SERIES_ID]


def _largest(frames: Iterable[Mapping[str, Any]]) -> Key:
    """Find the volume that holds most of the frames; of equals the first by name."""
    counts: dict[Key, int] = {}
    for frame in frames:
        counts[_key(frame)] = counts.get(_key(frame), 0) + 1
    return min(counts, key=lambda key: (-counts[key], key))


def _query(
    query_id: str, key: Key, frames: Sequence[Mapping[str, Any]], vector: NDArray[np.float32], overrides: QueryOverrides
) -> Query:
    inside = sorted((f for f in frames if _key(f) == key), key=lambda frame: (frame[cols.IMAGE_ID], frame[cols.FRAME]))
    middle = inside[len(inside) // 2]
    same = {name: middle[name] for name in (cols.IMAGE_ID, cols.SERIES_ID, cols.STUDY_ID, cols.PATIENT_ID, cols.FRAME)}
    # An imputed body part is no tag: the query then goes by its predicted class.
    tagged = middle[cols.BODY_PART_SOURCE] == cols.FROM_TAG
    return Query(
        query_id=query_id,
        vector=vector,
        modality=middle[cols.MODALITY],
        body_part=middle[cols.BODY_PART] if tagged else UNKNOWN,
        predicted=middle[cols.PREDICTED],
        probability=middle[cols.PROBABILITY],
        overrides=overrides,
        **same,
    )
