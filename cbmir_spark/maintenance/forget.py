"""`cbmir forget`: a patient, study, series or image leaves every table, snapshot and result, and does not come back.

Tombstones come first: from then on ingest keeps nothing of what they name. Then whatever belongs to any tombstone goes,
what was made of images before the images themselves, so that a run that dies finds by TAGS what is left to do when it
is run again. Files that Delta's older versions still need hold the rows until VACUUM: after 168 hours (`--purge`), or
at once (`--now`), when readers of older versions fail. A registered model that has learned from an erased image stays
as it is; checkpoints of trainings that were stopped go.
"""

import csv
import io
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import reduce
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyspark.sql import DataFrame, Row, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import StructType

from cbmir_spark import storage
from cbmir_spark.config import Settings
from cbmir_spark.errors import InputError, TableError
from cbmir_spark.lake import columns as cols
from cbmir_spark.lake import delta, identity, lease, pseudonyms, publication, schemas
from cbmir_spark.lake.paths import LakePaths
from cbmir_spark.lake.pseudonyms import KINDS, Pseudonyms
from cbmir_spark.lake.publication import Published
from cbmir_spark.lake.runs import Record
from cbmir_spark.retrieval import csv_export
from cbmir_spark.storage import ObjectStore
from cbmir_spark.training import snapshot_files
from cbmir_spark.training.manifest import MANIFEST

PSEUDONYM = "pseudonym"
# Files that no version needs are kept so long for readers and writers of older ones, unless it has to be now.
RETENTION_HOURS = 168
# What stands where a page was that may have shown an erased image.
NOTE = "<!doctype html><title>Erased</title><p>This page showed images that have been erased since.</p>\n"

_PSEUDONYM = re.compile(rf"({'|'.join(KINDS)}):([0-9a-f]{{32}})")


@dataclass(frozen=True)
class Request:
    """What is to be forgotten: an identifier of one of KINDS, or, as kind `pseudonym`, kind:32 hexadecimal digits."""

    kind: str
    value: str = field(repr=False)


@dataclass
class Gone:
    """Rows and files that left one place."""

    rows: int = 0
    files: int = 0

    def add(self, other: "Gone") -> None:
        """Count what left elsewhere in."""
        self.rows += other.rows
        self.files += other.files


@dataclass(frozen=True)
class Report:
    """What a run did. `unknown` of the `asked` were of no image in TAGS; `tombstones` are new; `places` by name."""

    asked: int
    unknown: int
    tombstones: int
    images: int
    places: dict[str, Gone]
    vacuumed_hours: int | None
    seconds: dict[str, float]


# --- what is asked for; on the driver ---


def read_list(uri: str, store: ObjectStore) -> tuple[Request, ...]:
    """A CSV with the columns `kind` (patient, study, series, image or pseudonym) and `identifier`.

    Raises InputError by the row's number; what it holds is never repeated.
    """
    try:
        text = store.read_bytes(storage.canonical(uri)).decode("utf-8-sig")
        rows = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    except (OSError, UnicodeDecodeError, csv.Error):
        raise InputError(f"list {uri} cannot be read as CSV in UTF-8: give a file with kind,identifier") from None
    if not rows or [name.strip() for name in rows[0]] != [cols.KIND, cols.IDENTIFIER]:
        raise InputError(f"list {uri}: the first line must be {cols.KIND},{cols.IDENTIFIER}")
    found = []
    for number, row in enumerate(rows[1:], start=2):
        if not row:
            continue
        if len(row) != 2 or row[0].strip() not in (*KINDS, PSEUDONYM) or not row[1].strip(" \0"):
            raise InputError(
                f"list {uri}, line {number}: give {', '.join(KINDS)} or {PSEUDONYM}, a comma and the identifier"
            )
        found.append(Request(row[0].strip(), row[1]))
    return tuple(found)


def owners_of(requests: Iterable[Request], names: Pseudonyms) -> list[tuple[str, str]]:
    """(kind, pseudonym) of each request. Raises InputError for an empty identifier or a pseudonym of another form."""
    found = []
    for request in requests:
        if request.kind == PSEUDONYM:
            match = _PSEUDONYM.fullmatch(request.value.strip())
            if match is None:
                raise InputError(f"--{PSEUDONYM}: give kind:digits, with {', '.join(KINDS)} and 32 hexadecimal digits")
            found.append((match[1], match[2]))
        elif not request.value.strip(" \0"):
            raise InputError(f"--{request.kind}: the identifier is empty")
        else:
            found.append((request.kind, names.of_kind(request.kind, request.value)))
    return found


# --- the run ---


def run(
    spark: SparkSession, settings: Settings, requests: Sequence[Request], *, now: bool = False, purge: bool = False
) -> Report:
    """Forget what is asked for, and finish what earlier runs left; `now` or `purge` then removes superseded files.

    Without requests it only does the latter two. Raises InputError before anything is changed where a request cannot
    be understood, TableError for a lake of another key, Busy while another job writes to the lake.
    """
    if not requests and not (now or purge):
        raise InputError("nothing to forget: give --patient, --study, --series, --image, --pseudonym or --list")
    lake = LakePaths.of(settings.lake)
    with (
        lease.hold(lake.vault, lease.TABLES, ObjectStore(settings.storage)) as tables,
        lease.hold(lake.vault, lease.INDEX, ObjectStore(settings.storage)) as index,
    ):
        return _run(spark, settings, lake, requests, (tables, index), now=now, purge=purge)


def _run(
    spark: SparkSession,
    settings: Settings,
    lake: LakePaths,
    requests: Sequence[Request],
    held: Sequence[lease.Held],
    *,
    now: bool,
    purge: bool,
) -> Report:
    record = Record.begin("forget")
    names = pseudonyms.load(settings.privacy, lake.vault_folder)
    asked = owners_of(requests, names)
    pinned = publication.published(spark, lake)
    if pinned is not None and pinned.key_id != names.key_id:
        raise TableError(
            f"lake {lake.uri} was made with pseudonym key {pinned.key_id}, the settings give {names.key_id}: "
            "with another key nothing would be found"
        )
    with record.stage("tombstones"):
        moment = datetime.now(UTC)
        rows = [(kind, pseudonym, names.key_id, moment) for kind, pseudonym in sorted(set(asked))]
        new = identity.merge_new(
            spark,
            spark.createDataFrame(rows, schemas.FORGOTTEN.schema),
            schemas.FORGOTTEN,
            lake.path(schemas.FORGOTTEN),
        )
    places: dict[str, Gone] = {}
    found: list[Row] = []
    ObjectStore(settings.storage).delete_folder(storage.join(lake.vault, "staging"))
    if pinned is not None:
        publication.roll_back(spark, lake, pinned)
        evolved = delta.evolve(spark, schemas.SOURCES, lake.path(schemas.SOURCES), pinned.message())
        pinned = pinned if evolved is None else replace(pinned, sources=evolved)
        forgotten = delta.read(spark, lake.path(schemas.FORGOTTEN)).collect()
        owners = {(row[cols.KIND], row[cols.PSEUDONYM]) for row in forgotten}
        tags = delta.read(spark, lake.path(schemas.TAGS), pinned.tags).select(cols.BATCH, *schemas.OWNERS.values())
        found = masked(tags, belonging(owners)).collect()
        owners |= {("image", row[cols.IMAGE_ID]) for row in found}
        mask = belonging(owners)
        with record.stage("snapshots"):
            places["snapshots"] = _snapshots(spark, lake, mask, ObjectStore(settings.storage), now, purge)
            # A training that was stopped would not go on from them: its snapshot is another one now.
            places["checkpoints"] = _checkpoints(
                lake, ObjectStore(settings.storage), now=now or bool(found), purge=purge
            )
        with record.stage("results"):
            newest = max((row[cols.FORGOTTEN_AT].timestamp() for row in forgotten), default=0.0)
            places["results"], places["pages"] = _results(lake, mask, newest, ObjectStore(settings.storage))
        for each in held:
            each.check()
        with record.stage("features"):
            places["features"] = _features(spark, lake, mask, ObjectStore(settings.storage))
        for each in held:
            each.check()
        with record.stage("images"):
            pinned = _images(spark, lake, pinned, found, mask, places)
        with record.stage("identity"):
            left = delta.read(spark, lake.path(schemas.TAGS), pinned.tags)
            places["identity"] = Gone(rows=identity.prune_identities(spark, lake, left))
    known = {(kind, row[column]) for row in found for kind, column in schemas.OWNERS.items()}
    unknown, images = sum(owner not in known for owner in asked), len(found)
    hours = 0 if now else RETENTION_HOURS if purge else None
    if hours is not None:
        with record.stage("vacuum"):
            for path in _delta_tables(spark, lake, ObjectStore(settings.storage)):
                delta.vacuum(spark, path, hours)
    rows_of = {f"{name}_rows": gone.rows for name, gone in places.items() if gone.rows}
    record.write(
        spark,
        lake,
        counts={"asked": len(asked), "unknown": unknown, "tombstones": new, "images": images, **rows_of},
        versions_written={"sources": pinned.sources, "tags": pinned.tags, "pixels": pinned.pixels} if pinned else {},
    )
    return Report(len(asked), unknown, new, images, places, hours, record.seconds)


Mask = Callable[[Any], Any]
"""True for the rows of an Arrow table or batch that have to go."""


def belonging(owners: Iterable[tuple[str, str]]) -> Mask:
    """What belongs to one of the owners (kind, pseudonym), by those id columns that there are. Driver or per task."""
    by_column: dict[str, list[str]] = {column: [] for column in schemas.OWNERS.values()}
    for kind, pseudonym in owners:
        by_column[schemas.OWNERS[kind]].append(pseudonym)
    masks = {column: _is_in(column, values) for column, values in by_column.items()}
    return lambda rows: reduce(pc.or_, [mask(rows) for column, mask in masks.items() if column in rows.schema.names])


def masked(rows: DataFrame, mask: Mask) -> DataFrame:
    """Those of `rows` that have to go, found by tasks: in the plan of a join, logs could show who is looked for."""

    def pick(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            yield batch.filter(mask(batch))

    return rows.mapInArrow(pick, rows.schema)


def _is_in(column: str, values: Sequence[str]) -> Mask:
    wanted = pa.array(values, pa.string())
    return lambda rows: pc.is_in(rows[column], value_set=wanted)


def _snapshots(spark: SparkSession, lake: LakePaths, mask: Mask, store: ObjectStore, now: bool, purge: bool) -> Gone:
    """Training snapshots: their files are written again; those that a killed job left unfinished go with their age."""
    gone = Gone()
    for folder in _folders(lake.snapshots, store):
        if store.kind(storage.join(folder, MANIFEST)) == "file":
            rows, rewritten = snapshot_files.erase(folder, lambda rows: masked(rows, mask), spark, store)
            gone.rows += rows
            gone.files += rewritten
        else:
            gone.files += _left_behind(folder, store, now, purge)
    return gone


def _checkpoints(lake: LakePaths, store: ObjectStore, *, now: bool, purge: bool) -> Gone:
    """Checkpoints of trainings that were stopped and never went on: all of them, or those of their age."""
    return Gone(files=sum(_left_behind(folder, store, now, purge) for folder in _folders(lake.checkpoints, store)))


def _left_behind(folder: str, store: ObjectStore, now: bool, purge: bool) -> int:
    """Delete what a job that was killed has left in a folder, `now` or with its age; how many files it had."""
    written = [found.modified for found in store.list_objects(folder)]
    old = datetime.now(UTC) - timedelta(hours=RETENTION_HOURS)
    if not (now or (purge and all(moment < old for moment in written))):
        return 0
    store.delete_folder(folder)
    return len(written)


def _results(lake: LakePaths, of_owners: Mask, newest: float, store: ObjectStore) -> tuple[Gone, Gone]:
    """Answers below the lake: hits that are of the owners, all of the queries that are, and the pages that show them.

    `queries` says what each query was, so it goes last; of answers without it, which older versions wrote, every page
    goes that is not newer than the `newest` tombstone (seconds since 1970).
    """
    rows, pages = Gone(), Gone()
    for folder in [f for root in ("results", "evaluation") for f in _folders(storage.join(lake.uri, root), store)]:
        hits, statuses, queries = (
            storage.join(folder, table.name)
            for table in (schemas.RESULTS_HITS, schemas.RESULTS_STATUSES, schemas.RESULTS_QUERIES)
        )
        asked = [table.filter(of_owners(table)) for table in _tables(queries, store)]
        lost = [query for table in asked for query in table[cols.QUERY_ID].to_pylist()]
        of_query = _is_in(cols.QUERY_ID, lost)

        def of_either(table: pa.Table, of_query: Mask = of_query) -> Any:
            return pc.or_(of_owners(table), of_query(table))

        found = any(pc.any(of_either(table)).as_py() for table in _tables(hits, store))
        recorded = store.kind(queries) == "folder"
        for page in [each for each in store.list_folder(folder)[1] if each.uri.endswith(".html")]:
            unsure = not recorded and store.kind(hits) == "folder" and page.modified.timestamp() <= newest + 1
            if (lost or found or unsure) and page.size != len(NOTE):
                store.write_bytes(page.uri, NOTE.encode())
                pages.files += 1
        dropped = ((hits, of_either), (statuses, of_query), (queries, of_query))
        if lost or found:
            # As the pages before the rows: a run that is killed in between finds by the rows what is left to do.
            pages.files += sum(_rewrite_sheets(folder, uri, mask, store) for uri, mask in dropped)
        for uri, mask in dropped:
            rows.add(_drop(uri, mask, store))
    return rows, pages


def _rewrite_sheets(folder: str, uri: str, mask: Mask, store: ObjectStore) -> int:
    """Make the CSV files of one of an answer's results anew, from its Parquet files without some rows; how many."""
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


def _drop(uri: str, mask: Mask, store: ObjectStore) -> Gone:
    """Write the Parquet files of a folder again without some rows, each in the place of the old one."""
    gone = Gone()
    for found in _parquet(uri, store):
        table = pq.read_table(pa.BufferReader(store.read_bytes(found)))
        kept = table.filter(pc.invert(mask(table)))
        if len(kept) == len(table):
            continue
        sink = pa.BufferOutputStream()
        pq.write_table(kept, sink)
        folder, _, name = found.rpartition("/")
        # Hadoop's checksum of the old content would make the new one unreadable.
        store.delete(f"{folder}/.{name}.crc")
        store.write_bytes(found, sink.getvalue().to_pybytes())
        gone.rows += len(table) - len(kept)
        gone.files += 1
    return gone


def _features(spark: SparkSession, lake: LakePaths, mask: Mask, store: ObjectStore) -> Gone:
    """FEATURES of every model, at once for every reader; a table without such rows gets no commit."""
    gone = Gone()
    keys = (cols.MODALITY, cols.BODY_PART, cols.IMAGE_ID, cols.FRAME)
    for path in _folders(storage.join(lake.uri, schemas.FEATURES.name), store):
        if not delta.exists(spark, path):
            continue
        ids = delta.read(spark, path).select(*keys, cols.SERIES_ID, cols.STUDY_ID, cols.PATIENT_ID)
        rows = [tuple(row[key] for key in keys) for row in masked(ids, mask).collect()]
        if rows:
            places = sorted({(modality, body_part) for modality, body_part, *_ in rows})
            within = " OR ".join(f"(t.{cols.MODALITY} = '{m}' AND t.{cols.BODY_PART} = '{b}')" for m, b in places)
            schema = StructType([schemas.FEATURES.schema[key] for key in keys])
            delta.delete_rows(spark, path, spark.createDataFrame(rows, schema), within)
            gone.rows += len(rows)
    return gone


def _images(
    spark: SparkSession, lake: LakePaths, pinned: Published, found: Sequence[Row], mask: Mask, places: dict[str, Gone]
) -> Published:
    """TAGS and PIXELS without the images, published with SOURCES that say why; what is published then."""
    sources = delta.read(spark, lake.path(schemas.SOURCES), pinned.sources).select(*schemas.SOURCES.schema.names)
    changed = {cols.OUTCOME: cols.REJECTED, cols.REASON: cols.ERASED, cols.IMAGE_ID: None, cols.DIGEST: None}
    objects = [tuple({**row.asDict(), **changed}.values()) for row in masked(sources, mask).collect()]
    if found:
        batches = sorted({row[cols.BATCH] for row in found})
        images = spark.createDataFrame([(row[cols.IMAGE_ID],) for row in found], f"{cols.IMAGE_ID} string")
        pixels = delta.read(spark, lake.path(schemas.PIXELS), pinned.pixels).where(F.col(cols.BATCH).isin(batches))
        frames = masked(pixels.select(cols.IMAGE_ID), mask).count()
        pinned = replace(
            pinned,
            tags=delta.delete_images(spark, lake.path(schemas.TAGS), images, batches),
            pixels=delta.delete_images(spark, lake.path(schemas.PIXELS), images, batches),
        )
        places["tags"], places["pixels"] = Gone(rows=len(found)), Gone(rows=frames)
    if found or objects:
        pinned = publication.publish(spark, lake, spark.createDataFrame(objects, schemas.SOURCES.schema), pinned)
        places["sources"] = Gone(rows=len(objects))
    return pinned


def _folders(uri: str, store: ObjectStore) -> list[str]:
    """The folders directly below a URI; none where it is no folder itself."""
    return store.list_folder(uri)[0] if store.kind(uri) == "folder" else []


def _delta_tables(spark: SparkSession, lake: LakePaths, store: ObjectStore) -> list[str]:
    """Paths of all Delta tables that hold rows about images."""
    paths = [lake.path(table) for table in (schemas.TAGS, schemas.PIXELS, schemas.SOURCES, schemas.IDENTITY)]
    paths += _folders(storage.join(lake.uri, schemas.FEATURES.name), store)
    return [path for path in paths if delta.exists(spark, path)]
