"""Series against series: query series → the nearest series of the archive.

Where each step runs. The driver plans by the partition of a query series as search.py does by an image's. Tasks read
the frames of those partitions and sum them up by volume (series_tasks.py); a shuffle merges the sums of a volume, and
tasks compare the descriptors with those of the queries, which are broadcast. The `series_candidates` nearest volumes of
each query are then compared frame by frame, in tasks that read those frames by location. Given this definition answers
are exact: neither the number of tasks nor the order of rows can change them.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyspark import RDD
from pyspark.sql import SparkSession

from cbmir_spark.config import RetrievalSettings
from cbmir_spark.index.layout import Place
from cbmir_spark.index.vector_files import DataFile, Read
from cbmir_spark.lake import columns as cols
from cbmir_spark.lake import schemas
from cbmir_spark.lake.arrow import arrow_schema
from cbmir_spark.lake.runs import Stages
from cbmir_spark.retrieval import kernel, series_tasks
from cbmir_spark.retrieval.answer import (
    Answer,
    Base,
    GroupAnswer,
    Scanned,
    combine,
    groups_of,
    hits_of,
    plans_of,
)
from cbmir_spark.retrieval.distribute import run_tasks, shares_of, tasks_of
from cbmir_spark.retrieval.query import Query
from cbmir_spark.retrieval.search import search_inputs
from cbmir_spark.retrieval.series_tasks import (
    READ_STATISTICS,
    ComparisonInputs,
    Key,
    NearestVolumes,
    QueryVolume,
    Volume,
)


def search(
    spark: SparkSession,
    base: Base,
    queries: Sequence[Query],
    volumes: Mapping[str, Volume],
    options: RetrievalSettings,
    stages: Stages | None = None,
) -> Answer:
    """Find the nearest series of each query; `volumes` are the queries' by query_id.

    A hit is a series, shown by its best matching frame; ties are broken by series. `unique: none` lets a series occur
    once per partition that it has frames in; wherever a query's image is excluded, its whole series is. Raises
    InputError and ModelError as `search.search` does. Seconds are added to `stages`: describe, compare.
    """
    clock = stages or Stages()
    plans = plans_of(queries, options, base)
    answered = []
    for group in groups_of(queries, options):
        chosen = [queries[number] for number in group.numbers]
        planned = [plans[number] for number in group.numbers]
        with clock.stage("describe"):
            near, scanned = _nearest(spark, base, chosen, planned, options, group.column)
        compared = [
            QueryVolume(number, query.overrides.k or options.k, volumes[query.query_id], candidates)
            for number, (query, candidates) in enumerate(zip(chosen, near.by_query(len(chosen)), strict=True))
            if candidates
        ]
        with clock.stage("compare"):
            query, hits, read = _rank(spark, base, chosen, compared, options)
        scanned += Scanned(vectors=read.vectors, bytes=read.bytes)
        answered.append((group, GroupAnswer(query, hits, near.candidates, scanned)))
    return combine(queries, plans, answered, options)


def _nearest(
    spark: SparkSession,
    base: Base,
    queries: Sequence[Query],
    plans: Sequence[frozenset[Place]],
    options: RetrievalSettings,
    group: str | None,
) -> tuple[NearestVolumes, Scanned]:
    """Find the candidates of each query, by descriptor."""
    by_descriptor = options.replace(method="scan", metric="euclidean")
    asked = [
        replace(
            query,
            overrides=replace(
                query.overrides,
                k=max(query.overrides.k or options.k, options.series_candidates),
                exclude_same=_series_at_least(query.overrides.exclude_same or options.exclude_same),
            ),
        )
        for query in queries
    ]
    inputs = search_inputs(asked, plans, by_descriptor, base, group)
    files = [file for file in base.files if file.place in inputs.list_of]
    if not files:
        return NearestVolumes.nothing(len(queries)), Scanned()
    broadcast = spark.sparkContext.broadcast(inputs)

    def nearest(parts: Iterable[tuple[Key, Any]]) -> Iterator[NearestVolumes | Read]:
        read = Read()

        def volumes() -> Iterator[tuple[Volume, NDArray[np.float32]]]:
            nonlocal read
            for key, part in parts:
                if key == READ_STATISTICS:
                    read += part
                else:
                    yield series_tasks.describe(key, part)

        yield series_tasks.nearest(volumes(), broadcast.value)
        yield read

    try:
        found_parts = _parts(spark, base, files, None, options).mapPartitions(nearest).collect()
    finally:
        broadcast.unpersist()
    read = sum((each for each in found_parts if isinstance(each, Read)), Read())
    found = [each for each in found_parts if isinstance(each, NearestVolumes)]
    return _best(found, inputs.k, sorted(inputs.list_of), group), Scanned(len(files), read.vectors, read.bytes)


def _series_at_least(exclude_same: str) -> str:
    return "series" if exclude_same == "image" else exclude_same


def _parts(
    spark: SparkSession,
    base: Base,
    files: Sequence[DataFile],
    wanted: frozenset[Key] | None,
    options: RetrievalSettings,
) -> RDD[tuple[Key, Any]]:
    """Collect what the files hold of each volume, and, under READ_STATISTICS, what was read; lazy."""
    tasks = tasks_of(spark, options)
    shares = shares_of(files, tasks)
    inputs = _comparison(base, [], options)
    dimension, imputed = base.dimension, wanted is not None or options.imputed == "include"
    found_parts = spark.sparkContext.parallelize(shares, len(shares)).flatMap(
        lambda each: series_tasks.parts(each, wanted, dimension, imputed, inputs)
    )
    return found_parts.reduceByKey(series_tasks.merge_values, tasks)


def describe(
    spark: SparkSession, base: Base, wanted: frozenset[Key], options: RetrievalSettings
) -> dict[Key, tuple[Volume, NDArray[np.float32]]]:
    """Build some volumes and their descriptors, by partition and series; imputed frames count, whatever the options."""
    places = {place for place, _ in wanted}
    files = [file for file in base.files if file.place in places]
    if not files:
        return {}
    found_parts = _parts(spark, base, files, wanted, options).filter(lambda each: each[0] != READ_STATISTICS)
    found = found_parts.map(lambda each: series_tasks.describe(*each)).collect()
    return {volume.key: (volume, vector) for volume, vector in found}


def _comparison(base: Base, files: Iterable[DataFile], options: RetrievalSettings) -> ComparisonInputs:
    by_number = {file.number: file for file in files}
    return ComparisonInputs(by_number, base.dimension, options.metric == "cosine", options.block_mb * 2**20, base.store)


def _best(
    found: Sequence[NearestVolumes], k: NDArray[np.int64], places: Sequence[Place], group: str | None
) -> NearestVolumes:
    """Merge what all tasks found, by query and distance."""
    volumes = [volume for near in found for volume in near.volumes]
    starts = np.cumsum([0, *(len(near.volumes) for near in found[:-1])])
    query = np.concatenate([near.query for near in found])
    square = np.concatenate([near.square for near in found])
    volume = np.concatenate([start + near.volume for start, near in zip(starts, found, strict=True)])
    named = {cols.SERIES_ID: [each.series_id for each in volumes]}
    if group is not None and group != cols.SERIES_ID:
        named[group] = [each.facts[group] for each in volumes]
    keys = kernel.Keys(
        np.array(named[cols.SERIES_ID], dtype=np.bytes_),
        np.array([places.index(each.place) for each in volumes], dtype=np.int64),
        None if group is None else np.array(named[group], dtype=np.bytes_),
    )
    order, _ = kernel.nearest_groups(query, square, keys.take(volume), k)
    candidates = sum((near.candidates for near in found), np.zeros(len(k), dtype=np.int64))
    return NearestVolumes(query[order], square[order], volume[order], volumes, candidates)


def _rank(
    spark: SparkSession,
    base: Base,
    queries: Sequence[Query],
    compared: Sequence[QueryVolume],
    options: RetrievalSettings,
) -> tuple[NDArray[np.int64], pa.Table, Read]:
    """Rank candidates by their frames: the query of each hit, RESULTS_HITS, and what was read."""
    # Queries that have candidates in common share a task, since it reads those once.
    by_candidate = sorted(compared, key=lambda each: (each.candidates[0].key, each.query))
    tasks = min(len(compared), tasks_of(spark, options))
    shares = [list(part) for part in _cut(by_candidate, tasks)]
    broadcast = spark.sparkContext.broadcast(_comparison(base, base.files, options))
    try:
        found = [each for each in run_tasks(spark, shares, series_tasks.rank, broadcast) if len(each.query)]
    finally:
        broadcast.unpersist()
    if not found:
        return np.empty(0, dtype=np.int64), arrow_schema(schemas.RESULTS_HITS.schema).empty_table(), Read()
    query = np.concatenate([each.query for each in found])
    distance = np.concatenate([each.distance for each in found])
    rows = pa.concat_tables([each.rows.take(each.row) for each in found])
    order = np.argsort(query, kind="stable")
    hits = hits_of(queries, query[order], distance[order], rows.take(order))
    return query[order], hits, sum((each.read for each in found), Read())


def _cut(items: Sequence[QueryVolume], parts: int) -> Iterator[Sequence[QueryVolume]]:
    edges = np.linspace(0, len(items), parts + 1).astype(int)
    yield from (items[start:end] for start, end in itertools.pairwise(edges))
