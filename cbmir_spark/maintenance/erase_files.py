"""Erase rows from the files of a lake that are no Delta tables: snapshots, checkpoints, answers and their pages.

Runs on the driver, except that tasks rewrite the files of snapshots. Each file is written again without the rows, under
its name where readers find it by that name, so that a run that is killed can be run again.
"""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyspark.sql import SparkSession

from cbmir_spark import storage
from cbmir_spark.lake import columns as cols
from cbmir_spark.lake import schemas
from cbmir_spark.lake.paths import LakePaths
from cbmir_spark.maintenance.removal import Mask, Removed, is_in, masked
from cbmir_spark.retrieval import csv_export
from cbmir_spark.storage import ObjectStore
from cbmir_spark.training import snapshot_files
from cbmir_spark.training.manifest import MANIFEST

# Files that no version needs stay so long for readers and writers of older ones, unless they must go at once.
RETENTION_HOURS = 168
# Replaces a page that may have shown an erased image.
NOTE = "<!doctype html><title>Erased</title><p>This page showed images that have been erased since.</p>\n"


def erase_snapshots(
    spark: SparkSession, paths: LakePaths, mask: Mask, store: ObjectStore, *, now: bool, purge: bool
) -> Removed:
    """Rewrite the files of training snapshots without the masked rows.

    Snapshots that a killed job left unfinished are deleted at once with `now`, or after RETENTION_HOURS with `purge`.
    """
    removed = Removed()
    for folder in folders_in(paths.snapshots, store):
        if store.kind(storage.join(folder, MANIFEST)) == "file":
            rows, files = snapshot_files.erase(folder, lambda rows: masked(rows, mask), spark, store)
            removed += Removed(rows, files)
        else:
            removed += Removed(files=_delete_unfinished(folder, store, now=now, purge=purge))
    return removed


def erase_checkpoints(paths: LakePaths, store: ObjectStore, *, now: bool, purge: bool) -> Removed:
    """Delete the checkpoints of stopped trainings: all with `now`, those older than RETENTION_HOURS with `purge`."""
    folders = folders_in(paths.checkpoints, store)
    return Removed(files=sum(_delete_unfinished(folder, store, now=now, purge=purge) for folder in folders))


def erase_answers(paths: LakePaths, of_owners: Mask, newest: float, store: ObjectStore) -> tuple[Removed, Removed]:
    """Erase from answers the masked hits, all rows of the masked queries, and the pages that show them.

    Returns the rows, and the pages and CSV files. `queries` records what each query was, so it is rewritten last;
    of answers without it, which older versions wrote, every page goes that is not newer than `newest`, the time of the
    newest tombstone in seconds since 1970.
    """
    rows, pages = Removed(), Removed()
    for folder in [folder for root in paths.answers for folder in folders_in(root, store)]:
        hits, statuses, queries = (
            storage.join(folder, table.name)
            for table in (schemas.RESULTS_HITS, schemas.RESULTS_STATUSES, schemas.RESULTS_QUERIES)
        )
        asked = [table.filter(of_owners(table)) for table in _tables(queries, store)]
        lost = [query for table in asked for query in table[cols.QUERY_ID].to_pylist()]
        of_query = is_in(cols.QUERY_ID, lost)

        def of_either(table: pa.Table, of_query: Mask = of_query) -> Any:
            return pc.or_(of_owners(table), of_query(table))

        found = any(pc.any(of_either(table)).as_py() for table in _tables(hits, store))
        recorded = store.kind(queries) == "folder"
        for page in [each for each in store.list_folder(folder)[1] if each.uri.endswith(".html")]:
            unsure = not recorded and store.kind(hits) == "folder" and page.modified.timestamp() <= newest + 1
            if (lost or found or unsure) and page.size != len(NOTE):
                store.write_bytes(page.uri, NOTE.encode())
                pages += Removed(files=1)
        dropped = ((hits, of_either), (statuses, of_query), (queries, of_query))
        if lost or found:
            # Like the pages before the rows: after a kill in between, the rows still show what is left to do.
            pages += Removed(files=sum(_rewrite_sheets(folder, uri, mask, store) for uri, mask in dropped))
        for uri, mask in dropped:
            rows += drop_rows(uri, mask, store)
    return rows, pages


def drop_rows(uri: str, mask: Mask, store: ObjectStore) -> Removed:
    """Rewrite the Parquet files of a folder without the masked rows, each under its name."""
    removed = Removed()
    for found in _parquet(uri, store):
        table = pq.read_table(pa.BufferReader(store.read_bytes(found)))
        left = table.filter(pc.invert(mask(table)))
        if len(left) == len(table):
            continue
        sink = pa.BufferOutputStream()
        pq.write_table(left, sink)
        folder, _, name = found.rpartition("/")
        # Hadoop's checksum of the old content would make the new one unreadable.
        store.delete(f"{folder}/.{name}.crc")
        store.write_bytes(found, sink.getvalue().to_pybytes())
        removed += Removed(len(table) - len(left), 1)
    return removed


def folders_in(uri: str, store: ObjectStore) -> list[str]:
    """The folders directly below a URI; none where it is no folder itself."""
    return store.list_folder(uri)[0] if store.kind(uri) == "folder" else []


def _delete_unfinished(folder: str, store: ObjectStore, *, now: bool, purge: bool) -> int:
    """Delete what a killed job has left in a folder, `now` or after its age; the number of its files."""
    written = [found.modified for found in store.list_objects(folder)]
    old = datetime.now(UTC) - timedelta(hours=RETENTION_HOURS)
    if not (now or (purge and all(moment < old for moment in written))):
        return 0
    store.delete_folder(folder)
    return len(written)


def _rewrite_sheets(folder: str, uri: str, mask: Mask, store: ObjectStore) -> int:
    """Rewrite the CSV files of one table of an answer, from its Parquet files without the masked rows; their number."""
    count = 0
    for found in _parquet(uri, store):
        sheet = storage.join(folder, csv_export.FOLDER, csv_export.name_of(found))
        if store.kind(sheet) == "file":
            table = pq.read_table(pa.BufferReader(store.read_bytes(found)))
            store.write_bytes(sheet, csv_export.as_csv(table.filter(pc.invert(mask(table)))))
            count += 1
    return count


def _tables(uri: str, store: ObjectStore) -> Iterator[pa.Table]:
    """The Parquet files of a folder, one after the other; none where there is no folder."""
    for found in _parquet(uri, store):
        yield pq.read_table(pa.BufferReader(store.read_bytes(found)))


def _parquet(uri: str, store: ObjectStore) -> list[str]:
    if store.kind(uri) != "folder":
        return []
    return [found.uri for found in store.list_folder(uri)[1] if found.uri.endswith(".parquet")]
