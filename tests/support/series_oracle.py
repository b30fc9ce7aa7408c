"""Volumes of a made-up index, queries by series, and a brute force over frames."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pyspark.sql import SparkSession

from cbmir_spark.config import RetrievalSettings
from cbmir_spark.lake import columns as cols
from cbmir_spark.retrieval import answer as answers
from cbmir_spark.retrieval import series as retrieval_series
from cbmir_spark.retrieval.query import Query
from tests.support.search_oracle import Made, outside, sought

Floats = NDArray[np.float32]
# query, rank, distance, series, partition, image and frame that match best
Hit = tuple[str, int, float, str, tuple[str, str], str, int]
Key = tuple[tuple[str, str], str]


# --- the oracle ---


def volumes_of(made: Made, imputed: str = "include") -> dict[Key, list[int]]:
    """Rows of each volume, in the order of image and frame."""
    columns = made.columns
    found: dict[Key, list[int]] = {}
    for row in sorted(range(len(made.vectors)), key=lambda r: (columns[cols.IMAGE_ID][r], columns[cols.FRAME][r])):
        if imputed == "include" or columns[cols.BODY_PART_SOURCE][row] != cols.FROM_PREDICTION:
            place = (columns[cols.MODALITY][row], columns[cols.BODY_PART][row])
            found.setdefault((place, columns[cols.SERIES_ID][row]), []).append(row)
    return found


def unit(made: Made, row: int) -> NDArray[np.float64]:
    vector = made.vectors[row].astype(np.float64)
    one: NDArray[np.float64] = vector / (math.sqrt(math.fsum(vector**2)) or 1.0)
    return one


def mean(made: Made, rows: Sequence[int]) -> Floats:
    steps = [[round(number * 2**44) for number in unit(made, row)] for row in rows]
    return np.array([sum(column) / (len(rows) * 2**44) for column in zip(*steps, strict=True)], dtype=np.float32)


def apart(one: NDArray[Any], other: NDArray[Any]) -> float:
    return math.sqrt(math.fsum((one.astype(np.float64) - other.astype(np.float64)) ** 2))


def series_oracle(made: Made, query: Query, own: list[int], chosen: RetrievalSettings) -> tuple[list[Hit], int]:
    columns, wish = made.columns, query.overrides
    modality, body_part = sought(query, chosen)
    k = wish.k or chosen.k
    excluded = wish.exclude_same or chosen.exclude_same
    excluded = "series" if excluded == "image" else excluded
    unique = wish.unique or chosen.unique
    near = []
    for (place, series), rows in volumes_of(made, chosen.imputed).items():
        first = rows[0]
        facts = {
            name: columns[name][first] for name in (cols.SEX, cols.AGE_YEARS, cols.YEAR, cols.STUDY_ID, cols.PATIENT_ID)
        }
        if modality is not None and place[0] != modality:
            continue
        if place[1] == "UNKNOWN" and body_part != "UNKNOWN" and chosen.unknown == "exclude":
            continue
        if place[1] != "UNKNOWN" and body_part is not None and place[1] != body_part:
            continue
        if wish.hit_filter.sex is not None and facts[cols.SEX] != wish.hit_filter.sex:
            continue
        if outside(facts[cols.AGE_YEARS], wish.hit_filter.age_min, wish.hit_filter.age_max):
            continue
        if outside(facts[cols.YEAR], wish.hit_filter.year_min, wish.hit_filter.year_max):
            continue
        of = {
            "series": series,
            "study": facts[cols.STUDY_ID],
            "patient": facts[cols.PATIENT_ID],
            "none": (place, series),
        }
        if excluded != "none" and getattr(query, f"{excluded}_id") == of[excluded]:
            continue
        near.append((apart(query.vector, mean(made, rows)), series, place, of[unique], rows))
    candidates: list[tuple[Any, ...]] = []
    for each in sorted(near):
        if each[3] not in {other[3] for other in candidates} and len(candidates) < max(k, chosen.series_candidates):
            candidates.append(each)
    found = []
    for _, series, place, _, rows in candidates:
        pairs = [[(apart(unit(made, mine), unit(made, other)), other) for other in rows] for mine in own]
        least = [min(of_frame)[0] for of_frame in pairs]
        far = math.fsum(x * x / 2 if chosen.metric == "cosine" else x for x in least) / len(own)
        best = min(itertools.chain(*pairs), key=lambda pair: (pair[0], rows.index(pair[1])))[1]
        found.append((far, series, place, columns[cols.IMAGE_ID][best], columns[cols.FRAME][best]))
    hits = [(query.query_id, rank, *hit) for rank, hit in enumerate(sorted(found)[:k], start=1)]
    return hits, len(near)


def ask_series(made: Made, number: int, seed: int) -> tuple[list[Query], dict[str, list[int]]]:
    """Query series of the index, tagged and untagged, and the rows of their volumes by query."""
    random = np.random.default_rng(seed)
    keys = sorted(volumes_of(made))
    queries, rows = [], {}
    for place_number in range(number):
        place, series = keys[int(random.integers(len(keys)))]
        own = volumes_of(made)[place, series]
        query_id = f"q{place_number:03d}"
        rows[query_id] = own
        queries.append(
            Query(
                query_id,
                mean(made, own),
                modality=place[0] if place_number % 4 else "UNKNOWN",
                body_part=place[1] if place_number % 3 else "UNKNOWN",
                predicted=("CT/CHEST", "MR/BRAIN", "UNKNOWN")[place_number % 3],
                probability=float(random.random()),
                image_id=made.columns[cols.IMAGE_ID][own[0]],
                series_id=series,
                study_id=made.columns[cols.STUDY_ID][own[0]],
                patient_id=made.columns[cols.PATIENT_ID][own[0]],
            )
        )
    return queries, rows


def answered(
    spark: SparkSession, base: answers.Base, made: Made, queries: Sequence[Query], chosen: RetrievalSettings
) -> tuple[list[Hit], tuple[int, ...]]:
    keys = {query.query_id: key for query in queries for key in volumes_of(made) if is_volume_of(made, query, key)}
    found = retrieval_series.describe(spark, base, frozenset(keys.values()), chosen)
    own = {query_id: found[key][0] for query_id, key in keys.items()}
    for query in queries:
        assert (found[keys[query.query_id]][1] == query.vector).all()
    answer = retrieval_series.search(spark, base, queries, own, chosen)
    rows = answer.hits.to_pylist()
    hits = [
        (
            row[cols.QUERY_ID],
            row[cols.RANK],
            row[cols.DISTANCE],
            row[cols.SERIES_ID],
            (row[cols.MODALITY], row[cols.BODY_PART]),
            row[cols.IMAGE_ID],
            row[cols.FRAME],
        )
        for row in rows
    ]
    return hits, tuple(status.candidates for status in answer.statuses)


def is_volume_of(made: Made, query: Query, key: Key) -> bool:
    return query.series_id == key[1] and (mean(made, volumes_of(made)[key]) == query.vector).all()


def assert_same_series(told: list[Hit], expected: list[Hit]) -> None:
    assert [(*hit[:2], *hit[3:]) for hit in told] == [(*hit[:2], *hit[3:]) for hit in expected]
    for one, other in zip(told, expected, strict=True):
        assert math.isclose(one[2], other[2], rel_tol=1e-12, abs_tol=1e-15)
