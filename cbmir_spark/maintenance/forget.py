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
from pyspark.sql import functions as F

from cbmir_spark import storage
from cbmir_spark.config import Settings
from cbmir_spark.errors import InputError
from cbmir_spark.lake import columns as cols
from cbmir_spark.lake import delta, identity, lease, pseudonyms, publication, schemas
from cbmir_spark.lake.open import OpenLake, open_for_writing
from cbmir_spark.lake.pseudonyms import KINDS, PADDING, PatientRule, Pseudonyms
from cbmir_spark.lake.publication import Published
from cbmir_spark.lake.runs import Record
from cbmir_spark.maintenance.erase_files import RETENTION_HOURS, erase_answers, erase_checkpoints, erase_snapshots
from cbmir_spark.maintenance.erase_tables import erase_features, erase_images, tables_of_images
from cbmir_spark.maintenance.removal import Removed, belonging, masked
from cbmir_spark.storage import ObjectStore

PSEUDONYM, PATIENT = "pseudonym", "patient"

_PSEUDONYM = re.compile(rf"({'|'.join(KINDS)}):([0-9a-f]{{32}})")


@dataclass(frozen=True)
class Request:
    """One thing to forget: an identifier of one of KINDS, or, as kind `pseudonym`, kind:32 hexadecimal digits.

    `issuer` is the Issuer of Patient ID of a patient.
    """

    kind: str
    value: str = field(repr=False)
    issuer: str | None = field(default=None, repr=False)


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

    @property
    def matched_nothing(self) -> bool:
        """True if there is nothing of anything that was asked for: an identifier may be misspelled."""
        erased = any(each.rows or each.files for each in self.places.values())
        return self.asked > 0 and self.unknown == self.asked and not erased


@dataclass(frozen=True)
class _Erased:
    """The images erased, as rows of TAGS with their ids and batch, and what was removed by place."""

    published: Published | None
    images: Sequence[Row]
    places: Mapping[str, Removed]


def read_list(uri: str, store: ObjectStore) -> tuple[Request, ...]:
    """Read a CSV with the columns `kind` (patient, study, series, image or pseudonym), `identifier` and, if any has
    one, `issuer`.

    Raises InputError naming the row's number, never its content.
    """
    try:
        text = store.read_bytes(storage.canonical(uri)).decode("utf-8-sig")
        rows = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    except (OSError, UnicodeDecodeError, csv.Error):
        raise InputError(f"list {uri} cannot be read as CSV in UTF-8: give a file with kind,identifier") from None
    header = [name.strip() for name in rows[0]] if rows else []
    if header not in ([cols.KIND, cols.IDENTIFIER], [cols.KIND, cols.IDENTIFIER, cols.ISSUER]):
        raise InputError(
            f"list {uri}: the first line must be {cols.KIND},{cols.IDENTIFIER} or "
            f"{cols.KIND},{cols.IDENTIFIER},{cols.ISSUER}"
        )
    found = []
    for number, row in enumerate(rows[1:], start=2):
        if not row:
            continue
        if len(row) != len(header) or row[0].strip() not in (*KINDS, PSEUDONYM) or not row[1].strip(PADDING):
            raise InputError(
                f"list {uri}, line {number}: give {', '.join(KINDS)} or {PSEUDONYM}, a comma and the identifier"
            )
        issuer = row[2].strip(PADDING) if len(row) > 2 else ""
        if issuer and row[0].strip() != PATIENT:
            raise InputError(f"list {uri}, line {number}: only a {PATIENT} has an issuer")
        found.append(Request(row[0].strip(), row[1], issuer or None))
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
        elif not request.value.strip(PADDING):
            raise InputError(f"--{request.kind}: the identifier is empty")
        elif request.kind == PATIENT:
            found.append((PATIENT, _patient(request, names)))
        else:
            found.append((request.kind, names.of_kind(request.kind, request.value)))
    return found


def _patient(request: Request, names: Pseudonyms) -> str:
    """The pseudonym of a patient. Raises InputError for one that the lake's rule cannot tell from others."""
    if names.patients is PatientRule.FIRST and ("\\" in request.value or request.issuer):
        raise InputError(
            "this lake was made by an older version, which merged the patients whose ID begins alike up to a "
            "backslash, and knows no issuers: run `cbmir upgrade --apply` and `cbmir ingest` first, or forget by study"
        )
    if request.issuer and names.patients is not PatientRule.ISSUER:
        raise InputError(
            "this lake identifies patients without their issuer: leave the issuer out, or set "
            "privacy.patient_issuer=include and run `cbmir upgrade --apply` and `cbmir ingest` first"
        )
    return names.patient(_typed(request.value), request.issuer)


def _typed(text: str) -> str:
    """Read bytes of the command line that are not UTF-8 as Latin-1, as `dicom.elements.identifier` does."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogateescape").decode("latin-1")
    return text


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
        _check_patients(lake, requests)
        with record.stage("tombstones"):
            new = _add_tombstones(lake, asked)
        lake.store.delete_folder(lake.paths.staging)
        lake.store.delete(lake.paths.unlisted)
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


def _holds(tombstone: Row, rule: PatientRule) -> bool:
    """Tell whether the pseudonym of a tombstone means the same in rows made by `rule`."""
    made_by = tombstone.asDict().get(cols.PATIENT_RULE) or PatientRule.FIRST
    return tombstone[cols.KIND] != PATIENT or made_by == rule


def _check_patients(lake: OpenLake, requests: Iterable[Request]) -> None:
    """Raise InputError for a patient while images may still have the pseudonym of the rule before."""
    if (
        lake.published is None
        or lake.published.patients is PatientRule.FIRST
        or all(request.kind != PATIENT for request in requests)
    ):
        return
    sources = lake.table(schemas.SOURCES, lake.published.sources).rows
    marked = (F.col(cols.OUTCOME) == cols.INGESTED) & (F.col(cols.REASON) == cols.REREAD)
    if waiting := sources.where(marked).count():
        raise InputError(
            f"{waiting} images wait to be read again, and their patients may still have another pseudonym: run "
            "`cbmir ingest` first, or forget by study"
        )


def _add_tombstones(lake: OpenLake, owners: Iterable[tuple[str, str]]) -> int:
    """Add the owners that FORGOTTEN lacks; their number. A patient of another rule is another one."""
    table, moment, names = schemas.FORGOTTEN, datetime.now(UTC), lake.names
    path = lake.paths.path(table)
    before = delta.read(lake.spark, path).collect() if delta.exists(lake.spark, path) else []
    known = {(row[cols.KIND], row[cols.PSEUDONYM]) for row in before if _holds(row, names.patients)}
    missing = sorted(set(owners) - known)
    rows = [(kind, pseudonym, names.key_id, moment, str(names.patients)) for kind, pseudonym in missing]
    new = lake.spark.createDataFrame(rows, table.schema)
    return identity.merge_new(lake.spark, new, table, path, cols.PATIENT_RULE)


def _erase(lake: OpenLake, pinned: Published, record: Record, *, now: bool, purge: bool) -> _Erased:
    """Remove whatever belongs to any tombstone."""
    spark, paths, store = lake.spark, lake.paths, lake.store
    publication.roll_back(spark, paths, pinned)
    evolved = delta.evolve(lake.table(schemas.SOURCES, pinned.sources), schemas.SOURCES, pinned.message())
    pinned = pinned if evolved is None else replace(pinned, sources=evolved)
    forgotten = delta.read(spark, paths.path(schemas.FORGOTTEN)).collect()
    owners = {(row[cols.KIND], row[cols.PSEUDONYM]) for row in forgotten if _holds(row, lake.names.patients)}
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
