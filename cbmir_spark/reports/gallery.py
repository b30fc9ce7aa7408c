"""Pages for people: the gallery of a query list, and the report of an evaluation. One HTML file each, no script.

Runs on the driver. Everything that comes from a header or a query list is treated as hostile: jinja2 escapes it, what
is invisible or reorders text is spelled out, and the page's own policy lets no script, request or form run. Pictures
are embedded; those that may carry burned-in text (burned_in.py) are withheld, and their pixels are not even read.
"""

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from cbmir_spark import storage
from cbmir_spark.config import Choice, Settings
from cbmir_spark.dicom import burned_in
from cbmir_spark.dicom.vocabulary_tables import UNKNOWN
from cbmir_spark.lake import columns as cols
from cbmir_spark.lake import delta, publication, schemas
from cbmir_spark.lake.paths import LakePaths
from cbmir_spark.reports.page import data_uri, render_page
from cbmir_spark.storage import ObjectStore

GALLERY_FILE = "gallery.html"

# Hits shown of each query; the rest are in the results. It also bounds what the driver collects: 64 KB a picture.
SHOWN_HITS = 12
_QUERY_SIDE, _HIT_SIDE = 224, 144


@dataclass(frozen=True)
class Asked:
    """A query as its row shows it on the left.

    `pixels` are 256×256 uint8 as the network saw them, or None: an image of the lake is then looked up by `image_id`
    and `frame`. Without either the row says that there is no picture.
    """

    query_id: str
    image_id: str | None = None
    frame: int = 0
    pixels: bytes | None = None
    modality: str | None = None
    body_part: str | None = None
    predicted: str | None = None
    sex: str | None = None
    age_years: float | None = None
    year: int | None = None
    text_risk: bool | None = None


@dataclass(frozen=True)
class Card:
    """One image on the page. `agrees` says whether a hit has its query's modality and body part, None if unknown."""

    picture: str | None = None
    withheld: bool = False
    rank: int | None = None
    distance: float | None = None
    modality: str | None = None
    body_part: str | None = None
    body_part_source: str = cols.FROM_TAG
    predicted: str | None = None
    sex: str | None = None
    age_years: float | None = None
    year: int | None = None
    agrees: bool | None = None


@dataclass(frozen=True)
class Row:
    """One query and its answer: the query on the left, its hits by rank on the right."""

    query_id: str
    status: str
    reason: str | None
    partitions: tuple[str, ...]
    candidates: int
    found: int
    asked: Card
    hits: tuple[Card, ...]


def gallery(
    spark: SparkSession,
    settings: Settings,
    results: str,
    asked: Sequence[Asked] = (),
    facts: Mapping[str, object] | None = None,
) -> str:
    """Write `gallery.html` beside the hits and statuses in folder `results`; its URI.

    The first `retrieval.gallery` queries by id are shown, each with at most SHOWN_HITS hits: so many rows and
    pictures come to the driver, however long the list is. `facts` are lines for the page's head.
    """
    folder = storage.canonical(results)
    limit = settings.retrieval.gallery
    all_statuses = spark.read.schema(schemas.RESULTS_STATUSES.schema).parquet(
        storage.join(folder, schemas.RESULTS_STATUSES.name)
    )
    statuses = [row.asDict() for row in all_statuses.orderBy(cols.QUERY_ID).limit(limit).collect()]
    shown = [status[cols.QUERY_ID] for status in statuses]
    hits = spark.read.schema(schemas.RESULTS_HITS.schema).parquet(storage.join(folder, schemas.RESULTS_HITS.name))
    of_query: dict[str, list[dict[str, Any]]] = {query: [] for query in shown}
    if shown:
        wanted = hits.where(F.col(cols.QUERY_ID).isin(shown) & (F.col(cols.RANK) <= SHOWN_HITS))
        for row in wanted.collect():
            of_query[row[cols.QUERY_ID]].append(row.asDict())
    questions = {query.query_id: query for query in asked if query.query_id in of_query}
    needed = {(hit[cols.IMAGE_ID], hit[cols.FRAME]) for found in of_query.values() for hit in found}
    needed |= {(q.image_id, q.frame) for q in questions.values() if q.image_id is not None and q.pixels is None}
    choice = settings.privacy.burned_in
    pictures = _pictures(spark, LakePaths.of(settings.lake), needed, choice)
    rows = [
        _row(status, questions.get(status[cols.QUERY_ID]), of_query[status[cols.QUERY_ID]], pictures, choice)
        for status in statuses
    ]
    total = all_statuses.count()
    page = render_gallery(rows, total, facts or {})
    target = storage.join(folder, GALLERY_FILE)
    ObjectStore(settings.storage).write_bytes(target, page.encode("utf-8"))
    return target


def render_gallery(rows: Sequence[Row], total: int, facts: Mapping[str, object]) -> str:
    """The gallery as one HTML document."""
    return render_page(
        "gallery",
        title="Retrieved images",
        rows=rows,
        total=total,
        facts=dict(facts),
        withheld=sum(card.withheld for row in rows for card in (row.asked, *row.hits)),
    )


def thumbnail(pixels: bytes, side: int) -> str:
    """256×256 uint8 pixels as a data: URI of a PNG, `side` pixels wide."""
    values = np.frombuffer(pixels, np.uint8).reshape(cols.SIDE, cols.SIDE)
    small = Image.fromarray(values).resize(
        (side, side), Image.Resampling.BOX if side < 128 else Image.Resampling.LANCZOS
    )
    stream = io.BytesIO()
    small.save(stream, "PNG", optimize=True)
    return data_uri(stream.getvalue())


@dataclass(frozen=True)
class _Picture:
    """What the lake says of one shown frame; `pixels` is None where it is withheld or gone."""

    withheld: bool
    pixels: bytes | None
    tags: Mapping[str, Any]


def _pictures(
    spark: SparkSession, lake: LakePaths, needed: Iterable[tuple[str, int]], choice: Choice
) -> dict[tuple[str, int], _Picture]:
    """Tags and pixels of the frames that the page shows. TAGS first: it says which batches of PIXELS to open."""
    keys = sorted(set(needed))
    pinned = publication.published(spark, lake)
    if not keys or pinned is None:
        return {}
    images = spark.createDataFrame([(key,) for key in sorted({image for image, _ in keys})], f"{cols.IMAGE_ID} string")
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
        for row in delta.widened(delta.read(spark, lake.path(schemas.TAGS), pinned.tags), schemas.TAGS)
        .join(F.broadcast(images), on=cols.IMAGE_ID, how="inner")
        .select(*columns)
        .collect()
    }
    shown = [key for key in keys if key[0] in tags and burned_in.allowed(tags[key[0]][cols.TEXT_RISK], choice)]
    pixels: dict[tuple[str, int], bytes] = {}
    if shown:
        batches = sorted({tags[image][cols.BATCH] for image, _ in shown})
        frames: DataFrame = delta.read(spark, lake.path(schemas.PIXELS), pinned.pixels).where(
            F.col(cols.BATCH).isin(batches)
        )
        chosen = spark.createDataFrame(shown, f"{cols.IMAGE_ID} string, {cols.FRAME} int")
        for row in (
            frames.join(F.broadcast(chosen), on=[cols.IMAGE_ID, cols.FRAME], how="inner")
            .select(cols.IMAGE_ID, cols.FRAME, cols.PIXELS_COLUMN)
            .collect()
        ):
            pixels[row[cols.IMAGE_ID], row[cols.FRAME]] = bytes(row[cols.PIXELS_COLUMN])
    may = set(shown)
    return {key: _Picture(key not in may, pixels.get(key), tags[key[0]]) for key in keys if key[0] in tags}


def _row(
    status: Mapping[str, Any],
    asked: Asked | None,
    hits: list[dict[str, Any]],
    pictures: Mapping[tuple[str, int], _Picture],
    choice: Choice,
) -> Row:
    question = _question(asked or Asked(status[cols.QUERY_ID]), pictures, choice)
    return Row(
        query_id=status[cols.QUERY_ID],
        status=status[cols.STATUS],
        reason=status[cols.REASON],
        partitions=tuple(status[cols.PARTITIONS]),
        candidates=status[cols.CANDIDATES],
        found=status[cols.HITS],
        asked=question,
        hits=tuple(_hit(hit, question, pictures) for hit in sorted(hits, key=lambda hit: int(hit[cols.RANK]))),
    )


def _question(asked: Asked, pictures: Mapping[tuple[str, int], _Picture], choice: Choice) -> Card:
    stored = pictures.get((asked.image_id, asked.frame)) if asked.image_id is not None else None
    said = stored.tags if stored else {}
    pixels, withheld = asked.pixels, False
    if pixels is not None:
        withheld = not burned_in.allowed(asked.text_risk, choice)
    elif stored is not None:
        pixels, withheld = stored.pixels, stored.withheld
    return Card(
        picture=thumbnail(pixels, _QUERY_SIDE) if pixels is not None and not withheld else None,
        withheld=withheld,
        modality=asked.modality or said.get(cols.MODALITY),
        body_part=asked.body_part or said.get(cols.BODY_PART),
        predicted=asked.predicted,
        sex=asked.sex or said.get(cols.SEX),
        age_years=asked.age_years if asked.age_years is not None else said.get(cols.AGE_YEARS),
        year=asked.year or said.get(cols.YEAR),
    )


def _hit(hit: Mapping[str, Any], asked: Card, pictures: Mapping[tuple[str, int], _Picture]) -> Card:
    stored = pictures.get((hit[cols.IMAGE_ID], hit[cols.FRAME]))
    pixels = stored.pixels if stored else None
    of_query, of_hit = (asked.modality, asked.body_part), (hit[cols.MODALITY], hit[cols.BODY_PART])
    known = None not in of_query and UNKNOWN not in (*of_query, *of_hit)
    return Card(
        picture=thumbnail(pixels, _HIT_SIDE) if pixels is not None else None,
        withheld=stored.withheld if stored else False,
        agrees=of_query == of_hit if known else None,
        **{
            name: hit[name]
            for name in (
                cols.RANK,
                cols.DISTANCE,
                cols.MODALITY,
                cols.BODY_PART,
                cols.BODY_PART_SOURCE,
                cols.PREDICTED,
                cols.SEX,
                cols.AGE_YEARS,
                cols.YEAR,
            )
        },
    )
