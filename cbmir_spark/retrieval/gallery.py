"""Write the gallery of an answer: read what it shows from the results and the lake. Runs on the driver."""

from collections.abc import Iterable, Mapping, Sequence

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from cbmir_spark import storage
from cbmir_spark.config import Choice
from cbmir_spark.dicom import burned_in
from cbmir_spark.lake import columns as cols
from cbmir_spark.lake import schemas
from cbmir_spark.lake.conform import add_missing_columns
from cbmir_spark.lake.open import OpenLake
from cbmir_spark.reports.gallery import Picture, ShownQuery, render_gallery, rows_of

GALLERY_FILE = "gallery.html"

# Hits shown of each query; the rest are in the results. It also bounds what the driver collects: 64 KB a picture.
SHOWN_HITS = 12


def write_gallery(
    lake: OpenLake, results: str, queries: Sequence[ShownQuery], limit: int, choice: Choice, facts: Mapping[str, object]
) -> str:
    """Write the page of `read_gallery` as `gallery.html` into the folder `results`; its URI."""
    page = read_gallery(lake, results, queries, limit, choice, facts)
    target = storage.join(results, GALLERY_FILE)
    lake.store.write_bytes(target, page.encode("utf-8"))
    return target


def read_gallery(
    lake: OpenLake, results: str, queries: Sequence[ShownQuery], limit: int, choice: Choice, facts: Mapping[str, object]
) -> str:
    """Make the gallery of the hits and statuses in folder `results` (canonical URI): one HTML document.

    The first `limit` queries by id are shown, each with at most SHOWN_HITS hits: so many rows and pictures come to the
    driver, however long the list is. `choice` is `privacy.burned_in`; `facts` are lines for the page's head.
    """
    all_statuses = lake.spark.read.schema(schemas.RESULTS_STATUSES.schema).parquet(
        storage.join(results, schemas.RESULTS_STATUSES.name)
    )
    statuses = [row.asDict() for row in all_statuses.orderBy(cols.QUERY_ID).limit(limit).collect()]
    shown = {status[cols.QUERY_ID] for status in statuses}
    all_hits = lake.spark.read.schema(schemas.RESULTS_HITS.schema).parquet(
        storage.join(results, schemas.RESULTS_HITS.name)
    )
    wanted = F.col(cols.QUERY_ID).isin(*shown) & (F.col(cols.RANK) <= SHOWN_HITS)
    hits = [row.asDict() for row in all_hits.where(wanted).collect()] if shown else []
    queries = [query for query in queries if query.query_id in shown]
    frames = {(hit[cols.IMAGE_ID], hit[cols.FRAME]) for hit in hits}
    frames |= {(q.image_id, q.frame) for q in queries if q.image_id is not None and q.pixels is None}
    rows = rows_of(statuses, hits, queries, pictures_of(lake, frames, choice), choice)
    return render_gallery(rows, all_statuses.count(), facts)


def pictures_of(lake: OpenLake, frames: Iterable[tuple[str, int]], choice: Choice) -> dict[tuple[str, int], Picture]:
    """Read tags and pixels of frames, by image_id and frame; those that the lake no longer holds are left out.

    Pixels that may carry burned-in text are not even read if `choice` excludes them. TAGS first: it says which batches
    of PIXELS to open.
    """
    keys = sorted(set(frames))
    if not keys:
        return {}
    images = lake.spark.createDataFrame(
        [(key,) for key in sorted({image for image, _ in keys})], f"{cols.IMAGE_ID} string"
    )
    columns = (
        cols.IMAGE_ID,
        cols.BATCH,
        cols.TEXT_RISK,
        cols.MODALITY,
        cols.BODY_PART,
        cols.SEX,
        cols.AGE_YEARS,
        cols.YEAR,
    )
    tags = {
        row[cols.IMAGE_ID]: row.asDict()
        for row in add_missing_columns(lake.tags, schemas.TAGS)
        .join(F.broadcast(images), on=cols.IMAGE_ID, how="inner")
        .select(*columns)
        .collect()
    }
    shown = [key for key in keys if key[0] in tags and burned_in.allowed(tags[key[0]][cols.TEXT_RISK], choice)]
    pixels: dict[tuple[str, int], bytes] = {}
    if shown:
        batches = sorted({tags[image][cols.BATCH] for image, _ in shown})
        stored: DataFrame = lake.pixels.where(F.col(cols.BATCH).isin(batches))
        chosen = lake.spark.createDataFrame(shown, f"{cols.IMAGE_ID} string, {cols.FRAME} int")
        for row in (
            stored.join(F.broadcast(chosen), on=[cols.IMAGE_ID, cols.FRAME], how="inner")
            .select(cols.IMAGE_ID, cols.FRAME, cols.PIXELS_COLUMN)
            .collect()
        ):
            pixels[row[cols.IMAGE_ID], row[cols.FRAME]] = bytes(row[cols.PIXELS_COLUMN])
    allowed = set(shown)
    return {key: Picture(key not in allowed, pixels.get(key), tags[key[0]]) for key in keys if key[0] in tags}
