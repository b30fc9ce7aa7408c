"""`cbmir forget`: a patient, study, series or image leaves every table, snapshot and result, and does not come back.

Tombstones come first: from then on ingest keeps nothing of what they name. Then whatever belongs to any tombstone goes,
what was made of images before the images themselves, so that a run that dies finds by TAGS what is left to do when it
is run again. Files that Delta's older versions still need hold the rows until VACUUM: after 168 hours (`--purge`), or
at once (`--now`), when readers of older versions fail. A model that has learned from an erased image stays as it is.
"""

import csv
import io
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import reduce

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyspark import StorageLevel
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from cbmir_spark import dataset, lease, pseudonyms, storage
from cbmir_spark import tables as t
from cbmir_spark.config import Settings, StorageSettings
from cbmir_spark.errors import InputError, TableError
from cbmir_spark.pseudonyms import KINDS, Pseudonyms
from cbmir_spark.record import Record

PSEUDONYM = "pseudonym"
# Files that no version needs are kept so long for readers and writers of older ones, unless it has to be now.
RETENTION_HOURS = 168
# What stands where a page was that may have shown an erased image.
NOTE = "<!doctype html><title>Erased</title><p>This page showed images that have been erased since.</p>\n"

_PSEUDONYM = re.compile(rf"({'|'.join(KINDS)}):([0-9a-f]{{32}})")
_OWNER = f"{t.KIND} string, {t.PSEUDONYM} string"


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


def read_list(uri: str, files: StorageSettings) -> tuple[Request, ...]:
    """A CSV with the columns `kind` (patient, study, series, image or pseudonym) and `identifier`.

    Raises InputError by the row's number; what it holds is never repeated.
    """
    try:
        text = storage.read_bytes(storage.canonical(uri), files).decode("utf-8-sig")
        rows = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    except (OSError, UnicodeDecodeError, csv.Error):
        raise InputError(f"list {uri} cannot be read as CSV in UTF-8: give a file with kind,identifier") from None
    if not rows or [name.strip() for name in rows[0]] != [t.KIND, t.IDENTIFIER]:
        raise InputError(f"list {uri}: the first line must be {t.KIND},{t.IDENTIFIER}")
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
    lake = t.Lake.of(settings)
    with (
        lease.hold(lake.vault, lease.TABLES, settings.storage) as tables,
        lease.hold(lake.vault, lease.INDEX, settings.storage) as index,
    ):
        return _run(spark, settings, lake, requests, (tables, index), now=now, purge=purge)


def _run(
    spark: SparkSession,
    settings: Settings,
    lake: t.Lake,
    requests: Sequence[Request],
    held: Sequence[lease.Held],
    *,
    now: bool,
    purge: bool,
) -> Report:
    record = Record("forget")
    names = pseudonyms.of(settings, storage.local_path(lake.vault) if storage.is_local(lake.vault) else None)
    asked = owners_of(requests, names)
    pinned = t.published(spark, lake)
    if pinned is not None and pinned.key_id != names.key_id:
        raise TableError(
            f"lake {lake.uri} was made with pseudonym key {pinned.key_id}, the settings give {names.key_id}: "
            "with another key nothing would be found"
        )
    with record.stage("tombstones"):
        moment = datetime.now(UTC)
        rows = [(kind, pseudonym, names.key_id, moment) for kind, pseudonym in sorted(set(asked))]
        new = t.merge_new(spark, spark.createDataFrame(rows, t.FORGOTTEN.schema), t.FORGOTTEN, lake.path(t.FORGOTTEN))
    places: dict[str, Gone] = {}
    images = unknown = 0
    storage.delete_folder(storage.join(lake.vault, "staging"), settings.storage)
    if pinned is None:
        unknown = len(asked)
    else:
        t.roll_back(spark, lake, pinned)
        evolved = t.evolve(spark, t.SOURCES, lake.path(t.SOURCES), pinned.message())
        pinned = pinned if evolved is None else replace(pinned, sources=evolved)
        forgotten = t.read(spark, lake.path(t.FORGOTTEN))
        tags = t.read(spark, lake.path(t.TAGS), pinned.tags)
        marks = forgotten.select(t.KIND, t.PSEUDONYM)
        found = t.belonging(tags.select(t.BATCH, *t.OWNERS.values()), marks).persist(StorageLevel.MEMORY_AND_DISK)
        images = found.count()
        unknown = _unknown(spark, found, asked)
        owners = marks.union(found.select(F.lit("image"), t.IMAGE_ID)).distinct().persist(StorageLevel.MEMORY_AND_DISK)
        with record.stage("snapshots"):
            places["snapshots"] = _snapshots(spark, lake, owners, settings.storage, now, purge)
        with record.stage("results"):
            listed = [(row[t.KIND], row[t.PSEUDONYM]) for row in owners.collect()]
            newest = forgotten.agg(F.max(F.unix_seconds(t.FORGOTTEN_AT)).alias("newest")).collect()[0]["newest"]
            latest = datetime.fromtimestamp((newest or 0) + 1, UTC)
            places["results"], places["pages"] = _results(lake, listed, latest, settings.storage)
        for each in held:
            each.check()
        with record.stage("features"):
            places["features"] = _features(spark, lake, owners, settings.storage)
        for each in held:
            each.check()
        with record.stage("images"):
            pinned = _images(spark, lake, pinned, found, owners, places)
        with record.stage("identity"):
            left = t.read(spark, lake.path(t.TAGS), pinned.tags)
            places["identity"] = Gone(rows=t.prune_identities(spark, lake, left))
        found.unpersist()
        owners.unpersist()
    hours = 0 if now else RETENTION_HOURS if purge else None
    if hours is not None:
        with record.stage("vacuum"):
            for path in _delta_tables(spark, lake, settings.storage):
                t.vacuum(spark, path, hours)
    rows_of = {f"{name}_rows": gone.rows for name, gone in places.items() if gone.rows}
    record.write(
        spark,
        lake,
        counts={"asked": len(asked), "unknown": unknown, "tombstones": new, "images": images, **rows_of},
        versions_written={"sources": pinned.sources, "tags": pinned.tags, "pixels": pinned.pixels} if pinned else {},
    )
    return Report(len(asked), unknown, new, images, places, hours, record.seconds)


def _unknown(spark: SparkSession, found: DataFrame, asked: Sequence[tuple[str, str]]) -> int:
    """How many of the requests no image of TAGS belongs to."""
    owner = [F.struct(F.lit(kind).alias(t.KIND), F.col(column).alias(t.PSEUDONYM)) for kind, column in t.OWNERS.items()]
    known = found.select(F.explode(F.array(*owner)).alias("owner")).select("owner.*")
    wanted = spark.createDataFrame(list(asked), _OWNER)
    return wanted.join(known, on=[t.KIND, t.PSEUDONYM], how="left_anti").count()


def _snapshots(
    spark: SparkSession, lake: t.Lake, owners: DataFrame, files: StorageSettings, now: bool, purge: bool
) -> Gone:
    """Training snapshots: their files are written again; those that a killed job left unfinished go with their age."""
    gone = Gone()
    for folder in _folders(lake.snapshots(), files):
        if storage.kind(storage.join(folder, dataset.MANIFEST), files) == "file":
            rows, rewritten = dataset.erase(spark, folder, owners, files)
            gone.rows += rows
            gone.files += rewritten
            continue
        written = [found.modified for found in storage.list_objects(folder, files)]
        old = datetime.now(UTC) - timedelta(hours=RETENTION_HOURS)
        if now or (purge and all(moment < old for moment in written)):
            gone.files += len(written)
            storage.delete_folder(folder, files)
    return gone


Mask = Callable[[pa.Table], pa.ChunkedArray]
"""True for the rows of a table that have to go."""


def _results(
    lake: t.Lake, owners: Iterable[tuple[str, str]], newest: datetime, files: StorageSettings
) -> tuple[Gone, Gone]:
    """Answers below the lake: hits that are of the owners, all of the queries that are, and the pages that show them.

    `queries` says what each query was, so it goes last; of answers without it, which older versions wrote, every page
    that is not newer than the `newest` tombstone goes.
    """
    rows, pages = Gone(), Gone()
    of_owners = _belonging(owners)
    for folder in [f for root in ("results", "evaluation") for f in _folders(storage.join(lake.uri, root), files)]:
        hits, statuses, queries = (
            storage.join(folder, table.name) for table in (t.RESULTS_HITS, t.RESULTS_STATUSES, t.RESULTS_QUERIES)
        )
        lost = [
            query for table in _tables(queries, files) for query in _masked(table, of_owners)[t.QUERY_ID].to_pylist()
        ]
        of_query = _is_in(t.QUERY_ID, lost)

        def of_either(table: pa.Table, of_query: Mask = of_query) -> pa.ChunkedArray:
            return pc.or_(of_owners(table), of_query(table))

        found = any(len(_masked(table, of_either)) for table in _tables(hits, files))
        recorded = storage.kind(queries, files) == "folder"
        for page in [each for each in storage.list_folder(folder, files)[1] if each.uri.endswith(".html")]:
            unsure = not recorded and storage.kind(hits, files) == "folder" and page.modified <= newest
            if (lost or found or unsure) and page.size != len(NOTE):
                storage.write_bytes(page.uri, NOTE.encode(), files)
                pages.files += 1
        for uri, mask in ((hits, of_either), (statuses, of_query), (queries, of_query)):
            gone = _drop(uri, mask, files)
            rows.rows += gone.rows
            rows.files += gone.files
    return rows, pages


def _belonging(owners: Iterable[tuple[str, str]]) -> Mask:
    """What belongs to one of the owners (kind, pseudonym), by the id columns that a table has."""
    by_column: dict[str, list[str]] = {column: [] for column in t.OWNERS.values()}
    for kind, pseudonym in owners:
        by_column[t.OWNERS[kind]].append(pseudonym)
    masks = {column: _is_in(column, values) for column, values in by_column.items()}

    def of_owners(table: pa.Table) -> pa.ChunkedArray:
        return reduce(pc.or_, [mask(table) for column, mask in masks.items() if column in table.column_names])

    return of_owners


def _is_in(column: str, values: Sequence[str]) -> Mask:
    wanted = pa.array(values, pa.string())
    return lambda table: pc.is_in(table[column], value_set=wanted)


def _masked(table: pa.Table, mask: Mask) -> pa.Table:
    return table.filter(mask(table))


def _tables(uri: str, files: StorageSettings) -> Iterator[pa.Table]:
    """The Parquet files of a folder, one after the other; none where there is no folder."""
    for found in _parquet(uri, files):
        yield pq.read_table(pa.BufferReader(storage.read_bytes(found, files)))


def _parquet(uri: str, files: StorageSettings) -> list[str]:
    if storage.kind(uri, files) != "folder":
        return []
    return [found.uri for found in storage.list_folder(uri, files)[1] if found.uri.endswith(".parquet")]


def _drop(uri: str, mask: Mask, files: StorageSettings) -> Gone:
    """Write the Parquet files of a folder again without some rows, each in the place of the old one."""
    gone = Gone()
    for found in _parquet(uri, files):
        table = pq.read_table(pa.BufferReader(storage.read_bytes(found, files)))
        kept = table.filter(pc.invert(mask(table)))
        if len(kept) == len(table):
            continue
        sink = pa.BufferOutputStream()
        pq.write_table(kept, sink)
        folder, _, name = found.rpartition("/")
        # Hadoop's checksum of the old content would make the new one unreadable.
        storage.delete(f"{folder}/.{name}.crc", files)
        storage.write_bytes(found, sink.getvalue().to_pybytes(), files)
        gone.rows += len(table) - len(kept)
        gone.files += 1
    return gone


def _features(spark: SparkSession, lake: t.Lake, owners: DataFrame, files: StorageSettings) -> Gone:
    """FEATURES of every model, at once for every reader; a table without such rows gets no commit."""
    gone = Gone()
    for path in _folders(storage.join(lake.uri, t.FEATURES.name), files):
        if not t.exists(spark, path):
            continue
        keys = (t.MODALITY, t.BODY_PART, t.IMAGE_ID, t.FRAME)
        rows = t.belonging(t.read(spark, path).select(*keys, *list(t.OWNERS.values())[1:]), owners).select(*keys)
        rows = rows.persist(StorageLevel.MEMORY_AND_DISK)
        places = rows.groupBy(t.MODALITY, t.BODY_PART).count().collect()
        if places:
            within = [f"(t.{t.MODALITY} = '{r[t.MODALITY]}' AND t.{t.BODY_PART} = '{r[t.BODY_PART]}')" for r in places]
            t.delete_rows(spark, path, rows, " OR ".join(sorted(within)))
            gone.rows += sum(row["count"] for row in places)
        rows.unpersist()
    return gone


def _images(
    spark: SparkSession,
    lake: t.Lake,
    pinned: t.Published,
    found: DataFrame,
    owners: DataFrame,
    places: dict[str, Gone],
) -> t.Published:
    """TAGS and PIXELS without the images, published with SOURCES that say why; what is published then."""
    batches = [row[t.BATCH] for row in found.select(t.BATCH).distinct().collect()]
    sources = t.read(spark, lake.path(t.SOURCES), pinned.sources)
    images = owners.where(F.col(t.KIND) == "image").select(F.col(t.PSEUDONYM).alias(t.IMAGE_ID))
    rejected = sources.join(F.broadcast(images), on=t.IMAGE_ID, how="left_semi").withColumns(
        {
            t.OUTCOME: F.lit(t.REJECTED),
            t.REASON: F.lit(t.ERASED),
            t.IMAGE_ID: F.lit(None).cast("string"),
            t.DIGEST: F.lit(None).cast("string"),
        }
    )
    rejected = rejected.select(*t.SOURCES.schema.names).persist(StorageLevel.MEMORY_AND_DISK)
    objects = rejected.count()
    if batches:
        gone = found.select(t.IMAGE_ID).distinct()
        before = t.read(spark, lake.path(t.PIXELS), pinned.pixels).where(F.col(t.BATCH).isin(batches))
        frames = before.select(t.IMAGE_ID).join(F.broadcast(gone), on=t.IMAGE_ID, how="left_semi").count()
        pinned = replace(
            pinned,
            tags=t.delete_images(spark, lake.path(t.TAGS), gone, batches),
            pixels=t.delete_images(spark, lake.path(t.PIXELS), gone, batches),
        )
        places["tags"], places["pixels"] = Gone(rows=gone.count()), Gone(rows=frames)
    if batches or objects:
        pinned = t.publish(spark, lake, rejected, pinned)
        places["sources"] = Gone(rows=objects)
    rejected.unpersist()
    return pinned


def _folders(uri: str, files: StorageSettings) -> list[str]:
    """The folders directly below a URI; none where it is no folder itself."""
    return storage.list_folder(uri, files)[0] if storage.kind(uri, files) == "folder" else []


def _delta_tables(spark: SparkSession, lake: t.Lake, files: StorageSettings) -> list[str]:
    """Paths of all Delta tables that hold rows about images."""
    paths = [lake.path(table) for table in (t.TAGS, t.PIXELS, t.SOURCES, t.IDENTITY)]
    paths += _folders(storage.join(lake.uri, t.FEATURES.name), files)
    return [path for path in paths if t.exists(spark, path)]
