"""A made-up index of vectors, queries over it, and a brute force that shares no line with the search."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cbmir_spark import config, storage
from cbmir_spark.config import RetrievalSettings, StorageSettings
from cbmir_spark.index.layout import FEATURES
from cbmir_spark.index.vector_files import DataFile
from cbmir_spark.lake import columns as cols
from cbmir_spark.lake.arrow import arrow_schema
from cbmir_spark.models.projection import Projection
from cbmir_spark.retrieval import answer as answers
from cbmir_spark.retrieval.query import HitFilter, Query, QueryOverrides
from cbmir_spark.storage import ObjectStore
from tests.support.tiny_lake import pseudonym

Floats = NDArray[np.float32]
Hit = tuple[str, int, float, str, int]

PLACES = [("CT", "CHEST"), ("CT", "HEAD"), ("CT", "UNKNOWN"), ("MR", "BRAIN"), ("MR", "UNKNOWN"), ("US", "LIVER")]
DIMENSION = 24
LOCAL = StorageSettings(endpoint=None, region="us-east-1", path_style=True, attempts=8)

# The index's way of writing, what Arrow does by itself, and several pages to a row group.
WRITERS: list[dict[str, Any]] = [
    {"compression": "none", "use_dictionary": False, "data_page_size": 2**30},
    {"compression": "snappy"},
    {"compression": "none", "use_dictionary": False, "data_page_size": 2**10, "write_batch_size": 4},
]

MODES: list[dict[str, Any]] = [
    {"prefilter": "none", "unique": "none", "k": 20, "unknown": "include", "exclude_same": "none"},
    {"prefilter": "predicted", "unique": "study", "imputed": "exclude", "exclude_same": "patient"},
    {"prefilter": "modality", "unique": "patient", "k": 500, "unknown": "include", "exclude_same": "series"},
    {"prefilter": "tags", "unique": "series", "unknown": "include", "imputed": "exclude", "exclude_same": "study"},
    {"prefilter": "none", "unique": "series", "metric": "cosine"},
]


def options(**values: Any) -> RetrievalSettings:
    return config.load(environ={}).retrieval.replace(**values)


# --- a made-up index ---


@dataclass(frozen=True)
class Made:
    """Rows of FEATURES by column, and their vectors."""

    columns: dict[str, list[Any]]
    vectors: Floats

    @property
    def projection(self) -> Projection:
        return Projection.fit([self.vectors], 4)

    def store(self, folder: Path, cut: int = 1, seed: int = 0, rows_per_group: int = 20) -> answers.Base:
        """As the index writes it, but in any order: at most `cut` files in each partition, of small row groups.

        Some files are as other tools leave them when they rewrite a table.
        """
        random = np.random.default_rng(seed)
        projection = self.projection
        coordinates, residuals = projection.apply(self.vectors)
        schema = arrow_schema(FEATURES.schema)
        columns = self.columns | {
            cols.VECTOR: list(self.vectors),
            cols.PROJECTION: list(coordinates),
            cols.RESIDUAL_NORM: residuals,
        }
        table = pa.table([pa.array(columns[name], schema.field(name).type) for name in schema.names], schema.names)
        place = list(zip(self.columns[cols.MODALITY], self.columns[cols.BODY_PART], strict=True))
        files = []
        for wanted in sorted(set(place)):
            rows = random.permutation([row for row, each in enumerate(place) if each == wanted])
            target = folder / f"modality={wanted[0]}" / f"body_part={wanted[1]}"
            target.mkdir(parents=True)
            for number, part in enumerate(np.array_split(rows, min(cut, len(rows)))):
                file = target / f"{number}.parquet"
                inside = table.drop_columns([cols.MODALITY, cols.BODY_PART]).take(part)
                pq.write_table(inside, file, row_group_size=rows_per_group, **WRITERS[(number + seed) % len(WRITERS)])
                files.append((storage.canonical(str(file)), wanted, file.stat().st_size))
        listed = [DataFile(number, *each) for number, each in enumerate(files)]
        return answers.Base(tuple(listed), self.vectors.shape[1], projection, ObjectStore(LOCAL))


def make(vectors: Floats, seed: int) -> Made:
    """Two frames to an image, ten to a series, twenty to a study, forty to a patient; some facts are missing."""
    random = np.random.default_rng(seed)
    columns: dict[str, list[Any]] = {name: [] for name in FEATURES.schema.names}
    for number in range(len(vectors)):
        modality, body_part = PLACES[random.integers(len(PLACES))]
        image = number // 2
        source = (
            cols.FROM_NOTHING
            if body_part == "UNKNOWN"
            else (cols.FROM_TAG, cols.FROM_PREDICTION)[int(random.integers(2))]
        )
        values = {
            cols.IMAGE_ID: pseudonym(f"i{image}"),
            cols.FRAME: number % 2,
            cols.PREDICTED: f"{modality}/CHEST",
            cols.PROBABILITY: 0.5,
            cols.BODY_PART_SOURCE: source,
            cols.SERIES_ID: pseudonym(f"s{image // 5}"),
            cols.STUDY_ID: pseudonym(f"st{image // 10}"),
            cols.PATIENT_ID: pseudonym(f"p{image // 20}"),
            cols.SEX: ("F", "M", "O", None)[int(random.integers(4))],
            cols.AGE_YEARS: None if random.random() < 0.2 else float(random.integers(0, 90)),
            cols.YEAR: None if random.random() < 0.2 else int(random.integers(2000, 2026)),
            cols.PIXELS_BATCH: 1,
            cols.PIXEL_DIGEST: "d",
            cols.MODALITY: modality,
            cols.BODY_PART: body_part,
        }
        for name, value in values.items():
            columns[name].append(value)
    return Made(columns, vectors)


def ask(made: Made, vectors: Floats, seed: int) -> list[Query]:
    """Queries that are now images of the index, now strangers, tagged and untagged, sure and unsure of their class."""
    random = np.random.default_rng(seed)
    queries = []
    for number, vector in enumerate(vectors):
        row = int(random.integers(len(made.vectors)))
        names = (cols.IMAGE_ID, cols.SERIES_ID, cols.STUDY_ID, cols.PATIENT_ID)
        ids: dict[str, Any] = {name: None if number % 3 == 0 else made.columns[name][row] for name in names}
        queries.append(
            Query(
                query_id=f"q{number:05d}",
                vector=vector,
                modality=("CT", "MR", "US", "XA", "UNKNOWN")[number % 5],
                body_part=("CHEST", "HEAD", "BRAIN", "LIVER", "UNKNOWN", "KNEE")[int(random.integers(6))],
                predicted=("CT/CHEST", "MR/BRAIN", "CT/HEAD", "UNKNOWN")[int(random.integers(4))],
                probability=float(random.random()),
                **ids,
            )
        )
    return queries


def with_wishes(queries: Iterable[Query], seed: int) -> list[Query]:
    """The same queries, half of them asking for something of their own."""
    random = np.random.default_rng(seed)

    def maybe(share: float, *values: Any) -> Any:
        return values[int(random.integers(len(values)))] if random.random() < share else None

    wishing = []
    for query in queries:
        if random.random() < 0.5:
            wishing.append(query)
            continue
        youngest, first = maybe(0.2, 10.0, 40.5, 89.0), maybe(0.2, 2001, 2015)
        within = HitFilter(
            sex=maybe(0.3, "F", "M", "O"),
            age_min=youngest,
            age_max=None if youngest is None else youngest + float(maybe(1.0, 0, 20)),
            year_min=first,
            year_max=maybe(0.2, 2016, 2025),
        )
        own = QueryOverrides(
            k=maybe(0.7, 1, 2, 7, 50, 200),
            modality=maybe(0.2, "CT", "MR", "XA"),
            body_part=maybe(0.2, "CHEST", "BRAIN", "UNKNOWN", "KNEE"),
            exclude_same=maybe(0.3, "none", "image", "series", "study", "patient"),
            unique=maybe(0.3, "none", "series", "study", "patient"),
            hit_filter=within,
        )
        wishing.append(replace(query, overrides=own))
    return wishing


# --- the oracle ---


def oracle(made: Made, queries: Iterable[Query], chosen: RetrievalSettings) -> tuple[list[list[Hit]], list[int]]:
    """The hits of each query and how many rows it was compared with: row by row, sums correctly rounded."""
    columns = made.columns
    wide = made.vectors.astype(np.float64)
    hits, candidates = [], []
    for query in queries:
        own = query.overrides
        modality, body_part = sought(query, chosen)
        asked = query.vector.astype(np.float64)
        ranked = []
        for row, vector in enumerate(wide):
            row_modality, row_part = columns[cols.MODALITY][row], columns[cols.BODY_PART][row]
            if modality is not None and row_modality != modality:
                continue
            if row_part == "UNKNOWN" and body_part != "UNKNOWN" and chosen.unknown == "exclude":
                continue
            if row_part != "UNKNOWN" and body_part is not None and row_part != body_part:
                continue
            if chosen.imputed == "exclude" and columns[cols.BODY_PART_SOURCE][row] == cols.FROM_PREDICTION:
                continue
            if own.hit_filter.sex is not None and columns[cols.SEX][row] != own.hit_filter.sex:
                continue
            if outside(columns[cols.AGE_YEARS][row], own.hit_filter.age_min, own.hit_filter.age_max):
                continue
            if outside(columns[cols.YEAR][row], own.hit_filter.year_min, own.hit_filter.year_max):
                continue
            excluded = own.exclude_same or chosen.exclude_same
            if excluded != "none" and getattr(query, f"{excluded}_id") == columns[f"{excluded}_id"][row]:
                continue
            unique = own.unique or chosen.unique
            group = row if unique == "none" else columns[f"{unique}_id"][row]
            ranked.append((row, group, vector))
        candidates.append(len(ranked))
        told = [
            (distance(asked, vector, chosen.metric), columns[cols.IMAGE_ID][row], columns[cols.FRAME][row], group)
            for row, group, vector in ranked
        ]
        seen: set[Any] = set()
        found: list[Hit] = []
        for far, image, frame, group in sorted(told):
            if group not in seen and len(seen) < (own.k or chosen.k):
                seen.add(group)
                found.append((query.query_id, len(seen), far, image, frame))
        hits.append(found)
    return hits, candidates


def sought(query: Query, chosen: RetrievalSettings) -> tuple[str | None, str | None]:
    modality: str | None = query.modality if query.modality != "UNKNOWN" else None
    body_part: str | None = None
    sure = query.predicted != "UNKNOWN" and query.probability >= chosen.min_probability
    if modality is None and sure:
        modality = query.predicted.split("/")[0]
    if chosen.prefilter == "tags" and query.body_part != "UNKNOWN":
        body_part = query.body_part
    elif chosen.prefilter in ("tags", "predicted") and sure:
        body_part = query.predicted.split("/")[1]
    if chosen.prefilter == "none":
        modality = body_part = None
    return query.overrides.modality or modality, query.overrides.body_part or body_part


def outside(value: float | None, least: float | None, most: float | None) -> bool:
    if least is None and most is None:
        return False
    return value is None or (least is not None and value < least) or (most is not None and value > most)


def distance(one: NDArray[np.float64], other: NDArray[np.float64], metric: str) -> float:
    if metric == "euclidean":
        return math.sqrt(math.fsum((one - other) ** 2))
    lengths = math.sqrt(math.fsum(one**2)), math.sqrt(math.fsum(other**2))
    return math.fsum((one / (lengths[0] or 1.0) - other / (lengths[1] or 1.0)) ** 2) / 2


def collected(answer: answers.Answer) -> list[Hit]:
    names = (cols.QUERY_ID, cols.RANK, cols.DISTANCE, cols.IMAGE_ID, cols.FRAME)
    return list(zip(*(answer.hits.column(name).to_pylist() for name in names), strict=True))


def assert_same(made: Made, queries: Sequence[Query], chosen: RetrievalSettings, found: list[Hit]) -> None:
    """Images and order as brute force has them, but where distances agree to 1e-12."""
    # Components of length-one vectors have an error of their own, which is not relative to a small difference.
    least = 1e-22 if chosen.metric == "cosine" else 0.0
    expected, _ = oracle(made, queries, chosen)
    by_query: dict[str, list[Hit]] = {query.query_id: [] for query in queries}
    for hit in found:
        by_query[hit[0]].append(hit)
    row_of = {
        key: row for row, key in enumerate(zip(made.columns[cols.IMAGE_ID], made.columns[cols.FRAME], strict=True))
    }
    for query, wanted in zip(queries, expected, strict=True):
        told = by_query[query.query_id]
        assert [hit[1] for hit in told] == [hit[1] for hit in wanted], query
        for one, other in zip(told, wanted, strict=True):
            assert math.isclose(one[2], other[2], rel_tol=1e-12, abs_tol=least), (one, other)
            if one[3:] != other[3:]:
                vector = made.vectors[row_of[one[3:]]].astype(np.float64)
                far = distance(query.vector.astype(np.float64), vector, chosen.metric)
                assert math.isclose(far, other[2], rel_tol=1e-12, abs_tol=least), (one, other)


def mixed(seed: int, rows: int, asked: int) -> tuple[Made, list[Query]]:
    """Features as they are and at their worst: clusters of low rank, exact and near duplicates, blank slices."""
    random = np.random.default_rng(seed)
    clusters = random.standard_normal((12, 3)) @ random.standard_normal((3, DIMENSION)) * 8
    made = clusters[random.integers(0, 12, rows + asked)] + random.standard_normal((rows + asked, DIMENSION)) * 0.2
    kind = random.integers(0, 8, len(made))
    made[kind == 0] = 40.0
    near = clusters[0] * 30 + random.standard_normal((len(made), DIMENSION)) * 1e-5
    made[kind == 1] = near[kind == 1]
    made[kind == 2] = random.integers(0, 3, (int((kind == 2).sum()), DIMENSION))
    vectors = made.astype(np.float32)
    base = make(vectors[:rows], seed)
    return base, with_wishes(ask(base, vectors[rows:], seed + 1), seed + 2)
