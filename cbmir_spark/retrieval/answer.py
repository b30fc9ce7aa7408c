"""What is searched and what comes back, at either level: the searched files, hits, statuses, and their order.

Queries of one list may differ in what a hit list holds at most once (`unique`). Each level searches the queries of one
such group together; `groups_of` forms the groups, `combine` puts their answers into the order of the queries. Runs on
the driver.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyspark.sql import SparkSession

from cbmir_spark.config import RetrievalSettings
from cbmir_spark.errors import InputError, ModelError
from cbmir_spark.index.layout import Place, place_of
from cbmir_spark.index.open import Index
from cbmir_spark.index.vector_files import DataFile
from cbmir_spark.lake import columns as cols
from cbmir_spark.lake import schemas
from cbmir_spark.lake.arrow import arrow_schema
from cbmir_spark.models.projection import Projection
from cbmir_spark.reports.gallery import ShownQuery
from cbmir_spark.retrieval.distribute import tasks_of
from cbmir_spark.retrieval.plan import plan, searched_terms
from cbmir_spark.retrieval.query import UNRESTRICTED, Query, QueryRow, QueryStatus, Status
from cbmir_spark.storage import ObjectStore

# Queries answered at a time, so that memory does not grow with the list; and hits and partial results that the driver
# may hold of them. A partial result takes 90 bytes, and Spark aborts a job that sends its driver a gigabyte.
QUERIES_AT_ONCE = 8_192
SERIES_AT_ONCE = 512
_HITS_AT_ONCE = 2_000_000
PARTIAL_AT_ONCE = 8_000_000

# The column that each value of `unique` and `exclude_same` compares.
COLUMN_OF: Mapping[str, str | None] = {
    "none": None,
    "image": cols.IMAGE_ID,
    "series": cols.SERIES_ID,
    "study": cols.STUDY_ID,
    "patient": cols.PATIENT_ID,
}

_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Base:
    """What is searched: the live files of one version of FEATURES, and the projection of their vectors."""

    files: tuple[DataFile, ...]
    dimension: int
    projection: Projection
    store: ObjectStore

    @property
    def places(self) -> tuple[Place, ...]:
        """The partitions that hold rows, sorted."""
        return tuple(sorted({file.place for file in self.files}))


def base_of(index: Index, store: ObjectStore) -> Base:
    """List the files of an index with their sizes."""
    sizes = {found.uri: found.size for found in store.list_objects(index.path)}
    files = tuple(DataFile(number, uri, place_of(uri), sizes[uri]) for number, uri in enumerate(index.files))
    return Base(files, index.manifest.embedding_dim, index.projection, store)


@dataclass(frozen=True)
class Scanned:
    """Files that tasks opened, rows whose vectors they read, and stored bytes of all columns they read."""

    files: int = 0
    vectors: int = 0
    bytes: int = 0

    def __add__(self, other: "Scanned") -> "Scanned":
        return Scanned(self.files + other.files, self.vectors + other.vectors, self.bytes + other.bytes)


@dataclass(frozen=True)
class Answer:
    """Hits (RESULTS_HITS, by query in the order given and rank) and one status per query, in the queries' order."""

    hits: pa.Table
    statuses: tuple[Status, ...]
    partitions: tuple[Place, ...]
    scanned: Scanned


@dataclass(frozen=True)
class Resolved:
    """Queries, or the statuses of those that cannot be searched, by query_id; cards of the queries to be shown."""

    queries: Mapping[str, Query]
    failed: Mapping[str, Status]
    cards: Mapping[str, ShownQuery]

    @classmethod
    def nothing(cls) -> "Resolved":
        return cls({}, {}, {})

    def merge(self, other: "Resolved") -> "Resolved":
        """Combine with what was resolved of other rows."""
        return Resolved(
            {**self.queries, **other.queries}, {**self.failed, **other.failed}, {**self.cards, **other.cards}
        )


class Searcher(Protocol):
    """One level of a search: rows of a query list → queries and their answer. Runs on the driver, searches in tasks."""

    def answer(self, rows: Sequence[QueryRow]) -> tuple[Resolved, Answer]:
        """Resolve the rows and search those that could be resolved; memory grows with their number."""


@dataclass(frozen=True)
class Group:
    """Queries of a list that agree on what a hit list holds at most once: their numbers, and that column."""

    numbers: NDArray[np.int64]
    column: str | None


@dataclass(frozen=True)
class GroupAnswer:
    """Hits of one group: each hit's query by number within the group, RESULTS_HITS by query and rank.

    candidates: (Q,) rows that each query was compared with.
    """

    query: NDArray[np.int64]
    hits: pa.Table
    candidates: NDArray[np.int64]
    scanned: Scanned


def plans_of(queries: Sequence[Query], options: RetrievalSettings, base: Base) -> list[frozenset[Place]]:
    """Plan every query.

    Raises InputError where a query_id occurs twice, ModelError where queries and rows have vectors of different
    dimension.
    """
    if len({query.query_id for query in queries}) != len(queries):
        raise InputError("query_ids are not unique: name each query differently")
    _check_dimension(queries, base)
    existing = base.places
    return [plan(query, options, existing) for query in queries]


def groups_of(queries: Sequence[Query], options: RetrievalSettings) -> list[Group]:
    """Group the queries by `unique`; nearly all queries of a list agree on it."""
    values = [query.overrides.unique or options.unique for query in queries]
    return [
        Group(np.array([number for number, each in enumerate(values) if each == unique], np.int64), COLUMN_OF[unique])
        for unique in sorted(set(values))
    ]


def combine(
    queries: Sequence[Query],
    plans: Sequence[frozenset[Place]],
    answered: Sequence[tuple[Group, GroupAnswer]],
    options: RetrievalSettings,
) -> Answer:
    """Put the groups' answers into the order of the queries, and give each query its status."""
    candidates = np.zeros(len(queries), dtype=np.int64)
    hits = np.zeros(len(queries), dtype=np.int64)
    total = Scanned()
    for group, answer in answered:
        candidates[group.numbers] = answer.candidates
        hits += np.bincount(group.numbers[answer.query], minlength=len(queries))
        total += answer.scanned
    statuses = tuple(
        _status(query, places, int(hits[number]), int(candidates[number]), options)
        for number, (query, places) in enumerate(zip(queries, plans, strict=True))
    )
    return Answer(_in_order(answered), statuses, tuple(sorted(set().union(*plans))), total)


def batches(
    spark: SparkSession, items: Sequence[_Item], k: int, options: RetrievalSettings
) -> Iterator[Sequence[_Item]]:
    """Cut a list of queries into batches that can be searched in bounded memory; `k` is the most hits of any.

    An empty list gives one empty batch.
    """
    # Tasks return the nearest candidates of each query series, and where their frames are.
    k = max(k, options.series_candidates) if options.level == "series" else k
    # Tasks may return several times k pairs of a query before bounds are given up.
    size = max(1, min(QUERIES_AT_ONCE, _HITS_AT_ONCE // k, PARTIAL_AT_ONCE // (4 * k * tasks_of(spark, options))))
    size = min(size, SERIES_AT_ONCE) if options.level == "series" else size
    for start in range(0, max(1, len(items)), size):
        yield items[start : start + size]


def hits_of(
    queries: Sequence[Query], query: NDArray[np.int64], distance: NDArray[np.float64], rows: pa.Table
) -> pa.Table:
    """Build RESULTS_HITS of n hits in the order of query and rank.

    query, distance: (n,); rows: n rows of HIT_COLUMNS and the partition columns.
    """
    schema = arrow_schema(schemas.RESULTS_HITS.schema)
    begins = np.flatnonzero(np.diff(query, prepend=-1))
    rank = 1 + np.arange(len(query)) - np.repeat(begins, np.diff(begins, append=len(query)))
    ranked = {
        cols.QUERY_ID: pa.array([queries[number].query_id for number in query], pa.string()),
        cols.RANK: pa.array(rank, pa.int32()),
        cols.DISTANCE: pa.array(distance),
    }
    columns = [ranked[name] if name in ranked else rows.column(name) for name in schema.names]
    return pa.table(columns, schema.names).cast(schema)


def _in_order(answered: Sequence[tuple[Group, GroupAnswer]]) -> pa.Table:
    if len(answered) == 1:
        return answered[0][1].hits
    schema = arrow_schema(schemas.RESULTS_HITS.schema)
    hits = pa.concat_tables([schema.empty_table(), *(answer.hits for _, answer in answered)])
    numbers = np.concatenate(
        [np.empty(0, dtype=np.int64), *(group.numbers[answer.query] for group, answer in answered)]
    )
    return hits.take(np.argsort(numbers, kind="stable"))


def _check_dimension(queries: Sequence[Query], base: Base) -> None:
    shapes = {query.vector.shape for query in queries}
    if len(shapes) > 1:
        raise ModelError(f"the queries have vectors of different shapes {sorted(shapes)}: embed them with one model")
    if shapes and shapes != {(base.dimension,)}:
        raise ModelError(
            f"the queries have vectors of {shapes.pop()[0]} values, the index has {base.dimension}: they come from "
            "different models; search the index of the queries' model"
        )


def _status(query: Query, places: frozenset[Place], hits: int, candidates: int, options: RetrievalSettings) -> Status:
    named = tuple("/".join(place) for place in sorted(places))
    if hits:
        return Status(query.query_id, QueryStatus.ANSWERED, None, named, candidates, hits)
    if places:
        filtered = "" if query.overrides.hit_filter == UNRESTRICTED else "; filtered by sex, age or year"
        excluded = query.overrides.exclude_same or options.exclude_same
        reason = f"no row of the searched partitions may be a hit (exclude_same {excluded}{filtered})"
    else:
        terms = "/".join(part or "any" for part in searched_terms(query, options))
        reason = f"the index has no partition for {terms} (prefilter {options.prefilter}, unknown {options.unknown})"
    return Status(query.query_id, QueryStatus.NO_CANDIDATES, reason, named, candidates, 0)
