"""Pages for people: the gallery of a query list, and the report of an evaluation. One HTML file each, no script.

Runs on the driver. Everything that comes from a header or a query list is treated as hostile: jinja2 escapes it, what
is invisible or reorders text is spelled out, and the page's own policy lets no script, request or form run. Pictures
are embedded; those that may carry burned-in text (burned_in.py) are withheld, and their pixels are not even read.
"""

import base64
import io
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from cbmir_spark import burned_in, storage
from cbmir_spark import tables as t
from cbmir_spark.config import Choice, Settings
from cbmir_spark.vocabulary import UNKNOWN

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
    body_part_source: str = t.FROM_TAG
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
    all_statuses = spark.read.schema(t.RESULTS_STATUSES.schema).parquet(storage.join(folder, t.RESULTS_STATUSES.name))
    statuses = [row.asDict() for row in all_statuses.orderBy(t.QUERY_ID).limit(limit).collect()]
    shown = [status[t.QUERY_ID] for status in statuses]
    hits = spark.read.schema(t.RESULTS_HITS.schema).parquet(storage.join(folder, t.RESULTS_HITS.name))
    of_query: dict[str, list[dict[str, Any]]] = {query: [] for query in shown}
    if shown:
        wanted = hits.where(F.col(t.QUERY_ID).isin(shown) & (F.col(t.RANK) <= SHOWN_HITS))
        for row in wanted.collect():
            of_query[row[t.QUERY_ID]].append(row.asDict())
    questions = {query.query_id: query for query in asked if query.query_id in of_query}
    needed = {(hit[t.IMAGE_ID], hit[t.FRAME]) for found in of_query.values() for hit in found}
    needed |= {(q.image_id, q.frame) for q in questions.values() if q.image_id is not None and q.pixels is None}
    choice = settings.privacy.burned_in
    pictures = _pictures(spark, t.Lake.of(settings), needed, choice)
    rows = [
        _row(status, questions.get(status[t.QUERY_ID]), of_query[status[t.QUERY_ID]], pictures, choice)
        for status in statuses
    ]
    total = all_statuses.count()
    page = render_gallery(rows, total, facts or {})
    target = storage.join(folder, GALLERY_FILE)
    storage.write_bytes(target, page.encode("utf-8"), settings.storage)
    return target


def render_gallery(rows: Sequence[Row], total: int, facts: Mapping[str, object]) -> str:
    """The gallery as one HTML document."""
    return _page(
        "gallery",
        title="Retrieved images",
        rows=rows,
        total=total,
        facts=dict(facts),
        withheld=sum(card.withheld for row in rows for card in (row.asked, *row.hits)),
    )


def render_evaluation(evaluation: Mapping[str, Any], figures: Mapping[str, bytes]) -> str:
    """An evaluation, as evaluation.py makes it, as one HTML document; `figures` are PNG files by their caption."""
    pictures = {caption: _data_uri(content) for caption, content in figures.items()}
    return _page("evaluation", title="Evaluation", e=evaluation, figures=pictures)


def visible(text: str) -> str:
    """`text` with every control, format and bidirectional character spelled out, as ⟨U+202E⟩ is."""
    return "".join(f"⟨U+{ord(c):04X}⟩" if unicodedata.category(c) in _INVISIBLE else c for c in text)


# Controls, formats (bidi among them), surrogates, private use, unassigned, line and paragraph separators.
_INVISIBLE = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})


def thumbnail(pixels: bytes, side: int) -> str:
    """256×256 uint8 pixels as a data: URI of a PNG, `side` pixels wide."""
    values = np.frombuffer(pixels, np.uint8).reshape(t.SIDE, t.SIDE)
    small = Image.fromarray(values).resize(
        (side, side), Image.Resampling.BOX if side < 128 else Image.Resampling.LANCZOS
    )
    stream = io.BytesIO()
    small.save(stream, "PNG", optimize=True)
    return _data_uri(stream.getvalue())


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


@dataclass(frozen=True)
class _Picture:
    """What the lake says of one shown frame; `pixels` is None where it is withheld or gone."""

    withheld: bool
    pixels: bytes | None
    tags: Mapping[str, Any]


def _pictures(
    spark: SparkSession, lake: t.Lake, needed: Iterable[tuple[str, int]], choice: Choice
) -> dict[tuple[str, int], _Picture]:
    """Tags and pixels of the frames that the page shows. TAGS first: it says which batches of PIXELS to open."""
    keys = sorted(set(needed))
    pinned = t.published(spark, lake)
    if not keys or pinned is None:
        return {}
    images = spark.createDataFrame([(key,) for key in sorted({image for image, _ in keys})], f"{t.IMAGE_ID} string")
    columns = (t.IMAGE_ID, t.BATCH, t.TEXT_RISK, t.MODALITY, t.BODY_PART, t.SEX, t.AGE_YEARS, t.YEAR)
    tags = {
        row[t.IMAGE_ID]: row.asDict()
        for row in t.widened(t.read(spark, lake.path(t.TAGS), pinned.tags), t.TAGS)
        .join(F.broadcast(images), on=t.IMAGE_ID, how="inner")
        .select(*columns)
        .collect()
    }
    shown = [key for key in keys if key[0] in tags and burned_in.allowed(tags[key[0]][t.TEXT_RISK], choice)]
    pixels: dict[tuple[str, int], bytes] = {}
    if shown:
        batches = sorted({tags[image][t.BATCH] for image, _ in shown})
        frames: DataFrame = t.read(spark, lake.path(t.PIXELS), pinned.pixels).where(F.col(t.BATCH).isin(batches))
        chosen = spark.createDataFrame(shown, f"{t.IMAGE_ID} string, {t.FRAME} int")
        for row in (
            frames.join(F.broadcast(chosen), on=[t.IMAGE_ID, t.FRAME], how="inner")
            .select(t.IMAGE_ID, t.FRAME, t.PIXELS_COLUMN)
            .collect()
        ):
            pixels[row[t.IMAGE_ID], row[t.FRAME]] = bytes(row[t.PIXELS_COLUMN])
    may = set(shown)
    return {key: _Picture(key not in may, pixels.get(key), tags[key[0]]) for key in keys if key[0] in tags}


def _row(
    status: Mapping[str, Any],
    asked: Asked | None,
    hits: list[dict[str, Any]],
    pictures: Mapping[tuple[str, int], _Picture],
    choice: Choice,
) -> Row:
    question = _question(asked or Asked(status[t.QUERY_ID]), pictures, choice)
    return Row(
        query_id=status[t.QUERY_ID],
        status=status[t.STATUS],
        reason=status[t.REASON],
        partitions=tuple(status[t.PARTITIONS]),
        candidates=status[t.CANDIDATES],
        found=status[t.HITS],
        asked=question,
        hits=tuple(_hit(hit, question, pictures) for hit in sorted(hits, key=lambda hit: int(hit[t.RANK]))),
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
        modality=asked.modality or said.get(t.MODALITY),
        body_part=asked.body_part or said.get(t.BODY_PART),
        predicted=asked.predicted,
        sex=asked.sex or said.get(t.SEX),
        age_years=asked.age_years if asked.age_years is not None else said.get(t.AGE_YEARS),
        year=asked.year or said.get(t.YEAR),
    )


def _hit(hit: Mapping[str, Any], asked: Card, pictures: Mapping[tuple[str, int], _Picture]) -> Card:
    stored = pictures.get((hit[t.IMAGE_ID], hit[t.FRAME]))
    pixels = stored.pixels if stored else None
    of_query, of_hit = (asked.modality, asked.body_part), (hit[t.MODALITY], hit[t.BODY_PART])
    known = None not in of_query and UNKNOWN not in (*of_query, *of_hit)
    return Card(
        picture=thumbnail(pixels, _HIT_SIDE) if pixels is not None else None,
        withheld=stored.withheld if stored else False,
        agrees=of_query == of_hit if known else None,
        **{
            name: hit[name]
            for name in (
                t.RANK,
                t.DISTANCE,
                t.MODALITY,
                t.BODY_PART,
                t.BODY_PART_SOURCE,
                t.PREDICTED,
                t.SEX,
                t.AGE_YEARS,
                t.YEAR,
            )
        },
    )


def _age(years: float | None) -> str:
    """Infants in months or days, everyone else in whole years, as people say it."""
    if years is None:
        return ""
    if years >= 2:
        return f"{years:.0f} y"
    return f"{years * 12:.0f} mo" if years * 12 >= 2 else f"{years * 365.25:.0f} d"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _safe(value: Any) -> Any:
    """What every expression on the page passes: no invisible character survives, and None prints nothing."""
    if isinstance(value, Markup):
        return value
    return "" if value is None else visible(str(value))


def _page(template: str, **values: object) -> str:
    environment = Environment(
        loader=PackageLoader("cbmir_spark"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_safe,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "age": _age,
        "percent": _percent,
        "figure": _figure,
        "count": lambda number: f"{number:,.0f}",
        "distance": lambda number: f"{number:.4g}",
    }
    return environment.get_template(f"{template}.html").render(**values)
