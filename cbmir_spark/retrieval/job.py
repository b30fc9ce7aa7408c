"""The retrieve job: a query list → hits, statuses, queries and a gallery, in one folder.

Queries are resolved and searched in batches, so that memory does not grow with the list; see search.py for how.
"""

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import pyarrow as pa
import pyarrow.parquet as pq
from pyspark.sql import SparkSession

from cbmir_spark import extras, storage
from cbmir_spark.config import RetrievalSettings, Settings
from cbmir_spark.errors import InputError, ModelError, TableError
from cbmir_spark.index.layout import Place
from cbmir_spark.index.open import Index, open_index
from cbmir_spark.ingest import parse
from cbmir_spark.lake import columns as cols
from cbmir_spark.lake import identity, schemas
from cbmir_spark.lake.arrow import arrow_schema
from cbmir_spark.lake.open import OpenLake, check_roots, locate, open_lake
from cbmir_spark.lake.runs import Record
from cbmir_spark.lake.schemas import Table
from cbmir_spark.models.registry import Registry
from cbmir_spark.reports.gallery import ShownQuery
from cbmir_spark.retrieval import csv_export
from cbmir_spark.retrieval.answer import Base, Resolved, Scanned, Searcher, base_of, batches
from cbmir_spark.retrieval.gallery import write_gallery
from cbmir_spark.retrieval.query import QueryRow, QueryStatus, Status
from cbmir_spark.retrieval.query_files import Reader
from cbmir_spark.retrieval.query_list import QueryList, read_queries
from cbmir_spark.retrieval.searchers import ImageSearcher, SeriesSearcher
from cbmir_spark.storage import ObjectStore


@dataclass(frozen=True)
class Report:
    """What a retrieve run did; counts are queries, partitions, files, vectors and bytes."""

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


def run(spark: SparkSession, settings: Settings, queries: QueryList | None = None) -> Report:
    """Answer `queries`, or the list that `retrieval.queries` names; write the answer into one folder.

    Raises InputError for a list that cannot be used or a folder that is not empty, ModelError and TableError as
    `open_index` does; all before anything is written.
    """
    record = Record.begin("retrieve")
    options = settings.retrieval
    if queries is None:
        # Read before the lake is opened, since that takes longer to fail.
        queries = _listed(options, ObjectStore(settings.storage))
    lake = open_lake(spark, settings)
    out = storage.canonical(options.out) if options.out else lake.paths.results(record.run_id)
    _check_free(out, lake.store)
    with record.stage("read"):
        index = open_index(lake, Registry(settings.mlflow, lake.paths.uri, lake.store), options.model)
        base = base_of(index, lake.store)
    # Chosen by id before any row is resolved, since rows may turn out to be bad.
    shown = frozenset(sorted(row.query_id for row in queries.rows)[: options.gallery])
    searcher = _searcher(lake, settings, index, base, record, shown)
    statuses: list[Status] = []
    cards: list[ShownQuery] = []
    searched: set[Place] = set()
    scanned = Scanned()
    most_hits = max([options.k, *(row.overrides.k or 0 for row in queries.rows if isinstance(row, QueryRow))])
    for number, rows in enumerate(batches(spark, queries.rows, most_hits, options)):
        resolved, answer = searcher.answer([row for row in rows if isinstance(row, QueryRow)])
        by_id = {**resolved.failed, **{status.query_id: status for status in answer.statuses}}
        statuses += [by_id[row.query_id] if isinstance(row, QueryRow) else row for row in rows]
        with record.stage("write"):
            _write_batch(lake.store, out, number, answer.hits, statuses[-len(rows) :], resolved, options.csv)
        cards += [_card(query_id, resolved) for query_id in sorted(shown & resolved.queries.keys())]
        searched |= set(answer.partitions)
        scanned += answer.scanned
    if len(statuses) != len(queries.rows):
        raise TableError(
            f"{len(queries.rows)} queries, yet {len(statuses)} statuses: the answer in {out} is incomplete"
        )
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
            gallery = write_gallery(lake, out, cards, options.gallery, settings.privacy.burned_in, facts)
    counts = Counter(status.status for status in statuses)
    report = Report(
        model_id=index.manifest.model_id,
        index_version=index.version,
        queries=len(statuses),
        answered=counts[QueryStatus.ANSWERED],
        empty=counts[QueryStatus.NO_CANDIDATES],
        failed=counts[QueryStatus.NOT_FOUND] + counts[QueryStatus.UNREADABLE] + counts[QueryStatus.BAD_ROW],
        statuses={str(status): counts[status] for status in QueryStatus},
        partitions_searched=len(searched),
        partitions=len(base.places),
        files_read=scanned.files,
        files=len(base.files),
        vectors_read=scanned.vectors,
        bytes_read=scanned.bytes,
        bytes=sum(file.bytes for file in base.files),
        ignored_columns=queries.ignored,
        seconds=record.seconds,
        out=out,
        gallery=gallery,
    )
    record.write(
        spark,
        lake.paths,
        counts={
            "queries": report.queries,
            **report.statuses,
            "files_read": report.files_read,
            "vectors_read": report.vectors_read,
            "bytes_read": report.bytes_read,
        },
        versions_read={"features": index.version},
    )
    return report


def check(settings: Settings, queries: QueryList | None) -> QueryList:
    """Check the lake's place, the results folder and the query list before Spark starts; raises as `run` does.

    Returns the checked list, which `run` takes, so that it is read once.
    """
    paths, store = locate(settings)
    check_roots(paths, store)
    options = settings.retrieval
    if options.out:
        _check_free(storage.canonical(options.out), store)
    listed = _listed(options, store) if queries is None else queries
    if any(isinstance(row, QueryRow) and row.naming == cols.URI for row in listed.rows):
        extras.require(extras.EMBED, "retrieve by uri")
    return listed


def _listed(options: RetrievalSettings, store: ObjectStore) -> QueryList:
    if options.queries is None:
        raise InputError("no query list: give --queries FILE, a CSV or Parquet file")
    return read_queries(options.queries, store, options.level)


def _searcher(
    lake: OpenLake, settings: Settings, index: Index, base: Base, record: Record, shown: frozenset[str]
) -> Searcher:
    options = settings.retrieval
    if options.level == "series":
        return SeriesSearcher(lake, index, base, options, record)

    @cache
    def reader() -> Reader:
        return file_reader(lake, settings, index, shown)

    return ImageSearcher(lake, index, base, options, record, reader)


def file_reader(lake: OpenLake, settings: Settings, index: Index, shown: frozenset[str]) -> Reader:
    """Build what tasks need to read query files; `shown` are the query_ids whose pictures the gallery needs.

    Raises ModelError where the `pixels` settings are not those that the model was trained with.
    """
    preprocessing = parse.preprocessing_of(settings.pixels)
    manifest = index.manifest
    if preprocessing.version != manifest.preprocessing:
        raise ModelError(
            f"the `pixels` settings give preprocessing {preprocessing.version}, model {manifest.model_id} was trained "
            f"with {manifest.preprocessing}: restore the settings, or name a model trained with them"
        )
    roots = [*settings.retrieval.roots, *([settings.ingest.archive] if settings.ingest.archive else [])]
    parser = parse.Parser(
        lake.store,
        settings.ingest,
        preprocessing,
        settings.vocabulary.body_parts,
        lake.names,
        identity.tombstones(lake.spark, lake.paths),
    )
    return Reader(index.folder, tuple(storage.canonical(root) for root in roots), parser, shown)


def _write_batch(
    store: ObjectStore,
    out: str,
    number: int,
    hits: pa.Table,
    statuses: Sequence[Status],
    resolved: Resolved,
    csv: bool,
) -> None:
    """Write one Parquet file of each kind of result; hits and statuses as CSV too if asked."""
    ended = [(s.query_id, str(s.status), s.reason, list(s.partitions), s.candidates, s.hits) for s in statuses]
    names = schemas.RESULTS_QUERIES.schema.names
    asked = [tuple(getattr(query, name) for name in names) for query in resolved.queries.values()]
    results = {
        schemas.RESULTS_HITS.name: hits,
        schemas.RESULTS_STATUSES.name: _rows(ended, schemas.RESULTS_STATUSES),
        schemas.RESULTS_QUERIES.name: _rows(asked, schemas.RESULTS_QUERIES),
    }
    for name, rows in results.items():
        buffer = io.BytesIO()
        pq.write_table(rows, buffer)
        target = storage.join(out, name, f"part-{number:05d}.parquet")
        store.write_bytes(target, buffer.getvalue())
        if csv and name != schemas.RESULTS_QUERIES.name:
            sheet = storage.join(out, csv_export.FOLDER, csv_export.name_of(target))
            store.write_bytes(sheet, csv_export.as_csv(rows))


def _rows(rows: Sequence[tuple[object, ...]], table: Table) -> pa.Table:
    schema = arrow_schema(table.schema)
    columns = zip(*rows, strict=True) if rows else ((),) * len(schema)
    return pa.table([pa.array(values, kind.type) for values, kind in zip(columns, schema, strict=True)], schema=schema)


def _card(query_id: str, resolved: Resolved) -> ShownQuery:
    """Describe a query for the gallery; pictures of indexed images are read from the lake."""
    if query_id in resolved.cards:
        return resolved.cards[query_id]
    query = resolved.queries[query_id]
    return ShownQuery(
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
        raise InputError(f"results folder {out} is not empty: give another, with --out")
