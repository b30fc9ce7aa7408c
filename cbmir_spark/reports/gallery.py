"""Lay out the gallery of a query list: one HTML file, no script. Rows and pictures in, a page out.

Everything that comes from a header or a query list is treated as hostile: jinja2 escapes it, invisible and reordering
characters are spelled out, and the page's policy forbids scripts, requests and forms. Pictures are embedded;
those that may carry burned-in text (burned_in.py) are withheld.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from cbmir_spark.config import Choice
from cbmir_spark.dicom import burned_in
from cbmir_spark.dicom.vocabulary_tables import UNKNOWN
from cbmir_spark.lake import columns as cols
from cbmir_spark.reports.page import data_uri, render_page

_QUERY_SIDE, _HIT_SIDE = 224, 144


@dataclass(frozen=True)
class ShownQuery:
    """A query as the page shows it, on the left of its hits.

    `pixels` are 256×256 uint8 as the network saw them, or None: an image of the lake is then looked up by `image_id`
    and `frame`. Without either the page says that there is no picture.
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
class Picture:
    """A frame of the lake: its image's row of TAGS, and its 256×256 uint8 pixels, None if withheld or missing."""

    withheld: bool
    pixels: bytes | None
    tags: Mapping[str, Any]


@dataclass(frozen=True)
class Card:
    """One image on the page. `agrees`: a hit has its query's modality and body part; None if either is unknown."""

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
    query: Card
    hits: tuple[Card, ...]


def rows_of(
    statuses: Sequence[Mapping[str, Any]],
    hits: Sequence[Mapping[str, Any]],
    queries: Sequence[ShownQuery],
    pictures: Mapping[tuple[str, int], Picture],
    choice: Choice,
) -> list[Row]:
    """Lay out rows of RESULTS_STATUSES and RESULTS_HITS as rows of the page, one per status in their order.

    `pictures` are the lake's, by image_id and frame. `choice` decides on pixels that a query brings itself.
    """
    shown = {query.query_id: query for query in queries}
    of_query: dict[str, list[Mapping[str, Any]]] = {status[cols.QUERY_ID]: [] for status in statuses}
    for hit in hits:
        of_query[hit[cols.QUERY_ID]].append(hit)
    rows = []
    for status in statuses:
        query_id = status[cols.QUERY_ID]
        rows.append(_row(status, shown.get(query_id, ShownQuery(query_id)), of_query[query_id], pictures, choice))
    return rows


def render_gallery(rows: Sequence[Row], total: int, facts: Mapping[str, object]) -> str:
    """Render the gallery as one HTML document; `total` is the number of queries, shown or not."""
    return render_page(
        "gallery",
        title="Retrieved images",
        rows=rows,
        total=total,
        facts=dict(facts),
        withheld=sum(card.withheld for row in rows for card in (row.query, *row.hits)),
    )


def thumbnail(pixels: bytes, side: int) -> str:
    """Scale 256×256 uint8 pixels to a PNG of `side` pixels, as a data: URI."""
    values = np.frombuffer(pixels, np.uint8).reshape(cols.SIDE, cols.SIDE)
    small = Image.fromarray(values).resize(
        (side, side), Image.Resampling.BOX if side < 128 else Image.Resampling.LANCZOS
    )
    stream = io.BytesIO()
    small.save(stream, "PNG", optimize=True)
    return data_uri(stream.getvalue())


def _row(
    status: Mapping[str, Any],
    query: ShownQuery,
    hits: Sequence[Mapping[str, Any]],
    pictures: Mapping[tuple[str, int], Picture],
    choice: Choice,
) -> Row:
    card = _query_card(query, pictures, choice)
    return Row(
        query_id=status[cols.QUERY_ID],
        status=status[cols.STATUS],
        reason=status[cols.REASON],
        partitions=tuple(status[cols.PARTITIONS]),
        candidates=status[cols.CANDIDATES],
        found=status[cols.HITS],
        query=card,
        hits=tuple(_hit_card(hit, card, pictures) for hit in sorted(hits, key=lambda hit: int(hit[cols.RANK]))),
    )


def _query_card(query: ShownQuery, pictures: Mapping[tuple[str, int], Picture], choice: Choice) -> Card:
    stored = pictures.get((query.image_id, query.frame)) if query.image_id is not None else None
    tags = stored.tags if stored else {}
    pixels, withheld = query.pixels, False
    if pixels is not None:
        withheld = not burned_in.allowed(query.text_risk, choice)
    elif stored is not None:
        pixels, withheld = stored.pixels, stored.withheld
    return Card(
        picture=thumbnail(pixels, _QUERY_SIDE) if pixels is not None and not withheld else None,
        withheld=withheld,
        modality=query.modality or tags.get(cols.MODALITY),
        body_part=query.body_part or tags.get(cols.BODY_PART),
        predicted=query.predicted,
        sex=query.sex or tags.get(cols.SEX),
        age_years=query.age_years if query.age_years is not None else tags.get(cols.AGE_YEARS),
        year=query.year or tags.get(cols.YEAR),
    )


def _hit_card(hit: Mapping[str, Any], query: Card, pictures: Mapping[tuple[str, int], Picture]) -> Card:
    stored = pictures.get((hit[cols.IMAGE_ID], hit[cols.FRAME]))
    pixels = stored.pixels if stored else None
    of_query, of_hit = (query.modality, query.body_part), (hit[cols.MODALITY], hit[cols.BODY_PART])
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
