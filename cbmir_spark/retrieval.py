"""A list of query images → the nearest images of the archive, exactly: plan → prune → broadcast → kernel → top-k.

Where each step runs: the driver reads the list and plans which partitions each query may see; the scan is filtered
by those partitions before anything is joined, because a join alone prunes nothing (measured: 8 of 8 files, design
decision 1); the queries are broadcast; each task keeps one partial top-k over all that it scans (scan_task.py); one
shuffle by query merges them. Neither the number of tasks nor the order of rows can change an answer.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from pyspark import StorageLevel
from pyspark.sql import DataFrame, SparkSession, Window
from pyspark.sql import functions as F

from cbmir_spark import features, model, report, scan_task, storage
from cbmir_spark import tables as t
from cbmir_spark.config import RetrievalSettings, Settings, StorageSettings
from cbmir_spark.errors import InputError, ModelError, TableError
from cbmir_spark.queries import Answered, Query, Resolved, Status, Wanted, read_queries, resolve
from cbmir_spark.record import Record
from cbmir_spark.scan_task import Job, Place
from cbmir_spark.vocabulary import UNKNOWN


@dataclass(frozen=True)
class Scanned:
    """Files and bytes that an executed plan read."""

    files: int
    bytes: int


@dataclass(frozen=True)
class Answer:
    """Hits (RESULTS_HITS, cached: `hits.unpersist()` when done) and one status a query, in the queries' order."""

    hits: DataFrame
    statuses: tuple[Status, ...]
    partitions: tuple[Place, ...]
    existing: tuple[Place, ...]
    scanned: Scanned


@dataclass(frozen=True)
class Report:
    """What a retrieve run did."""

    model_id: str
    index_version: int
    queries: int
    answered: int
    empty: int
    failed: int
    statuses: Mapping[str, int]
    partitions_searched: int
    partitions: int
    files_read: int
    files: int
    bytes_read: int
    bytes: int
    ignored_columns: tuple[str, ...]
    seconds: Mapping[str, float]
    out: str
    gallery: str | None


# --- plan; on the driver ---


def plan(query: Query, options: RetrievalSettings, existing: Iterable[Place]) -> frozenset[Place]:
    """The partitions that a query meets, of those that exist.

    `tags` goes by the query's body part, or by its predicted class where the tags have none; `predicted` by the
    predicted class. A prediction below `min_probability`, or none, widens either to the query's modality, which is
    all that `modality` looks at. Where not even the modality is known, and under `none`, all are searched. In every
    mode `unknown` says whether the partitions of the UNKNOWN body part are: with `include` they join the query's own.
    """
    modality, body_part = _sought(query, options)
    found = set()
    for place in existing:
        if modality not in (None, place[0]):
            continue
        if place[1] == UNKNOWN:
            if options.unknown == "include":
                found.add(place)
        elif body_part in (None, place[1]):
            found.add(place)
    return frozenset(found)


def _sought(query: Query, options: RetrievalSettings) -> tuple[str | None, str | None]:
    """Modality and body part to search; None for any."""
    if options.prefilter == "none":
        return None, None
    sure = query.predicted != UNKNOWN and query.probability >= options.min_probability
    predicted_modality = query.predicted.rpartition("/")[0] if sure else ""
    modality = query.modality if query.modality != UNKNOWN else predicted_modality or None
    if options.prefilter == "modality":
        return modality, None
    if options.prefilter == "tags" and query.body_part != UNKNOWN:
        return modality, query.body_part
    return modality, model.body_part_of(query.predicted) if sure else None


def partitions_of(rows: DataFrame) -> tuple[Place, ...]:
    """The partitions that hold rows, sorted: one action on partition columns, at most some hundred values."""
    found = rows.select(t.MODALITY, t.BODY_PART).distinct().collect()
    return tuple(sorted((row[t.MODALITY], row[t.BODY_PART]) for row in found))


# --- search ---

_GROUP: Mapping[str, str | None] = {
    "none": None,
    "image": t.IMAGE_ID,
    "series": t.SERIES_ID,
    "study": t.STUDY_ID,
    "patient": t.PATIENT_ID,
}


def search(spark: SparkSession, rows: DataFrame, queries: Sequence[Query], options: RetrievalSettings) -> Answer:
    """The k nearest rows of FEATURES for each query, by Euclidean distance, exactly as float64 brute force has them.

    `rows` may be filtered beforehand. Ties go by (distance, image_id, frame). Raises InputError where a query_id
    occurs twice, ModelError where queries and rows have vectors of different dimension.
    """
    if len({query.query_id for query in queries}) != len(queries):
        raise InputError("query_ids are not unique: each query needs a name of its own")
    existing = partitions_of(rows)
    plans = [plan(query, options, existing) for query in queries]
    searched = sorted(set().union(*plans))
    job = _job(queries, plans, options)
    if searched:
        _check_dimension(rows, job)
    pruned = features.scan(rows, searched)
    if options.imputed == "exclude":
        pruned = pruned.where(F.col(t.BODY_PART_SOURCE) != t.FROM_PREDICTION)
    tasks = options.tasks_per_core * spark.sparkContext.defaultParallelism
    broadcast = spark.sparkContext.broadcast(job)
    partial = pruned.select(*scan_task.COLUMNS).coalesce(tasks).mapInArrow(scan_task.of(broadcast), scan_task.PARTIAL)
    merged = merge(partial, options.k, job.group).persist(StorageLevel.MEMORY_AND_DISK)
    counted = merged.groupBy(t.QUERY_ID).agg(F.count("*").alias(t.HITS), F.max(t.CANDIDATES).alias(t.CANDIDATES))
    found = {row[t.QUERY_ID]: (row[t.HITS], row[t.CANDIDATES]) for row in counted.collect()}
    statuses = tuple(
        _answered(query, places, *found.get(query.query_id, (0, 0)), options)
        for query, places in zip(queries, plans, strict=True)
    )
    broadcast.unpersist()
    return Answer(merged.drop(t.CANDIDATES), statuses, tuple(searched), existing, scanned(counted))


def merge(partial: DataFrame, k: int, group: str | None) -> DataFrame:
    """Partial results of all tasks → RESULTS_HITS and `candidates`, the rows that the query was compared with.

    Each task holds the k best groups among its rows, each by its best row; so the k best of all are among them.
    """
    order = (F.col(t.DISTANCE), F.col(t.IMAGE_ID), F.col(t.FRAME))
    of_query = Window.partitionBy(t.QUERY_ID)
    counted = partial.withColumn(t.CANDIDATES, F.sum(t.CANDIDATES).over(of_query))
    if group is not None:
        best = F.row_number().over(Window.partitionBy(t.QUERY_ID, group).orderBy(*order))
        counted = counted.withColumn("place", best).where(F.col("place") == 1)
    ranked = counted.withColumn(t.RANK, F.row_number().over(of_query.orderBy(*order))).where(F.col(t.RANK) <= k)
    return ranked.select(*t.RESULTS_HITS.schema.names, t.CANDIDATES)


def _job(queries: Sequence[Query], plans: Sequence[frozenset[Place]], options: RetrievalSettings) -> Job:
    meets: dict[Place, list[int]] = {}
    for number, places in enumerate(plans):
        for place in places:
            meets.setdefault(place, []).append(number)
    lists: dict[tuple[int, ...], int] = {}
    list_of = {place: lists.setdefault(tuple(numbers), len(lists)) for place, numbers in sorted(meets.items())}
    exclude = _GROUP[options.exclude_same]
    own: dict[str, list[int]] = {}
    for number, query in enumerate(queries):
        value = None if exclude is None else getattr(query, exclude)
        if value is not None:
            own.setdefault(value, []).append(number)
    dimensions = {query.vector.shape for query in queries}
    if len(dimensions) > 1:
        raise ModelError(f"the queries have vectors of different shapes {sorted(dimensions)}: embed them by one model")
    return Job(
        query_ids=tuple(query.query_id for query in queries),
        vectors=np.stack([query.vector for query in queries]) if queries else np.zeros((0, 1), dtype=np.float32),
        list_of=list_of,
        lists=tuple(np.array(numbers, dtype=np.int64) for numbers in lists),
        exclude=exclude,
        own=own,
        group=_GROUP[options.unique],
        k=options.k,
        block_bytes=options.block_mb * 2**20,
    )


def _check_dimension(rows: DataFrame, job: Job) -> None:
    first = rows.select(F.size(t.VECTOR).alias("size")).first()
    if first is not None and first["size"] != job.vectors.shape[1]:
        raise ModelError(
            f"the queries have vectors of {job.vectors.shape[1]} values, the index has {first['size']}: they are of "
            "different models; search the index of the queries' model"
        )


def _answered(query: Query, places: frozenset[Place], hits: int, candidates: int, options: RetrievalSettings) -> Status:
    named = tuple("/".join(place) for place in sorted(places))
    if hits:
        return Status(query.query_id, Answered.ANSWERED, None, named, candidates, hits)
    if places:
        reason = f"nothing is left of the searched partitions (exclude_same {options.exclude_same})"
    else:
        sought = "/".join(part or "any" for part in _sought(query, options))
        reason = f"the index has no partition for {sought} (prefilter {options.prefilter}, unknown {options.unknown})"
    return Status(query.query_id, Answered.NO_CANDIDATES, reason, named, candidates, 0)


# --- what was read ---


def scanned(df: DataFrame) -> Scanned:
    """Files and bytes that the executed plan of `df`, an action on which has ended, took from file scans."""
    files = size = 0
    plans = [df._jdf.queryExecution().executedPlan()]
    while plans:
        plan = plans.pop()
        kind = plan.getClass().getSimpleName()
        if kind == "AdaptiveSparkPlanExec":
            plans.append(plan.executedPlan())
        elif kind.endswith("QueryStageExec"):
            plans.append(plan.plan())
        elif kind == "InMemoryTableScanExec":
            plans.append(plan.relation().cachedPlan())
        elif kind == "FileSourceScanExec":
            metrics = plan.metrics()
            files += metrics.apply("numFiles").value()
            size += metrics.apply("filesSize").value()
        elif kind != "ReusedExchangeExec":
            children = plan.children()
            plans += [children.apply(number) for number in range(children.size())]
    return Scanned(files, size)


# --- the job ---


def run(spark: SparkSession, settings: Settings) -> Report:
    """Answer the query list of `retrieval.queries`: hits, statuses, what the queries were and a gallery, in one folder.

    Raises InputError for a list that cannot be used or a folder that holds something already, ModelError and
    TableError as `features.open_index` does; all before anything is written.
    """
    record = Record("retrieve")
    options = settings.retrieval
    if options.queries is None:
        raise InputError("no query list named: give --queries FILE, a CSV or Parquet file")
    lake = t.Lake.of(settings)
    out = storage.canonical(options.out or storage.join(lake.uri, "results", record.run_id))
    _check_free(out, settings.storage)
    with record.stage("read"):
        asked = read_queries(options.queries, settings.storage)
        index = features.open_index(spark, settings)
    ids = sorted(row.query_id for row in asked.rows)
    pictured = set(ids[: options.gallery])
    with record.stage("resolve"):
        wanted = [row for row in asked.rows if isinstance(row, Wanted)]
        resolved = resolve(spark, wanted, index, settings, pictured)
    with record.stage("search"):
        answer = search(spark, index.rows, list(resolved.queries.values()), options)
    by_id = {**resolved.failed, **{status.query_id: status for status in answer.statuses}}
    statuses = [by_id[row.query_id] if isinstance(row, Wanted) else row for row in asked.rows]
    if len(statuses) != len(asked.rows) or len(by_id) != len(wanted):
        raise TableError(f"{len(asked.rows)} queries, yet {len(statuses)} statuses: nothing was written")
    with record.stage("write"):
        hits = answer.hits.orderBy(t.QUERY_ID, t.RANK)
        t.conform(hits, t.RESULTS_HITS).write.parquet(storage.join(out, t.RESULTS_HITS.name))
        answer.hits.unpersist()
        rows = [(s.query_id, str(s.status), s.reason, list(s.partitions), s.candidates, s.hits) for s in statuses]
        named = spark.createDataFrame(rows, t.RESULTS_STATUSES.schema).coalesce(1)
        t.conform(named, t.RESULTS_STATUSES).write.parquet(storage.join(out, t.RESULTS_STATUSES.name))
        names = t.RESULTS_QUERIES.schema.names
        meant = [tuple(getattr(query, name) for name in names) for query in resolved.queries.values()]
        images = spark.createDataFrame(meant, t.RESULTS_QUERIES.schema).coalesce(1)
        t.conform(images, t.RESULTS_QUERIES).write.parquet(storage.join(out, t.RESULTS_QUERIES.name))
    counts = Counter(status.status for status in statuses)
    files = index.rows.inputFiles()
    size = t.size_of(spark, index.path)
    gallery = None
    if options.gallery:
        with record.stage("gallery"):
            facts = {
                "model": index.manifest.model_id,
                "prefilter": options.prefilter,
                "k": options.k,
                "partitions searched": f"{len(answer.partitions)} of {len(answer.existing)}",
            }
            shown = [_shown(query_id, resolved) for query_id in sorted(pictured & resolved.queries.keys())]
            gallery = report.gallery(spark, settings, out, shown, facts)
    ended = Report(
        model_id=index.manifest.model_id,
        index_version=index.version,
        queries=len(statuses),
        answered=counts[Answered.ANSWERED],
        empty=counts[Answered.NO_CANDIDATES],
        failed=counts[Answered.NOT_FOUND] + counts[Answered.UNREADABLE] + counts[Answered.BAD_ROW],
        statuses={str(status): counts[status] for status in Answered},
        partitions_searched=len(answer.partitions),
        partitions=len(answer.existing),
        files_read=answer.scanned.files,
        files=len(files),
        bytes_read=answer.scanned.bytes,
        bytes=size,
        ignored_columns=asked.ignored,
        seconds=record.seconds,
        out=out,
        gallery=gallery,
    )
    record.write(
        spark,
        lake,
        counts={
            "queries": ended.queries,
            **ended.statuses,
            "files_read": ended.files_read,
            "bytes_read": ended.bytes_read,
        },
        versions_read={"features": index.version},
    )
    return ended


def _shown(query_id: str, resolved: Resolved) -> report.Asked:
    """A query as the gallery shows it; pictures of indexed images are the lake's."""
    if query_id in resolved.pictures:
        return resolved.pictures[query_id]
    query = resolved.queries[query_id]
    return report.Asked(
        query_id=query_id,
        image_id=query.image_id,
        frame=query.frame or 0,
        modality=query.modality,
        body_part=query.body_part,
        predicted=query.predicted,
    )


def _check_free(out: str, files: StorageSettings) -> None:
    found = storage.kind(out, files)
    if found == "file" or (found == "folder" and any(storage.list_folder(out, files))):
        raise InputError(f"results folder {out} holds something already: give another, with --out")
