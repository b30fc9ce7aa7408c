"""The retrieve job: a query list → hits, statuses, what the queries were and a gallery, in one folder.

Queries are resolved and searched in portions, so that memory does not grow with the list; see search.py for how.
"""

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq
from pyspark.sql import SparkSession
from pyspark.sql.pandas.types import to_arrow_schema

from cbmir_spark import storage
from cbmir_spark.config import Settings
from cbmir_spark.errors import InputError, TableError
from cbmir_spark.index import open as index_open
from cbmir_spark.index.vector_files import Place
from cbmir_spark.lake import schemas
from cbmir_spark.lake.paths import LakePaths
from cbmir_spark.lake.runs import Record
from cbmir_spark.reports import gallery as reports_gallery
from cbmir_spark.retrieval import csv_export
from cbmir_spark.retrieval import series as retrieval_series
from cbmir_spark.retrieval.query import Answered, Status, Wanted
from cbmir_spark.retrieval.query_list import read_queries
from cbmir_spark.retrieval.resolve import Resolved, resolve
from cbmir_spark.retrieval.search import Scanned, base_of, portions, search
from cbmir_spark.storage import ObjectStore


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
    vectors_read: int
    bytes_read: int
    bytes: int
    ignored_columns: tuple[str, ...]
    seconds: Mapping[str, float]
    out: str
    gallery: str | None


def run(spark: SparkSession, settings: Settings) -> Report:
    """Answer the query list of `retrieval.queries`: hits, statuses, what the queries were and a gallery, in one folder.

    Raises InputError for a list that cannot be used or a folder that holds something already, ModelError and
    TableError as `features.open_index` does; all before anything is written.
    """
    record = Record("retrieve")
    options = settings.retrieval
    if options.queries is None:
        raise InputError("no query list named: give --queries FILE, a CSV or Parquet file")
    lake = LakePaths.of(settings.lake)
    out = storage.canonical(options.out or storage.join(lake.uri, "results", record.run_id))
    _check_free(out, ObjectStore(settings.storage))
    with record.stage("read"):
        asked = read_queries(options.queries, ObjectStore(settings.storage), options.level)
        index = index_open.open_index(spark, settings)
        base = base_of(spark, index, ObjectStore(settings.storage))
    # By one name for each place of the list, since a bad row may have any.
    pictured = set(sorted(row.query_id for row in asked.rows)[: options.gallery])
    statuses: list[Status] = []
    shown: list[reports_gallery.Asked] = []
    searched: set[Place] = set()
    scanned = Scanned()
    most = max([options.k, *(row.own.k or 0 for row in asked.rows if isinstance(row, Wanted))])
    for number, rows in enumerate(portions(spark, asked.rows, most, options)):
        wanted = [row for row in rows if isinstance(row, Wanted)]
        if options.level == "series":
            with record.stage("resolve"):
                series = retrieval_series.resolve(spark, wanted, index, base, settings)
                resolved = series.resolved
            answer = retrieval_series.search(
                spark, base, list(resolved.queries.values()), series.volumes, options, record
            )
        else:
            with record.stage("resolve"):
                resolved = resolve(spark, wanted, index, settings, pictured)
            answer = search(spark, base, list(resolved.queries.values()), options, record)
        by_id = {**resolved.failed, **{status.query_id: status for status in answer.statuses}}
        statuses += [by_id[row.query_id] if isinstance(row, Wanted) else row for row in rows]
        with record.stage("write"):
            _write_portion(out, number, answer.hits, statuses[-len(rows) :], resolved, settings)
        shown += [_shown(query_id, resolved) for query_id in sorted(pictured & resolved.queries.keys())]
        searched |= set(answer.partitions)
        scanned += answer.scanned
    if len(statuses) != len(asked.rows):
        raise TableError(f"{len(asked.rows)} queries, yet {len(statuses)} statuses: the answers in {out} are not whole")
    counts = Counter(status.status for status in statuses)
    gallery = None
    if options.gallery:
        with record.stage("gallery"):
            facts = {
                "model": index.manifest.model_id,
                "level": options.level,
                "prefilter": options.prefilter,
                "k": options.k,
                "metric": options.metric,
                "partitions searched": f"{len(searched)} of {len(base.places)}",
            }
            gallery = reports_gallery.gallery(spark, settings, out, shown, facts)
    ended = Report(
        model_id=index.manifest.model_id,
        index_version=index.version,
        queries=len(statuses),
        answered=counts[Answered.ANSWERED],
        empty=counts[Answered.NO_CANDIDATES],
        failed=counts[Answered.NOT_FOUND] + counts[Answered.UNREADABLE] + counts[Answered.BAD_ROW],
        statuses={str(status): counts[status] for status in Answered},
        partitions_searched=len(searched),
        partitions=len(base.places),
        files_read=scanned.files,
        files=len(base.files),
        vectors_read=scanned.vectors,
        bytes_read=scanned.bytes,
        bytes=sum(file.bytes for file in base.files),
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
            "vectors_read": ended.vectors_read,
            "bytes_read": ended.bytes_read,
        },
        versions_read={"features": index.version},
    )
    return ended


def _write_portion(
    out: str, number: int, hits: pa.Table, statuses: Sequence[Status], resolved: Resolved, settings: Settings
) -> None:
    """One Parquet file of each kind of result; hits and statuses as CSV too, where that is asked for."""
    told = [(s.query_id, str(s.status), s.reason, list(s.partitions), s.candidates, s.hits) for s in statuses]
    names = schemas.RESULTS_QUERIES.schema.names
    meant = [tuple(getattr(query, name) for name in names) for query in resolved.queries.values()]
    results = {
        schemas.RESULTS_HITS.name: hits,
        schemas.RESULTS_STATUSES.name: _rows(told, schemas.RESULTS_STATUSES),
        schemas.RESULTS_QUERIES.name: _rows(meant, schemas.RESULTS_QUERIES),
    }
    for name, rows in results.items():
        buffer = io.BytesIO()
        pq.write_table(rows, buffer)
        target = storage.join(out, name, f"part-{number:05d}.parquet")
        ObjectStore(settings.storage).write_bytes(target, buffer.getvalue())
        if settings.retrieval.csv and name != schemas.RESULTS_QUERIES.name:
            sheet = storage.join(out, csv_export.FOLDER, csv_export.name_of(target))
            ObjectStore(settings.storage).write_bytes(sheet, csv_export.as_csv(rows))


def _rows(rows: Sequence[tuple[object, ...]], table: schemas.Table) -> pa.Table:
    schema = to_arrow_schema(table.schema)
    columns = zip(*rows, strict=True) if rows else ((),) * len(schema)
    return pa.table([pa.array(values, kind.type) for values, kind in zip(columns, schema, strict=True)], schema=schema)


def _shown(query_id: str, resolved: Resolved) -> reports_gallery.Asked:
    """A query as the gallery shows it; pictures of indexed images are the lake's."""
    if query_id in resolved.pictures:
        return resolved.pictures[query_id]
    query = resolved.queries[query_id]
    return reports_gallery.Asked(
        query_id=query_id,
        image_id=query.image_id,
        frame=query.frame or 0,
        modality=query.modality,
        body_part=query.body_part,
        predicted=query.predicted,
    )


def _check_free(out: str, store: ObjectStore) -> None:
    found = store.kind(out)
    if found == "file" or (found == "folder" and any(store.list_folder(out))):
        raise InputError(f"results folder {out} holds something already: give another, with --out")
