"""The whole ingest over a real S3 server, which answers well, badly, late or not at all: the tables are the same."""

import hashlib
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from pydicom.data import get_testdata_file
from pyspark.sql import DataFrame, SparkSession

from cbmir_spark import config, storage
from cbmir_spark.errors import CbmirError
from cbmir_spark.ingest import job as ingest_job
from cbmir_spark.lake import columns as cols
from cbmir_spark.lake import delta, publication, schemas
from cbmir_spark.lake.paths import LakePaths
from cbmir_spark.storage import ObjectStore
from tests.support import s3_server
from tests.support.archives import NIGHT, sample
from tests.support.fault_proxy import Answer, Before, DropReply, FaultProxy, Request, Reset, Rule, each, listings, share
from tests.support.s3_server import S3Server

pytestmark = pytest.mark.timeout(900)

TABLES = (schemas.TAGS, schemas.PIXELS, schemas.SOURCES)
# Columns that say when and how rows came to be, rather than what the archive holds.
OF_THE_RUN = {cols.BATCH, cols.ETAG}
SLOW_DOWN = Answer(503, "SlowDown")
# At every "SlowDown" the AWS client of the JVM halves its pace: a tenth of them is all it takes to make minutes of
# seconds. This is the same refusal without the request to slow down.
UNAVAILABLE = Answer(503, "ServiceUnavailable")


@dataclass(frozen=True)
class World:
    """An archive that is both a folder and part of a bucket, and what ingest makes of it as a folder."""

    server: S3Server
    folder: Path
    key_file: Path
    spark: SparkSession
    digest: dict[str, str]
    objects: int

    @property
    def archive(self) -> str:
        return "s3a://" + "/".join(self.folder.parts[-2:])

    def settings(self, lake: str, *overrides: str, proxy: FaultProxy | None = None) -> config.Settings:
        """Settings of a lake, `s3a:` or local, in which everything goes to the server or to a proxy before it."""
        endpoint = proxy.endpoint if proxy else self.server.endpoint
        if lake.startswith("s3a://"):
            s3_server.reach(self.spark, lake.split("/")[2], endpoint)
        return _settings(self.key_file, f"lake.uri={lake}", f"storage.endpoint={endpoint}", *overrides)


def _settings(key_file: Path, *overrides: str) -> config.Settings:
    # Small tasks, so that there is more than one of them.
    return config.load(overrides=["ingest.files_per_task=16", f"privacy.key_file={key_file}", *overrides], environ={})


def _fill(folder: Path, files: int) -> int:
    """`files` of pydicom's own small files, and images of one SOP instance: a duplicate and a correction."""
    root = Path(str(get_testdata_file("CT_small.dcm"))).parent
    small = sorted(path for path in root.glob("*.dcm") if path.stat().st_size < 16_000)
    for number in range(files):
        source = small[number % len(small)]
        target = folder / f"{number:04d}" / source.name
        target.parent.mkdir(parents=True)
        shutil.copyfile(source, target)
        os.utime(target, (NIGHT.timestamp() + number,) * 2)
    sample(folder, "ct/one.dcm", hour=1)
    shutil.copy2(folder / "ct/one.dcm", folder / "ct/one again.dcm")
    sample(folder, "ct/two.dcm", hour=1, SOPInstanceUID="1.2.3.2", PatientSex="F")
    sample(folder, "ct/two corrected.dcm", hour=2, SOPInstanceUID="1.2.3.2", PatientSex="M")
    (folder / ".hidden").write_text("not DICOM at all")
    (folder / "empty.dcm").touch()
    for path in folder.rglob("*"):
        if path.is_file():
            os.utime(path, (int(path.stat().st_mtime),) * 2)
    return files + 6


def _rows(spark: SparkSession, settings: config.Settings, table: schemas.Table) -> DataFrame:
    lake = LakePaths.of(settings.lake)
    pinned = publication.require_published(spark, lake)
    return delta.read(spark, lake.path(table), getattr(pinned, table.name))


def _digest(spark: SparkSession, settings: config.Settings) -> dict[str, str]:
    """A digest of the live rows of each table, and how many there are; uris relative to the archive."""
    archive = storage.canonical(settings.ingest.archive or "")
    digests = {}
    for table in TABLES:
        frame = _rows(spark, settings, table)
        names = [name for name in frame.columns if name not in OF_THE_RUN]
        rows = [row.asDict() for row in frame.select(names).collect()]
        for row in rows:
            if cols.URI in row:
                row[cols.URI] = row[cols.URI].removeprefix(archive + "/")
        lines = sorted(repr([(name, row[name]) for name in names]) for row in rows)
        digests[table.name] = f"{len(lines)} rows {hashlib.sha256(chr(10).join(lines).encode()).hexdigest()}"
    return digests


def _commits(settings: config.Settings) -> dict[str, list[str]]:
    """The names of the commits of each table, straight from storage."""
    lake = LakePaths.of(settings.lake)
    found = {}
    for table in TABLES:
        _, objects = ObjectStore(settings.storage).list_folder(storage.join(lake.path(table), "_delta_log"))
        found[table.name] = [o.uri.rpartition("/")[2] for o in objects if o.uri.endswith(".json")]
        assert found[table.name]
    return found


def _world(spark: SparkSession, server: S3Server, folder: Path, name: str, files: int) -> World:
    archive = server.bucket(name) / "archive"
    objects = _fill(archive, files)
    key_file = folder / "pseudonym.key"
    key_file.write_text("a key for the tests of object storage")
    settings = _settings(key_file, f"ingest.archive={archive}", f"lake.uri={folder / 'lake'}")
    report = ingest_job.run(spark, settings)
    assert report.listed == objects == report.read
    assert report.outcomes[cols.INGESTED] > files // 4
    return World(server, archive, key_file, spark, _digest(spark, settings), objects)


@pytest.fixture(scope="module")
def world(spark: SparkSession, s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> World:
    return _world(spark, s3, tmp_path_factory.mktemp("world"), "pacs", 38)


@pytest.fixture(scope="module")
def undisturbed(spark: SparkSession, world: World) -> config.Settings:
    """A lake in object storage after its first night."""
    world.server.bucket("undisturbed")
    settings = world.settings("s3a://undisturbed/lake", f"ingest.archive={world.archive}")
    report = ingest_job.run(spark, settings)
    assert report.listed == world.objects == report.read
    return settings


def test_archive_and_lake_in_object_storage_hold_what_folders_hold(
    spark: SparkSession, world: World, undisturbed: config.Settings
) -> None:
    assert _digest(spark, undisturbed) == world.digest
    lake = LakePaths.of(undisturbed.lake)
    before = _commits(undisturbed)
    again = ingest_job.run(spark, undisturbed)
    assert (again.read, again.unchanged, again.deleted) == (0, world.objects, 0)
    assert _commits(undisturbed) == before
    left = [o.uri for o in ObjectStore(undisturbed.storage).list_objects(lake.vault) if "/staging/" in o.uri]
    assert left == []


def _of(bucket: str, rule: Rule) -> Rule:
    return lambda request: rule(request) if request.path.startswith(f"/{bucket}") else None


def test_refused_requests_and_lost_replies_change_nothing(
    spark: SparkSession, world: World, undisturbed: config.Settings
) -> None:
    """One request in ten is refused, and the first answer to every commit is lost once the server has it."""
    world.server.bucket("weather")
    lost = each("PUT", r"/_delta_log/\d+\.json$", DropReply())
    refused = share(0.1, 1, SLOW_DOWN), share(0.1, 1, UNAVAILABLE)
    rules = [lost, _of("pacs", refused[0]), _of("weather", refused[1])]
    with FaultProxy(world.server.host, world.server.port, rules) as proxy:
        settings = world.settings("s3a://weather/lake", f"ingest.archive={world.archive}", proxy=proxy)
        report = ingest_job.run(spark, settings)
        assert report.outcomes.get(cols.VANISHED, 0) == 0
        assert _digest(spark, settings) == world.digest
        faults = proxy.faults()
        answered = [request.path for request, fault in faults if isinstance(fault, Answer)]
        assert 0.05 * len(proxy.seen) < len(answered) < 0.2 * len(proxy.seen)
        assert {path.split("/")[1] for path in answered} == {"pacs", "weather"}
        unanswered = [request.path for request, fault in faults if isinstance(fault, DropReply)]
        assert len(unanswered) == len(set(unanswered))
        commits = _commits(settings)
        # RUNS has other commits.
        of_tables = [path for path in unanswered if "/runs/" not in path]
        assert sum(len(found) for found in commits.values()) == len(of_tables) < len(unanswered)
        assert commits == _commits(undisturbed)


@dataclass(frozen=True)
class Moving:
    """A local lake after a night in which objects of its archive were replaced and deleted meanwhile."""

    archive: str
    lake: str
    settings: config.Settings
    report: ingest_job.Report
    replaced: tuple[str, ...]
    deleted: tuple[str, ...]
    content: bytes


@pytest.fixture(scope="module")
def moving(spark: SparkSession, world: World, tmp_path_factory: pytest.TempPathFactory) -> Moving:
    folder = tmp_path_factory.mktemp("moving")
    archive = world.server.bucket("moving") / "archive"
    shutil.copytree(world.folder, archive)
    uri = "s3a://moving/archive"
    files = world.settings(str(folder / "lake")).storage
    content = sample(folder, "x.dcm", source="MR_small.dcm", SOPInstanceUID="1.2.3.9").read_bytes()
    replaced, deleted = ("ct/one.dcm", "empty.dcm"), ("ct/two.dcm", ".hidden")

    def replace(name: str) -> Rule:
        return each(
            "GET", re.escape(name) + "$", Before(lambda: ObjectStore(files).write_bytes(f"{uri}/{name}", content))
        )

    def delete(name: str) -> Rule:
        return each("GET", re.escape(name) + "$", Before((archive / name).unlink))

    rules = [*map(replace, replaced), *map(delete, deleted), each("GET", r"/0007/", Reset())]
    with FaultProxy(world.server.host, world.server.port, rules) as proxy:
        settings = world.settings(str(folder / "lake"), f"ingest.archive={uri}", proxy=proxy)
        report = ingest_job.run(spark, settings)
        assert len(proxy.faults()) == 5
    settings = world.settings(str(folder / "lake"), f"ingest.archive={uri}")
    return Moving(uri, str(folder / "lake"), settings, report, replaced, deleted, content)


def test_objects_replaced_or_deleted_while_the_job_runs(spark: SparkSession, world: World, moving: Moving) -> None:
    """Each row describes the bytes read, vanished objects are counted, and the next night finds nothing else to do."""
    assert moving.report.listed == world.objects
    assert moving.report.outcomes[cols.VANISHED] == len(moving.deleted)
    found = _rows(spark, moving.settings, schemas.SOURCES).collect()
    rows = {row[cols.URI].removeprefix(moving.archive + "/"): row for row in found}
    assert {name for name, row in rows.items() if row[cols.OUTCOME] == cols.VANISHED} == set(moving.deleted)
    for name in moving.replaced:
        now = ObjectStore(moving.settings.storage).find(f"{moving.archive}/{name}")
        assert now is not None and now.etag
        assert rows[name][cols.DIGEST] == hashlib.sha256(moving.content).hexdigest()
        assert rows[name][cols.OUTCOME] in (cols.INGESTED, cols.DUPLICATE)
        assert (rows[name][cols.SIZE], rows[name][cols.ETAG]) == (now.size, now.etag)
    assert {rows[name][cols.OUTCOME] for name in moving.replaced} == {cols.INGESTED, cols.DUPLICATE}
    again = ingest_job.run(spark, moving.settings)
    left = world.objects - len(moving.deleted)
    assert (again.read, again.unchanged, again.deleted) == (0, left, len(moving.deleted))


def _one_folder(request: Request) -> Answer | None:
    """Refuses to list a single folder, which a task lists long after the driver listed the rest."""
    return SLOW_DOWN if request.is_listing and "0007" in request.target else None


@pytest.mark.parametrize(
    "rule",
    [listings(SLOW_DOWN), listings(Answer(403, "AccessDenied")), listings(Answer(404, "NoSuchBucket")), _one_folder],
    ids=["refused", "denied", "no bucket", "one folder refused"],
)
def test_a_listing_that_fails_deletes_nothing(spark: SparkSession, world: World, moving: Moving, rule: Rule) -> None:
    commits = _commits(moving.settings)
    with FaultProxy(world.server.host, world.server.port, [rule]) as proxy:
        again = world.settings(moving.lake, f"ingest.archive={moving.archive}", "storage.attempts=2", proxy=proxy)
        with pytest.raises(CbmirError) as caught:
            ingest_job.run(spark, again)
        assert proxy.faults()
    assert caught.value.exit_code != 0
    assert len(str(caught.value).splitlines()) == 1
    assert "0007" not in str(caught.value)
    assert _commits(moving.settings) == commits


@pytest.mark.soak
@pytest.mark.timeout(3 * 3600)
@pytest.mark.parametrize("seed", range(10))
def test_bad_weather_of_every_kind_changes_nothing(
    spark: SparkSession, s3: S3Server, tmp_path: Path, seed: int
) -> None:
    """Refusals, resets and lost replies at once, over more objects."""
    larger = _world(spark, s3, tmp_path, f"larger-{seed}", 1000)
    s3.bucket(f"weather-{seed}")
    rules = [
        each("PUT", r"/_delta_log/\d+\.json$", DropReply()),
        share(0.1, seed, UNAVAILABLE),
        share(0.001, seed + 500, SLOW_DOWN),
        share(0.03, seed + 1000, Reset()),
        share(0.03, seed + 2000, Answer(500, "InternalError")),
    ]
    with FaultProxy(s3.host, s3.port, rules) as proxy:
        settings = larger.settings(f"s3a://weather-{seed}/lake", f"ingest.archive={larger.archive}", proxy=proxy)
        ingest_job.run(spark, settings)
        assert _digest(spark, settings) == larger.digest
