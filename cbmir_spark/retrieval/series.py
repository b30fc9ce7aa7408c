"""Series against series: a list of query series → the nearest series of the archive.

Where each step runs. The driver plans by a query series' partition as search.py does by an image's. Tasks read the
frames of those partitions and add them up by volume (volume_task.py); a shuffle brings a volume's sums together, and
tasks compare the descriptors with those of the queries, which are broadcast. Of each query the `series_candidates`
nearest volumes are then compared frame by frame, in tasks that read those frames by their place. Within what is so
defined answers are exact: neither the number of tasks nor the order of rows can change them.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyspark import RDD
from pyspark.sql import SparkSession
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import to_arrow_schema

from cbmir_spark.config import RetrievalSettings, Settings
from cbmir_spark.dicom.vocabulary_tables import UNKNOWN
from cbmir_spark.index.open import Index
from cbmir_spark.index.vector_files import DataFile, Place, Read
from cbmir_spark.lake import columns as cols
from cbmir_spark.lake import schemas
from cbmir_spark.lake.runs import Stages
from cbmir_spark.retrieval import kernel, series_tasks
from cbmir_spark.retrieval.distribute import run_tasks, shares_of, tasks_of
from cbmir_spark.retrieval.query import Answered, Query, Status, Wanted
from cbmir_spark.retrieval.query_list import SERIES_INSTANCE_UID, SOP_INSTANCE_UID
from cbmir_spark.retrieval.resolve import Resolved
from cbmir_spark.retrieval.resolve import pseudonyms_of as names_of
from cbmir_spark.retrieval.search import Answer, Base, Pass, Scanned, by_passes, hits_of, job_of
from cbmir_spark.retrieval.series_tasks import NOTHING, Compared, Comparison, Key, Near, Volume


@dataclass(frozen=True)
class ResolvedSeries:
    """Query series as `queries.Resolved` has images, and their volumes by query_id."""

    resolved: Resolved
    volumes: Mapping[str, Volume]


# --- resolve: a row of the list → a query and its volume ---


def resolve(
    spark: SparkSession, rows: Sequence[Wanted], index: Index, base: Base, settings: Settings
) -> ResolvedSeries:
    """The query series of a list's rows, which may name a series or any image of one.

    A query is the volume that the image is in, or the largest of a named series. Its vector is the descriptor; image,
    frame and predicted class are those of its middle frame. Raises TableError where UIDs are named and the lake was
    made with another key.
    """
    if not rows:
        return ResolvedSeries(Resolved(), {})
    uids = {SOP_INSTANCE_UID, SERIES_INSTANCE_UID}
    names = names_of(spark, settings) if any(row.naming in uids for row in rows) else None
    named: dict[str, tuple[str, str]] = {}
    for row in rows:
        kind = "series" if row.naming in (cols.SERIES_ID, SERIES_INSTANCE_UID) else "image"
        value = names.of_kind(kind, row.value) if names is not None and row.naming in uids else row.value
        named[row.query_id] = (schemas.OWNERS[kind], value)
    frames = _frames(index, set(named.values()))
    by_name: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for frame in frames:
        for column in (cols.SERIES_ID, cols.IMAGE_ID):
            by_name.setdefault((column, frame[column]), []).append(frame)
    volume_of = {name: _largest(by_name[name]) for name in set(named.values()) if name in by_name}
    found = described(spark, base, frozenset(volume_of.values()), settings.retrieval)
    own = {row.query_id: row.own for row in rows}
    queries, volumes, failed = {}, {}, {}
    for query_id, name in named.items():
        if name not in volume_of:
            what = "series" if name[0] == cols.SERIES_ID else "image"
            reason = f"the {what} is not in the index of {index.manifest.model_id}"
            failed[query_id] = Status(query_id, Answered.NOT_FOUND, reason)
            continue
        key = volume_of[name]
        volumes[query_id], vector = found[key]
        queries[query_id] = _query(query_id, key, by_name[cols.SERIES_ID, key[1]], vector, own[query_id])
    return ResolvedSeries(Resolved(queries, failed), volumes)


_OF_FRAME = (
    cols.IMAGE_ID,
    cols.FRAME,
    cols.SERIES_ID,
    cols.STUDY_ID,
    cols.PATIENT_ID,
    cols.PREDICTED,
    cols.PROBABILITY,
    cols.BODY_PART_SOURCE,
    cols.MODALITY,
    cols.BODY_PART,
)


def _frames(index: Index, named: set[tuple[str, str]]) -> list[dict[str, Any]]:
    """All frames of the series that are named, or that have a named image; without vectors."""
    spark = index.rows.sparkSession
    rows = index.rows.select(*_OF_FRAME)
    series = {value for column, value in named if column == cols.SERIES_ID}
    images = [(value,) for column, value in sorted(named) if column == cols.IMAGE_ID]
    if images:
        wanted = F.broadcast(spark.createDataFrame(images, f"{cols.IMAGE_ID} string"))
        found = rows.join(wanted, on=cols.IMAGE_ID, how="left_semi").select(cols.SERIES_ID).distinct().collect()
        series |= {row[cols.SERIES_ID] for row in found}
    if not series:
        return []
    wanted = F.broadcast(spark.createDataFrame([(each,) for each in sorted(series)], f"{cols.SERIES_ID} string"))
    return [row.asDict() for row in rows.join(wanted, on=cols.SERIES_ID, how="left_semi").collect()]


def _key(frame: Mapping[str, Any]) -> Key:
    return (frame[cols.MODALITY], frame[cols.BODY_PART]), frame[cols.SERIES_ID]


def _largest(frames: Iterable[Mapping[str, Any]]) -> Key:
    """The volume that most of some frames are in; of equals the first by name."""
    counts: dict[Key, int] = {}
    for frame in frames:
        counts[_key(frame)] = counts.get(_key(frame), 0) + 1
    return min(counts, key=lambda key: (-counts[key], key))


def _query(
    query_id: str, key: Key, frames: Sequence[Mapping[str, Any]], vector: NDArray[np.float32], own: Any
) -> Query:
    inside = sorted((f for f in frames if _key(f) == key), key=lambda frame: (frame[cols.IMAGE_ID], frame[cols.FRAME]))
    middle = inside[len(inside) // 2]
    same = {name: middle[name] for name in (cols.IMAGE_ID, cols.SERIES_ID, cols.STUDY_ID, cols.PATIENT_ID, cols.FRAME)}
    # An imputed body part is no tag: the query then goes by its predicted class.
    tagged = middle[cols.BODY_PART_SOURCE] == cols.FROM_TAG
    return Query(
        query_id=query_id,
        vector=vector,
        modality=middle[cols.MODALITY],
        body_part=middle[cols.BODY_PART] if tagged else UNKNOWN,
        predicted=middle[cols.PREDICTED],
        probability=middle[cols.PROBABILITY],
        own=own,
        **same,
    )


# --- search ---


def search(
    spark: SparkSession,
    base: Base,
    queries: Sequence[Query],
    own: Mapping[str, Volume],
    options: RetrievalSettings,
    stages: Stages | None = None,
) -> Answer:
    """The nearest series of each query; `own` has the queries' volumes by query_id.

    A hit is a series, shown by the frame that matches best; ties go by series. `unique: none` lets a series occur once
    for each partition that it has frames in; a query's own series is left out wherever its own image would be. Raises
    InputError and ModelError as `search.search` does. What it took is added to `stages`: describe, compare.
    """
    clock = stages or Stages()

    def one_pass(chosen: Sequence[Query], plans: Sequence[frozenset[Place]], group: str | None) -> Pass:
        with clock.stage("describe"):
            near, scanned = _nearest(spark, base, chosen, plans, options, group)
        compared = [
            Compared(number, query.own.k or options.k, own[query.query_id], others)
            for number, (query, others) in enumerate(zip(chosen, near.by_query(len(chosen)), strict=True))
            if others
        ]
        with clock.stage("compare"):
            query, hits, read = _ranked(spark, base, chosen, compared, options)
        return Pass(query, hits, near.candidates, scanned + Scanned(vectors=read.vectors, bytes=read.bytes))

    return by_passes(base, queries, options, one_pass)


def _nearest(
    spark: SparkSession,
    base: Base,
    queries: Sequence[Query],
    plans: Sequence[frozenset[Place]],
    options: RetrievalSettings,
    group: str | None,
) -> tuple[Near, Scanned]:
    """The candidates of each query, by descriptor."""
    by_descriptor = options.replace(method="scan", metric="euclidean")
    wished = [
        replace(
            query,
            own=replace(
                query.own,
                k=max(query.own.k or options.k, options.series_candidates),
                exclude_same=_series_at_least(query.own.exclude_same or options.exclude_same),
            ),
        )
        for query in queries
    ]
    job = job_of(wished, plans, by_descriptor, base, group)
    files = [file for file in base.files if file.place in job.list_of]
    if not files:
        return Near.nothing(len(queries)), Scanned()
    broadcast = spark.sparkContext.broadcast(job)

    def nearest(parts: Iterable[tuple[Key, Any]]) -> Iterator[Near | Read]:
        read = Read()

        def volumes() -> Iterator[tuple[Volume, NDArray[np.float32]]]:
            nonlocal read
            for key, part in parts:
                if key == NOTHING:
                    read += part
                else:
                    yield series_tasks.described(key, part)

        yield series_tasks.nearest(volumes(), broadcast.value)
        yield read

    try:
        told = _parts(spark, base, files, None, options).mapPartitions(nearest).collect()
    finally:
        broadcast.unpersist()
    read = sum((each for each in told if isinstance(each, Read)), Read())
    found = [each for each in told if isinstance(each, Near)]
    return _best(found, job.k, sorted(job.list_of), group), Scanned(len(files), read.vectors, read.bytes)


def _series_at_least(exclude_same: str) -> str:
    return "series" if exclude_same == "image" else exclude_same


def _parts(
    spark: SparkSession,
    base: Base,
    files: Sequence[DataFile],
    wanted: frozenset[Key] | None,
    options: RetrievalSettings,
) -> RDD[tuple[Key, Any]]:
    """All that the files hold of each volume, and, under NOTHING, what was read; lazy."""
    tasks = tasks_of(spark, options)
    shares = shares_of(files, tasks)
    job = _comparison(base, [], options)
    dimension, imputed = base.dimension, wanted is not None or options.imputed == "include"
    told = spark.sparkContext.parallelize(shares, len(shares)).flatMap(
        lambda each: series_tasks.parts(each, wanted, dimension, imputed, job)
    )
    return told.reduceByKey(series_tasks.merged, tasks)


def described(
    spark: SparkSession, base: Base, wanted: frozenset[Key], options: RetrievalSettings
) -> dict[Key, tuple[Volume, NDArray[np.float32]]]:
    """Some volumes and their descriptors, by partition and series. Imputed frames count, whatever the options say."""
    places = {place for place, _ in wanted}
    files = [file for file in base.files if file.place in places]
    if not files:
        return {}
    told = _parts(spark, base, files, wanted, options).filter(lambda each: each[0] != NOTHING)
    found = told.map(lambda each: series_tasks.described(*each)).collect()
    return {volume.key: (volume, vector) for volume, vector in found}


def _comparison(base: Base, files: Iterable[DataFile], options: RetrievalSettings) -> Comparison:
    by_number = {file.number: file for file in files}
    return Comparison(by_number, base.dimension, options.metric == "cosine", options.block_mb * 2**20, base.store)


def _best(found: Sequence[Near], k: NDArray[np.int64], places: Sequence[Place], group: str | None) -> Near:
    """The nearest of what all tasks found, by query and distance."""
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
    return Near(query[order], square[order], volume[order], volumes, candidates)


def _ranked(
    spark: SparkSession, base: Base, queries: Sequence[Query], compared: Sequence[Compared], options: RetrievalSettings
) -> tuple[NDArray[np.int64], pa.Table, Read]:
    """Candidates by their frames: the query of each hit, RESULTS_HITS, and what was read."""
    # Queries that have candidates in common go together, since those are read once.
    by_candidate = sorted(compared, key=lambda each: (each.others[0].key, each.query))
    tasks = min(len(compared), tasks_of(spark, options))
    shares = [list(part) for part in _cut(by_candidate, tasks)]
    broadcast = spark.sparkContext.broadcast(_comparison(base, base.files, options))
    try:
        found = [each for each in run_tasks(spark, shares, series_tasks.ranked, broadcast) if len(each.query)]
    finally:
        broadcast.unpersist()
    if not found:
        return np.empty(0, dtype=np.int64), to_arrow_schema(schemas.RESULTS_HITS.schema).empty_table(), Read()
    query = np.concatenate([each.query for each in found])
    distance = np.concatenate([each.distance for each in found])
    rows = pa.concat_tables([each.rows.take(each.row) for each in found])
    order = np.argsort(query, kind="stable")
    hits = hits_of(queries, query[order], distance[order], rows.take(order))
    return query[order], hits, sum((each.read for each in found), Read())


def _cut(items: Sequence[Compared], parts: int) -> Iterator[Sequence[Compared]]:
    edges = np.linspace(0, len(items), parts + 1).astype(int)
    yield from (items[start:end] for start, end in itertools.pairwise(edges))
