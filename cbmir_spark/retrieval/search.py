"""Images against images: queries → the nearest rows of FEATURES, exactly: plan → prune → bound → measure → rank.

Where each step runs. The driver plans which partitions each query searches, and names only their files to tasks (a
join prunes nothing: measured, 8 of 8 files, design decision 1). The queries are broadcast. Tasks read the projections
of those files and return the pairs that bounds cannot rule out; the driver merges these candidates, and tasks measure
them by whole vectors. Where bounds rule out too little, a task compares every vector instead. Either way the driver
ranks what the tasks return. Neither the number of tasks nor the order of rows can change an answer. tasks.py holds
what a task does, bounds.py and kernel.py the arithmetic.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyspark import Broadcast
from pyspark.sql import SparkSession

from cbmir_spark.config import RetrievalSettings
from cbmir_spark.index.layout import Place
from cbmir_spark.index.vector_files import DataFile, Read
from cbmir_spark.lake import schemas
from cbmir_spark.lake.arrow import arrow_schema
from cbmir_spark.lake.runs import Stages
from cbmir_spark.retrieval import bounds, kernel
from cbmir_spark.retrieval import tasks as search_tasks
from cbmir_spark.retrieval.answer import (
    COLUMN_OF,
    PARTIAL_AT_ONCE,
    Answer,
    Base,
    Group,
    GroupAnswer,
    Scanned,
    combine,
    groups_of,
    hits_of,
    plans_of,
)
from cbmir_spark.retrieval.bounds import Candidates, Points
from cbmir_spark.retrieval.distribute import run_tasks, shares_of, tasks_of
from cbmir_spark.retrieval.query import UNRESTRICTED, HitFilter, Query
from cbmir_spark.retrieval.tasks import Bounded, Found, Locations, MeasureInputs, SearchInputs


def search(
    spark: SparkSession,
    base: Base,
    queries: Sequence[Query],
    options: RetrievalSettings,
    stages: Stages | None = None,
) -> Answer:
    """Find the nearest rows of FEATURES for each query, exactly as brute force in float64 does.

    Ties are broken by (distance, image_id, frame). Raises InputError where a query_id occurs twice, ModelError where
    queries and rows have vectors of different dimension. Memory grows with the queries: see `batches` for a long list.
    Seconds are added to `stages`: plan, bound, measure, scan, rank.
    """
    clock = stages or Stages()
    plans = plans_of(queries, options, base)
    answered = []
    for group in groups_of(queries, options):
        chosen = [queries[number] for number in group.numbers]
        planned = [plans[number] for number in group.numbers]
        answered.append((group, _search_group(spark, base, group, chosen, planned, options, clock)))
    return combine(queries, plans, answered, options)


def _search_group(
    spark: SparkSession,
    base: Base,
    group: Group,
    queries: Sequence[Query],
    plans: Sequence[frozenset[Place]],
    options: RetrievalSettings,
    clock: Stages,
) -> GroupAnswer:
    with clock.stage("plan"):
        inputs = search_inputs(queries, plans, options, base, group.column)
        inputs = replace(inputs, most_pairs=PARTIAL_AT_ONCE // tasks_of(spark, options))
        files = [file for file in base.files if file.place in inputs.list_of]
        broadcast = spark.sparkContext.broadcast(inputs)
    bounded: list[Bounded] = []
    try:
        if inputs.points is None:
            with clock.stage("scan"):
                found = run_tasks(spark, shares_of(files, tasks_of(spark, options)), search_tasks.scan, broadcast)
        else:
            found, bounded = _bound(spark, files, broadcast, clock)
    finally:
        broadcast.unpersist()
    with clock.stage("rank"):
        query, hits = _rank(queries, found, inputs)
    results: list[Found | Bounded] = [*found, *bounded]
    candidates = sum((each.candidates for each in results), np.zeros(len(queries), dtype=np.int64))
    read = sum((each.read for each in results), Read())
    return GroupAnswer(query, hits, candidates, Scanned(len(files), read.vectors, read.bytes))


def _bound(
    spark: SparkSession, files: Sequence[DataFile], broadcast: Broadcast[SearchInputs], clock: Stages
) -> tuple[list[Found], list[Bounded]]:
    """Search with bounds first: what the tasks found, and the bounds of those tasks where bounds helped."""
    inputs = broadcast.value
    # One task per core: little is read, starting a task costs a twentieth of a second, and a task that sees more of
    # the pairs rules more of them out.
    tasks = spark.sparkContext.defaultParallelism
    shares = shares_of(files, tasks)
    with clock.stage("bound"):
        first = run_tasks(spark, shares, search_tasks.bound, broadcast)
    found = [each for each in first if isinstance(each, Found)]
    bounded = [each for each in first if isinstance(each, Bounded)]
    if not bounded:
        return found, []
    with clock.stage("rank"):
        locations = np.concatenate([each.locations for each in bounded], axis=1)
        starts = np.cumsum([0, *(each.locations.shape[1] for each in bounded[:-1])])
        renumbered = [
            replace(each.remaining, row=start + each.remaining.row) for each, start in zip(bounded, starts, strict=True)
        ]
        candidates, limit = bounds.prune(bounds.concatenate(renumbered), inputs.k)
    compared = sum(int(each.candidates.sum()) for each in bounded)
    if len(candidates.query) * bounds.USEFUL > compared + 8 * bounds.USEFUL * int(inputs.k.sum()):
        again = [share for share, each in zip(shares, first, strict=True) if isinstance(each, Bounded)]
        # The scan counts these tasks' candidates once more.
        uncounted = [replace(each, candidates=np.zeros_like(each.candidates)) for each in bounded]
        with clock.stage("scan"):
            return found + run_tasks(spark, again, search_tasks.scan, broadcast), uncounted
    with clock.stage("rank"):
        to_measure = _distribute(files, locations, candidates, limit, tasks)
    with clock.stage("measure"):
        return found + run_tasks(spark, to_measure, search_tasks.measure, broadcast), bounded


def _distribute(
    files: Sequence[DataFile],
    locations: Locations,
    candidates: Candidates,
    limit: NDArray[np.float64],
    tasks: int,
) -> list[MeasureInputs]:
    """Deal candidate pairs out to at most `tasks` tasks, all pairs of a query to one; locations: (3, r) of their rows.

    Queries whose nearest rows are neighbours share a task, since they share rows.
    """
    candidates = candidates.take(bounds.by_query(candidates.query, candidates.lower))
    begins = np.flatnonzero(np.diff(candidates.query, prepend=-1))
    counts = np.diff(begins, append=len(candidates.query))
    by_location = np.lexsort(locations[::-1, candidates.row[begins]])
    # A query goes where half of its pairs would be if all pairs were dealt out evenly.
    until = np.cumsum(counts[by_location])
    task = np.empty(len(begins), dtype=np.int64)
    task[by_location] = (until - counts[by_location] / 2) * tasks / max(1, len(candidates.query))
    of_pair = np.repeat(task, counts)
    dealt = []
    for number in np.unique(task):
        pairs = candidates.take(of_pair == number)
        rows, row = search_tasks.renumber(pairs.row, locations.shape[1])
        named = set(locations[0, rows].tolist())
        dealt.append(
            MeasureInputs(
                query=pairs.query,
                row=row.astype(np.int32),
                lower=pairs.lower,
                group=pairs.group,
                locations=locations[:, rows],
                files={file.number: file for file in files if file.number in named},
                limit=limit,
            )
        )
    return dealt


def _rank(queries: Sequence[Query], found: Sequence[Found], inputs: SearchInputs) -> tuple[NDArray[np.int64], pa.Table]:
    """Rank what all tasks found: the query of each hit, and RESULTS_HITS in the order of query and rank."""
    found = [each for each in found if len(each.query)]
    if not found:
        return np.empty(0, dtype=np.int64), arrow_schema(schemas.RESULTS_HITS.schema).empty_table()
    rows = pa.concat_tables([each.rows for each in found])
    starts = np.cumsum([0, *(len(each.rows) for each in found[:-1])])
    query = np.concatenate([each.query for each in found])
    square = np.concatenate([each.square for each in found])
    row = np.concatenate([start + each.row for start, each in zip(starts, found, strict=True)])
    keys = search_tasks.keys_of(rows, inputs.group).take(row)
    order, _ = kernel.nearest_groups(query, square, keys, inputs.k, inputs.cosine)
    query, square = query[order], square[order]
    return query, hits_of(queries, query, kernel.distances(square, inputs.cosine), rows.take(row[order]))


def search_inputs(
    queries: Sequence[Query],
    plans: Sequence[frozenset[Place]],
    options: RetrievalSettings,
    base: Base,
    group: str | None,
) -> SearchInputs:
    """Gather what tasks need to know of some planned queries; `group` is the column held at most once per hit list."""
    searching: dict[Place, list[int]] = {}
    for number, places in enumerate(plans):
        for place in places:
            searching.setdefault(place, []).append(number)
    lists: dict[tuple[int, ...], int] = {}
    list_of = {place: lists.setdefault(tuple(numbers), len(lists)) for place, numbers in sorted(searching.items())}
    exclusions: dict[str, dict[str, list[int]]] = {}
    for number, query in enumerate(queries):
        column = COLUMN_OF[query.overrides.exclude_same or options.exclude_same]
        value = None if column is None else getattr(query, column)
        if column is not None and value is not None:
            exclusions.setdefault(column, {}).setdefault(value, []).append(number)
    filters: dict[HitFilter, int] = {}
    filter_of = [filters.setdefault(query.overrides.hit_filter, len(filters)) for query in queries]
    unrestricted = set(filters) <= {UNRESTRICTED}
    vectors = np.stack([query.vector for query in queries]) if queries else np.zeros((0, base.dimension), np.float32)
    inputs = SearchInputs(
        vectors=vectors,
        k=np.array([query.overrides.k or options.k for query in queries], dtype=np.int64),
        list_of=list_of,
        lists=tuple(np.array(numbers, dtype=np.int64) for numbers in lists),
        exclusions=exclusions,
        filters=() if unrestricted else tuple(filters),
        filter_of=np.array(filter_of, dtype=np.int64),
        group=group,
        imputed=options.imputed == "include",
        cosine=options.metric == "cosine",
        block_bytes=options.block_mb * 2**20,
        store=base.store,
    )
    if options.method == "scan" or inputs.cosine or not queries:
        return inputs
    return replace(inputs, points=Points.of(*base.projection.apply(vectors)), defect=base.projection.defect)
