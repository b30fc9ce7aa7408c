"""`cbmir forget`: erase patients, studies, series or images from every table, snapshot and answer, for good.

Tombstones come first: from then on ingest stores nothing of what they name. Then whatever belongs to any tombstone is
removed, derived files before the images themselves, so that a run that is killed finds by TAGS what is left to do when
it is run again. `erase_files` and `erase_tables` do the work. Files that Delta's older versions still need hold the
rows until VACUUM: after 168 hours (`--purge`), or at once (`--now`), when readers of older versions fail. A registered
model that has learned from an erased image stays as it is; checkpoints of stopped trainings are deleted.
"""

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from pyspark.sql import Row, SparkSession

from cbmir_spark import storage
from cbmir_spark.config import Settings
from cbmir_spark.errors import InputError
from cbmir_spark.lake import columns as cols
from cbmir_spark.lake import delta, identity, lease, pseudonyms, publication, schemas
from cbmir_spark.lake.open import OpenLake, open_for_writing
from cbmir_spark.lake.pseudonyms import KINDS, Pseudonyms
from cbmir_spark.lake.publication import Published
from cbmir_spark.lake.runs import Record
from cbmir_spark.maintenance.erase_files import RETENTION_HOURS, erase_answers, erase_checkpoints, erase_snapshots
from cbmir_spark.maintenance.erase_tables import erase_features, erase_images, tables_of_images
from cbmir_spark.maintenance.removal import Removed, belonging, masked
from cbmir_spark.storage import ObjectStore

PSEUDONYM = "pseudonym"

_PSEUDONYM = re.compile(rf"({'|'.join(KINDS)}):([0-9a-f]{{32}})")


@dataclass(frozen=True)
class Request:
    """One thing to forget: an identifier of one of KINDS, or, as kind `pseudonym`, kind:32 hexadecimal digits."""

    kind: str
    value: str = field(repr=False)


@dataclass(frozen=True)
class Report:
    """Counts of one run: `unknown` of the `asked` requests matched no image; `tombstones` are new.

    `places` says what was removed from where; `vacuumed_hours` is the age of the superseded files that were removed.
    """

    asked: int
    unknown: int
    tombstones: int
    images: int
    places: Mapping[str, Removed]
    vacuumed_hours: int | None
    seconds: Mapping[str, float]


@dataclass(frozen=True)
class _Erased:
    """The images erased, as rows of TAGS with their ids and batch, and what was removed by place."""

    published: Published | None
    images: Sequence[Row]
    places: Mapping[str, Removed]


def read_list(uri: str, store: ObjectStore) -> tuple[Request, ...]:
    """Read a CSV with the columns `kind` (patient, study, series, image or pseudonym) and `identifier`.

    Raises InputError naming the row's number, never its content.
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
    """(kind, pseudonym) of each request. Raises InputError for an empty identifier or a malformed pseudonym."""
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


def run(
    spark: SparkSession, settings: Settings, requests: Sequence[Request], *, now: bool = False, purge: bool = False
) -> Report:
    """Forget the requests, and finish what earlier runs left; `now` or `purge` then removes superseded files.

    Without requests it only does the latter two. A lake without images takes tombstones where a key is configured.
    Raises InputError before anything is changed where a request cannot be understood, TableError for a lake made with
    another key, or without images and without a configured key, Busy while another job writes to the lake.
    """
    if not requests and not (now or purge):
        raise InputError("nothing to forget: give --patient, --study, --series, --image, --pseudonym or --list")
    may_be_new = pseudonyms.is_configured(settings.privacy)
    with open_for_writing(spark, settings, lease.TABLES, lease.INDEX, may_be_new=may_be_new) as lake:
        record = Record.begin("forget")
        asked = owners_of(requests, lake.names)
        with record.stage("tombstones"):
            new = _add_tombstones(lake, asked)
        lake.store.delete_folder(lake.paths.staging)
        erased = _Erased(None, [], {})
        if lake.published is not None:
            erased = _erase(lake, lake.published, record, now=now, purge=purge)
        hours = 0 if now else RETENTION_HOURS if purge else None
        if hours is not None:
            with record.stage("vacuum"):
                for path in tables_of_images(lake):
                    delta.vacuum(spark, path, hours)
        known = {(kind, row[column]) for row in erased.images for kind, column in schemas.OWNERS.items()}
        unknown = sum(owner not in known for owner in asked)
        report = Report(len(asked), unknown, new, len(erased.images), erased.places, hours, record.seconds)
        _write_run(lake, erased.published, report, record)
    return report


def _add_tombstones(lake: OpenLake, owners: Iterable[tuple[str, str]]) -> int:
    """Add the owners that FORGOTTEN lacks; their number."""
    moment = datetime.now(UTC)
    rows = [(kind, pseudonym, lake.names.key_id, moment) for kind, pseudonym in sorted(set(owners))]
    table = schemas.FORGOTTEN
    return identity.merge_new(lake.spark, lake.spark.createDataFrame(rows, table.schema), table, lake.paths.path(table))


def _erase(lake: OpenLake, pinned: Published, record: Record, *, now: bool, purge: bool) -> _Erased:
    """Remove whatever belongs to any tombstone."""
    spark, paths, store = lake.spark, lake.paths, lake.store
    publication.roll_back(spark, paths, pinned)
    evolved = delta.evolve(lake.table(schemas.SOURCES, pinned.sources), schemas.SOURCES, pinned.message())
    pinned = pinned if evolved is None else replace(pinned, sources=evolved)
    forgotten = delta.read(spark, paths.path(schemas.FORGOTTEN)).collect()
    owners = {(row[cols.KIND], row[cols.PSEUDONYM]) for row in forgotten}
    tags = lake.table(schemas.TAGS, pinned.tags).rows.select(cols.BATCH, *schemas.OWNERS.values())
    images = masked(tags, belonging(owners)).collect()
    mask = belonging(owners | {("image", row[cols.IMAGE_ID]) for row in images})
    places: dict[str, Removed] = {}
    with record.stage("snapshots"):
        places["snapshots"] = erase_snapshots(spark, paths, mask, store, now=now, purge=purge)
        # A stopped training could not be resumed from them: its snapshot has changed.
        places["checkpoints"] = erase_checkpoints(paths, store, now=now or bool(images), purge=purge)
    with record.stage("results"):
        newest = max((row[cols.FORGOTTEN_AT].timestamp() for row in forgotten), default=0.0)
        places["results"], places["pages"] = erase_answers(paths, mask, newest, store)
    lake.check_leases()
    with record.stage("features"):
        places["features"] = erase_features(lake, mask)
    lake.check_leases()
    with record.stage("images"):
        pinned, removed = erase_images(lake, pinned, images, mask)
        places |= removed
    with record.stage("identity"):
        left = lake.table(schemas.TAGS, pinned.tags).rows
        places["identity"] = Removed(rows=identity.prune_identities(spark, paths, left))
    return _Erased(pinned, images, places)


def _write_run(lake: OpenLake, published: Published | None, report: Report, record: Record) -> None:
    written = {}
    if published is not None:
        written = {"sources": published.sources, "tags": published.tags, "pixels": published.pixels}
    counts = {name: getattr(report, name) for name in ("asked", "unknown", "tombstones", "images")}
    counts |= {f"{name}_rows": removed.rows for name, removed in report.places.items() if removed.rows}
    record.write(lake.spark, lake.paths, counts=counts, versions_written=written)
