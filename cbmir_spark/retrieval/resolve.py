"""Rows of a query list → queries with vectors: from the index, from files, or as given. Runs on the driver.

A row that cannot be resolved becomes a status; it never costs the other rows theirs.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from pyspark.sql import functions as F

from cbmir_spark.dicom.vocabulary_tables import UNKNOWN
from cbmir_spark.index import arrays, layout
from cbmir_spark.index.layout import Place
from cbmir_spark.index.open import Index
from cbmir_spark.lake import columns as cols
from cbmir_spark.lake.open import OpenLake
from cbmir_spark.retrieval.answer import Resolved
from cbmir_spark.retrieval.query import Query, QueryRow, QueryStatus, Status
from cbmir_spark.retrieval.query_files import Reader, middle, read_files
from cbmir_spark.retrieval.query_list import SOP_INSTANCE_UID


def resolve(lake: OpenLake, rows: Sequence[QueryRow], index: Index, reader: Callable[[], Reader]) -> Resolved:
    """Resolve rows that name images by id, UID or file, or bring a vector.

    The index is asked for what it holds. A `uri` is read, decoded and embedded in tasks by what `reader` returns, which
    is called only if there is one.
    """
    resolved = Resolved.nothing()
    given = [row for row in rows if row.vector is not None]
    named = [row for row in rows if row.vector is None and row.naming != cols.URI]
    files = [row for row in rows if row.naming == cols.URI]
    if given:
        resolved = resolved.merge(_given(given))
    if named:
        resolved = resolved.merge(look_up(lake, named, index))
    if files:
        resolved = resolved.merge(read_files(lake, files, index, reader()))
    return resolved


def _given(rows: Sequence[QueryRow]) -> Resolved:
    """Take the vectors that rows bring; nothing else is known about them."""
    queries = {
        row.query_id: Query(query_id=row.query_id, vector=row.vector, overrides=row.overrides)
        for row in rows
        if row.vector is not None
    }
    return Resolved(queries, {}, {})


def look_up(lake: OpenLake, rows: Sequence[QueryRow], index: Index) -> Resolved:
    """Look up images of the index by image_id or SOP Instance UID."""
    names = lake.names if any(row.naming == SOP_INSTANCE_UID for row in rows) else None
    image_of = {
        row.query_id: names.image(row.value) if names is not None and row.naming == SOP_INSTANCE_UID else row.value
        for row in rows
    }
    images = lake.spark.createDataFrame([(i,) for i in sorted(set(image_of.values()))], f"{cols.IMAGE_ID} string")
    # Keys first, a sixtieth of the bytes: they say which frame, and so which partitions hold the vectors.
    keys = (
        index.rows.select(cols.IMAGE_ID, cols.FRAME, cols.MODALITY, cols.BODY_PART)
        .join(F.broadcast(images), on=cols.IMAGE_ID, how="left_semi")
        .collect()
    )
    frames: dict[str, dict[int, Place]] = {}
    for key in keys:
        frames.setdefault(key[cols.IMAGE_ID], {})[key[cols.FRAME]] = (key[cols.MODALITY], key[cols.BODY_PART])
    found: dict[str, tuple[str, int]] = {}
    failed: dict[str, Status] = {}
    for row in rows:
        indexed = frames.get(image_of[row.query_id], {})
        frame = middle(sorted(indexed)) if row.frame is None else row.frame
        if frame is None or frame not in indexed:
            reason = f"the image is not in the index of {index.manifest.model_id}"
            if indexed:
                reason = (
                    f"frame {frame} is not indexed; the image has {len(indexed)}, from {min(indexed)} to {max(indexed)}"
                )
            failed[row.query_id] = Status(row.query_id, QueryStatus.NOT_FOUND, reason)
        else:
            found[row.query_id] = (image_of[row.query_id], frame)
    vectors = _fetch(lake, index, set(found.values()), {frames[image][frame] for image, frame in found.values()})
    overrides = {row.query_id: row.overrides for row in rows}
    queries = {name: replace(vectors[key], query_id=name, overrides=overrides[name]) for name, key in found.items()}
    return Resolved(queries, failed, {})


def _fetch(
    lake: OpenLake, index: Index, keys: set[tuple[str, int]], places: set[Place]
) -> dict[tuple[str, int], Query]:
    if not keys:
        return {}
    chosen = lake.spark.createDataFrame(sorted(keys), f"{cols.IMAGE_ID} string, {cols.FRAME} int")
    columns = (
        cols.IMAGE_ID,
        cols.FRAME,
        cols.VECTOR,
        cols.PREDICTED,
        cols.PROBABILITY,
        cols.BODY_PART_SOURCE,
        cols.MODALITY,
        cols.BODY_PART,
    )
    ids = (cols.SERIES_ID, cols.STUDY_ID, cols.PATIENT_ID)
    rows = layout.scan(index.rows, places).select(*columns, *ids)
    table = rows.join(F.broadcast(chosen), on=[cols.IMAGE_ID, cols.FRAME], how="left_semi").toArrow()
    found = {}
    for batch in table.to_batches():
        vectors = arrays.vectors_of(batch, index.manifest.embedding_dim)
        others = batch.select([name for name in batch.schema.names if name != cols.VECTOR])
        for vector, row in zip(vectors, others.to_pylist(), strict=True):
            # An imputed body part is no tag: the query then goes by its predicted class.
            tagged = row.pop(cols.BODY_PART_SOURCE) == cols.FROM_TAG
            part = row.pop(cols.BODY_PART)
            query = Query(query_id="", vector=vector, body_part=part if tagged else UNKNOWN, **row)
            found[row[cols.IMAGE_ID], row[cols.FRAME]] = query
    return found
