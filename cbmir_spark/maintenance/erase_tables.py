"""Erase rows from the Delta tables of a lake: FEATURES at once, TAGS, PIXELS and SOURCES published together.

Runs on the driver; tasks find the rows. A table without such rows gets no commit.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from pyspark.sql import Row
from pyspark.sql import functions as F
from pyspark.sql.types import StructType

from cbmir_spark.index import layout
from cbmir_spark.lake import columns as cols
from cbmir_spark.lake import delta, publication, schemas
from cbmir_spark.lake.open import OpenLake
from cbmir_spark.lake.publication import Published
from cbmir_spark.maintenance.erase_files import folders_in
from cbmir_spark.maintenance.removal import Mask, Removed, masked


def erase_features(lake: OpenLake, mask: Mask) -> Removed:
    """Delete the masked rows from the FEATURES table of every model; every reader sees it at once."""
    rows_removed = 0
    keys = (cols.MODALITY, cols.BODY_PART, cols.IMAGE_ID, cols.FRAME)
    for path in folders_in(lake.paths.features_root, lake.store):
        if not delta.exists(lake.spark, path):
            continue
        ids = delta.read(lake.spark, path).select(*keys, cols.SERIES_ID, cols.STUDY_ID, cols.PATIENT_ID)
        rows = [tuple(row[key] for key in keys) for row in masked(ids, mask).collect()]
        if rows:
            within = layout.predicate({(modality, body_part) for modality, body_part, *_ in rows}, delta.TARGET)
            schema = StructType([layout.FEATURES.schema[key] for key in keys])
            found = lake.spark.createDataFrame(rows, schema)
            delta.delete_rows(lake.spark, layout.FEATURES, path, found, within)
            rows_removed += len(rows)
    return Removed(rows=rows_removed)


def erase_images(
    lake: OpenLake, pinned: Published, images: Sequence[Row], mask: Mask
) -> tuple[Published, Mapping[str, Removed]]:
    """Delete `images` (image_id, batch) from TAGS and PIXELS, and mark their objects in SOURCES as erased.

    Returns what is published then, and what was removed by table.
    """
    spark, paths = lake.spark, lake.paths
    sources = lake.table(schemas.SOURCES, pinned.sources).rows.select(*schemas.SOURCES.schema.names)
    nothing = dict.fromkeys((cols.DETAIL, cols.IMAGE_ID, cols.DIGEST))
    changed = {cols.OUTCOME: cols.REJECTED, cols.REASON: cols.ERASED, **nothing}
    objects = [tuple({**row.asDict(), **changed}.values()) for row in masked(sources, mask).collect()]
    removed: dict[str, Removed] = {}
    if images:
        batches = sorted({row[cols.BATCH] for row in images})
        ids = spark.createDataFrame([(row[cols.IMAGE_ID],) for row in images], f"{cols.IMAGE_ID} string")
        pixels = lake.table(schemas.PIXELS, pinned.pixels).rows.where(F.col(cols.BATCH).isin(batches))
        frames = masked(pixels.select(cols.IMAGE_ID), mask).count()
        pinned = replace(
            pinned,
            tags=delta.delete_images(spark, paths.path(schemas.TAGS), ids, batches),
            pixels=delta.delete_images(spark, paths.path(schemas.PIXELS), ids, batches),
        )
        removed |= {"tags": Removed(rows=len(images)), "pixels": Removed(rows=frames)}
    if images or objects:
        pinned = publication.publish(spark, paths, spark.createDataFrame(objects, schemas.SOURCES.schema), pinned)
        removed["sources"] = Removed(rows=len(objects))
    return pinned, removed


def tables_of_images(lake: OpenLake) -> list[str]:
    """Paths of all Delta tables that hold rows about images."""
    paths = [lake.paths.path(table) for table in (schemas.TAGS, schemas.PIXELS, schemas.SOURCES, schemas.IDENTITY)]
    paths += folders_in(lake.paths.features_root, lake.store)
    return [path for path in paths if delta.exists(lake.spark, path)]
