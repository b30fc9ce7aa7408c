"""A list of query images → the nearest images of the archive, exactly: plan → prune → bound → measure → top-k.

Where each step runs. The driver reads the list and plans which partitions each query may see; only their files are
named to any task (a join prunes nothing: measured, 8 of 8 files, design decision 1). The queries are broadcast. Tasks
read the projections of those files and leave the pairs that bounds cannot rule out; the driver merges what they leave,
and tasks measure those pairs by whole vectors. Where bounds rule out too little, a task compares every vector instead.
Either way each task gives what may be among the best, and the driver ranks that. Neither the number of tasks nor the
order of rows can change an answer. scan_task.py holds what a task does, bounds.py and kernel.py the arithmetic.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyspark import Broadcast
from pyspark.sql import SparkSession
from pyspark.sql.pandas.types import to_arrow_schema

from cbmir_spark.config import RetrievalSettings
from cbmir_spark.errors import InputError, ModelError
from cbmir_spark.index.open import Index
from cbmir_spark.index.vector_files import DataFile, Place, Read
from cbmir_spark.lake import columns as cols
from cbmir_spark.lake import delta, publication, schemas
from cbmir_spark.lake.runs import Stages
from cbmir_spark.models.projection import Projection
from cbmir_spark.retrieval import bounds, kernel
from cbmir_spark.retrieval import tasks as retrieval_tasks
from cbmir_spark.retrieval.bounds import Points
from cbmir_spark.retrieval.distribute import Item, run_tasks, shares_of, tasks_of
from cbmir_spark.retrieval.plan import plan, searched_terms
from cbmir_spark.retrieval.query import ANYTHING, Answered, Query, Status, Within
from cbmir_spark.retrieval.tasks import Bounded, Found, Job
from cbmir_spark.storage import ObjectStore

# Queries that are answered at a time, so that memory does not grow with the list; and hits and partial results that the
# driver may hold of them. A partial result is 90 bytes, and Spark ends a job that sends its driver a gigabyte.
QUERIES_AT_ONCE = 8_192
SERIES_AT_ONCE = 512
_HITS_AT_ONCE = 2_000_000
_PARTIAL_AT_ONCE = 8_000_000


@dataclass(frozen=True)
class Base:
    """What is searched: the live files of one version of FEATURES, and how their vectors were projected."""

    files: tuple[DataFile, ...]
    dimension: int
    projection: Projection
    store: ObjectStore

    @property
    def places(self) -> tuple[Place, ...]:
        """The partitions that hold rows, sorted."""
        return tuple(sorted({file.place for file in self.files}))


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
    """Hits (RESULTS_HITS, by query in the order given and rank) and one status a query, in the queries' order."""

    hits: pa.Table
    statuses: tuple[Status, ...]
    partitions: tuple[Place, ...]
    existing: tuple[Place, ...]
    scanned: Scanned


# --- search ---

# What `unique` and `exclude_same` look at.
_COLUMN: Mapping[str, str | None] = {
    "none": None,
    "image": cols.IMAGE_ID,
    "series": cols.SERIES_ID,
    "study": cols.STUDY_ID,
    "patient": cols.PATIENT_ID,
}


def base_of(spark: SparkSession, index: Index, store: ObjectStore) -> Base:
    """The files that an index consists of, with their sizes: one listing of its folder."""
    sizes = {found.uri: found.size for found in store.list_objects(index.path)}
    live = delta.live_files(spark, index.path, index.version)
    named = [DataFile(number, uri, publication.place_of(uri), sizes[uri]) for number, uri in enumerate(live)]
    return Base(tuple(named), index.manifest.embedding_dim, index.projection, store)


def search(
    spark: SparkSession,
    base: Base,
    queries: Sequence[Query],
    options: RetrievalSettings,
    stages: Stages | None = None,
) -> Answer:
    """The nearest rows of FEATURES for each query, exactly as brute force in float64 has them.

    Ties go by (distance, image_id, frame). Raises InputError where a query_id occurs twice, ModelError where queries
    and rows have vectors of different dimension. Memory grows with the queries: see `portions` for a long list. What
    it took is added to `stages`: plan, bound, measure, scan, rank.
    """
    clock = stages or Stages()

    def one_pass(chosen: Sequence[Query], plans: Sequence[frozenset[Place]], group: str | None) -> Pass:
        return _pass(spark, base, chosen, plans, options, group, clock)

    return by_passes(base, queries, options, one_pass)


@dataclass(frozen=True)
class Pass:
    """What came of some queries: the number of each hit's query, RESULTS_HITS in the order of query and rank, and (Q,)
    how many candidates each query had.
    """

    query: NDArray[np.int64]
    hits: pa.Table
    candidates: NDArray[np.int64]
    scanned: Scanned


def by_passes(
    base: Base,
    queries: Sequence[Query],
    options: RetrievalSettings,
    one_pass: Callable[[Sequence[Query], Sequence[frozenset[Place]], str | None], Pass],
) -> Answer:
    """All queries, answered in passes whose hit lists hold the same thing once: `one_pass` gets queries, the partitions
    that each meets, and the column of that thing. Nearly all queries of a list agree on it.

    Raises InputError where a query_id occurs twice, ModelError where queries and rows have vectors of different
    dimension.
    """
    if len({query.query_id for query in queries}) != len(queries):
        raise InputError("query_ids are not unique: each query needs a name of its own")
    _check_dimension(queries, base)
    existing = base.places
    plans = [plan(query, options, existing) for query in queries]
    candidates = np.zeros(len(queries), dtype=np.int64)
    hits = np.zeros(len(queries), dtype=np.int64)
    tables: list[tuple[NDArray[np.int64], pa.Table]] = []
    total = Scanned()
    for unique in sorted({_unique(query, options) for query in queries}):
        chosen = [number for number, query in enumerate(queries) if _unique(query, options) == unique]
        answered = one_pass([queries[n] for n in chosen], [plans[n] for n in chosen], _COLUMN[unique])
        numbers = np.asarray(chosen, dtype=np.int64)
        candidates[numbers] = answered.candidates
        hits += np.bincount(numbers[answered.query], minlength=len(queries))
        tables.append((numbers[answered.query], answered.hits))
        total += answered.scanned
    statuses = tuple(
        _status(query, places, int(hits[number]), int(candidates[number]), options)
        for number, (query, places) in enumerate(zip(queries, plans, strict=True))
    )
    return Answer(_in_order(tables), statuses, tuple(sorted(set().union(*plans))), existing, total)


def portions(
    spark: SparkSession, items: Sequence[Item], k: int, options: RetrievalSettings
) -> Iterator[Sequence[Item]]:
    """A list of queries in portions that can be searched in bounded memory; `k` is the most hits that one takes.

    Of an empty list there is one portion, which is empty too.
    """
    # Of each query series tasks name their nearest candidates, and where the frames of those are.
    k = max(k, options.series_candidates) if options.level == "series" else k
    # Tasks may leave some times k pairs of a query before their bounds are given up.
    size = max(1, min(QUERIES_AT_ONCE, _HITS_AT_ONCE // k, _PARTIAL_AT_ONCE // (4 * k * tasks_of(spark, options))))
    size = min(size, SERIES_AT_ONCE) if options.level == "series" else size
    for start in range(0, max(1, len(items)), size):
        yield items[start : start + size]


def _pass(
    spark: SparkSession,
    base: Base,
    queries: Sequence[Query],
    plans: Sequence[frozenset[Place]],
    options: RetrievalSettings,
    group: str | None,
    clock: Stages,
) -> Pass:
    """Queries whose hit lists all hold each value of column `group` once."""
    with clock.stage("plan"):
        job = job_of(queries, plans, options, base, group)
        job = replace(job, most_pairs=_PARTIAL_AT_ONCE // tasks_of(spark, options))
        files = [file for file in base.files if file.place in job.list_of]
        broadcast = spark.sparkContext.broadcast(job)
    parts: list[Bounded] = []
    try:
        if job.points is None:
            with clock.stage("scan"):
                found = run_tasks(spark, shares_of(files, tasks_of(spark, options)), retrieval_tasks.scanned, broadcast)
        else:
            found, parts = _bounded(spark, files, broadcast, clock)
    finally:
        broadcast.unpersist()
    with clock.stage("rank"):
        query, hits = _ranked(queries, found, job)
    told: list[Found | Bounded] = [*found, *parts]
    candidates = sum((each.candidates for each in told), np.zeros(len(queries), dtype=np.int64))
    read = sum((each.read for each in told), Read())
    return Pass(query, hits, candidates, Scanned(len(files), read.vectors, read.bytes))


def _bounded(
    spark: SparkSession, files: Sequence[DataFile], broadcast: Broadcast[Job], clock: Stages
) -> tuple[list[Found], list[Bounded]]:
    """What all tasks found, and what bounds came to where tasks could go by them."""
    job = broadcast.value
    # One task for each core: little is read, starting a task costs a twentieth of a second, and a task that sees more
    # of the pairs rules more of them out.
    tasks = spark.sparkContext.defaultParallelism
    shares = shares_of(files, tasks)
    with clock.stage("bound"):
        first = run_tasks(spark, shares, retrieval_tasks.bounded, broadcast)
    found = [each for each in first if isinstance(each, Found)]
    parts = [each for each in first if isinstance(each, Bounded)]
    if not parts:
        return found, []
    with clock.stage("rank"):
        places = np.concatenate([part.places for part in parts], axis=1)
        starts = np.cumsum([0, *(part.places.shape[1] for part in parts[:-1])])
        lefts = [replace(p.left, row=start + p.left.row) for p, start in zip(parts, starts, strict=True)]
        left, limit = bounds.settle(bounds.join(lefts), job.k)
    candidates = sum(int(part.candidates.sum()) for part in parts)
    if len(left.query) * bounds.USEFUL > candidates + 8 * bounds.USEFUL * int(job.k.sum()):
        again = [share for share, each in zip(shares, first, strict=True) if isinstance(each, Bounded)]
        nothing = [replace(part, candidates=np.zeros_like(part.candidates)) for part in parts]
        with clock.stage("scan"):
            return found + run_tasks(spark, again, retrieval_tasks.scanned, broadcast), nothing
    with clock.stage("rank"):
        wanted = _wanted(files, places, left, limit, tasks)
    with clock.stage("measure"):
        return found + run_tasks(spark, wanted, retrieval_tasks.measured, broadcast), parts


def _wanted(
    files: Sequence[DataFile],
    places: retrieval_tasks.Places,
    left: bounds.Left,
    limit: NDArray[np.float64],
    tasks: int,
) -> list[retrieval_tasks.Wanted]:
    """Pairs in at most as many parts as tasks, each query's in one of them; places: (3, r) of their rows.

    Queries whose nearest rows are neighbours go together, since they share rows.
    """
    left = left.take(bounds.by_query(left.query, left.lower))
    begins = np.flatnonzero(np.diff(left.query, prepend=-1))
    counts = np.diff(begins, append=len(left.query))
    by_place = np.lexsort(places[::-1, left.row[begins]])
    # A query goes where half of its pairs would be, were all pairs dealt out evenly.
    until = np.cumsum(counts[by_place])
    task = np.empty(len(begins), dtype=np.int64)
    task[by_place] = (until - counts[by_place] / 2) * tasks / max(1, len(left.query))
    of_pair = np.repeat(task, counts)
    wanted = []
    for number in np.unique(task):
        pairs = left.take(of_pair == number)
        rows, row = retrieval_tasks.renumbered(pairs.row, places.shape[1])
        named = set(places[0, rows].tolist())
        wanted.append(
            retrieval_tasks.Wanted(
                query=pairs.query,
                row=row.astype(np.int32),
                lower=pairs.lower,
                group=pairs.group,
                places=places[:, rows],
                files={file.number: file for file in files if file.number in named},
                limit=limit,
            )
        )
    return wanted


def _ranked(queries: Sequence[Query], found: Sequence[Found], job: Job) -> tuple[NDArray[np.int64], pa.Table]:
    """The best of what all tasks found: the query of each hit, and RESULTS_HITS in the order of query and rank."""
    found = [each for each in found if len(each.query)]
    if not found:
        return np.empty(0, dtype=np.int64), to_arrow_schema(schemas.RESULTS_HITS.schema).empty_table()
    rows = pa.concat_tables([each.rows for each in found])
    starts = np.cumsum([0, *(len(each.rows) for each in found[:-1])])
    query = np.concatenate([each.query for each in found])
    square = np.concatenate([each.square for each in found])
    row = np.concatenate([start + each.row for start, each in zip(starts, found, strict=True)])
    order, _ = kernel.nearest_groups(
        query, square, retrieval_tasks.keys_of(rows, job.group).take(row), job.k, job.cosine
    )
    query, square = query[order], square[order]
    return query, hits_of(queries, query, kernel.distances(square, job.cosine), rows.take(row[order]))


def hits_of(
    queries: Sequence[Query], query: NDArray[np.int64], distance: NDArray[np.float64], rows: pa.Table
) -> pa.Table:
    """RESULTS_HITS of n hits in the order of query and rank; query, distance: (n,); rows: SHOWN and partitions."""
    schema = to_arrow_schema(schemas.RESULTS_HITS.schema)
    begins = np.flatnonzero(np.diff(query, prepend=-1))
    rank = 1 + np.arange(len(query)) - np.repeat(begins, np.diff(begins, append=len(query)))
    own = {
        cols.QUERY_ID: pa.array([queries[number].query_id for number in query], pa.string()),
        cols.RANK: pa.array(rank, pa.int32()),
        cols.DISTANCE: pa.array(distance),
    }
    columns = [own[name] if name in own else rows.column(name) for name in schema.names]
    return pa.table(columns, schema.names).cast(schema)


def _in_order(tables: Sequence[tuple[NDArray[np.int64], pa.Table]]) -> pa.Table:
    if len(tables) == 1:
        return tables[0][1]
    schema = to_arrow_schema(schemas.RESULTS_HITS.schema)
    together = pa.concat_tables([schema.empty_table(), *(hits for _, hits in tables)])
    numbers = np.concatenate([np.empty(0, dtype=np.int64), *(numbers for numbers, _ in tables)])
    return together.take(np.argsort(numbers, kind="stable"))


def job_of(
    queries: Sequence[Query],
    plans: Sequence[frozenset[Place]],
    options: RetrievalSettings,
    base: Base,
    group: str | None,
) -> Job:
    meets: dict[Place, list[int]] = {}
    for number, places in enumerate(plans):
        for place in places:
            meets.setdefault(place, []).append(number)
    lists: dict[tuple[int, ...], int] = {}
    list_of = {place: lists.setdefault(tuple(numbers), len(lists)) for place, numbers in sorted(meets.items())}
    own: dict[str, dict[str, list[int]]] = {}
    for number, query in enumerate(queries):
        column = _COLUMN[query.own.exclude_same or options.exclude_same]
        value = None if column is None else getattr(query, column)
        if column is not None and value is not None:
            own.setdefault(column, {}).setdefault(value, []).append(number)
    kinds: dict[Within, int] = {}
    within_of = [kinds.setdefault(query.own.within, len(kinds)) for query in queries]
    free = set(kinds) <= {ANYTHING}
    vectors = np.stack([query.vector for query in queries]) if queries else np.zeros((0, base.dimension), np.float32)
    job = Job(
        vectors=vectors,
        k=np.array([query.own.k or options.k for query in queries], dtype=np.int64),
        list_of=list_of,
        lists=tuple(np.array(numbers, dtype=np.int64) for numbers in lists),
        own=own,
        within=() if free else tuple(kinds),
        within_of=np.array(within_of, dtype=np.int64),
        group=group,
        imputed=options.imputed == "include",
        cosine=options.metric == "cosine",
        block_bytes=options.block_mb * 2**20,
        store=base.store,
    )
    if options.method == "scan" or job.cosine or not queries:
        return job
    return replace(job, points=Points.of(*base.projection.apply(vectors)), defect=base.projection.defect)


def _unique(query: Query, options: RetrievalSettings) -> str:
    return query.own.unique or options.unique


def _check_dimension(queries: Sequence[Query], base: Base) -> None:
    shapes = {query.vector.shape for query in queries}
    if len(shapes) > 1:
        raise ModelError(f"the queries have vectors of different shapes {sorted(shapes)}: embed them by one model")
    if shapes and shapes != {(base.dimension,)}:
        raise ModelError(
            f"the queries have vectors of {shapes.pop()[0]} values, the index has {base.dimension}: they are of "
            "different models; search the index of the queries' model"
        )


def _status(query: Query, places: frozenset[Place], hits: int, candidates: int, options: RetrievalSettings) -> Status:
    named = tuple("/".join(place) for place in sorted(places))
    if hits:
        return Status(query.query_id, Answered.ANSWERED, None, named, candidates, hits)
    if places:
        own = "" if query.own.within == ANYTHING else "; sex, age or year as the row asks"
        excluded = query.own.exclude_same or options.exclude_same
        reason = f"nothing is left of the searched partitions (exclude_same {excluded}{own})"
    else:
        sought = "/".join(part or "any" for part in searched_terms(query, options))
        reason = f"the index has no partition for {sought} (prefilter {options.prefilter}, unknown {options.unknown})"
    return Status(query.query_id, Answered.NO_CANDIDATES, reason, named, candidates, 0)
