"""Archives of every kind: real files, other file systems, and those that cannot be listed or read."""

import csv
import errno
import os
import socket
import subprocess
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from pyspark.errors import AnalysisException
from pyspark.sql import DataFrameReader, SparkSession

from cbmir_spark import config, storage
from cbmir_spark.dicom.read import Reason
from cbmir_spark.errors import EnvironmentProblem, InputError
from cbmir_spark.ingest import job as ingest_job
from cbmir_spark.ingest import listing
from cbmir_spark.lake import columns as cols
from cbmir_spark.lake import delta, schemas
from cbmir_spark.lake.paths import LakePaths
from cbmir_spark.storage import ObjectStore
from tests.conftest import MakeSettings
from tests.support.archives import sample
from tests.support.dicom_index import predicted
from tests.support.fault_proxy import Answer, Fault, FaultProxy, Request
from tests.support.nights import Night, key_file_of, live_rows
from tests.support.places import Place, s3_settings
from tests.support.s3_server import S3Server

pytestmark = pytest.mark.slow


def test_real_files_have_the_outcome_that_their_index_predicts(
    spark: SparkSession, make_settings: MakeSettings, shared_data: Path
) -> None:
    """Every file below the folder gets exactly one outcome, and whatever decodes yields frames or a reason."""
    settings = make_settings(f"ingest.archive={shared_data / 'dicom'}")
    report = ingest_job.run(spark, settings)
    files = sorted(str(p) for p in (shared_data / "dicom").rglob("*") if p.is_file())
    lake = LakePaths.of(settings.lake)
    rows = delta.read(spark, lake.path(schemas.SOURCES)).collect()
    assert sorted(storage.local_path(row["uri"]) for row in rows) == [os.path.abspath(f) for f in files]
    assert report.listed == len(files) == sum(report.outcomes.values())
    with (shared_data / "dicom_index.csv").open(newline="", encoding="utf-8") as index:
        wanted = {os.path.abspath(shared_data / row["file"]): predicted(row) for row in csv.DictReader(index)}
    for row in rows:
        # Beside the files of the index lie their licences.
        outcome, reason = wanted.get(storage.local_path(row["uri"]), (cols.NOT_AN_IMAGE, Reason.NOT_DICOM))
        may_be = (cols.INGESTED, cols.DUPLICATE, cols.CONFLICT) if outcome == cols.INGESTED else (outcome,)
        assert row["outcome"] in may_be and row["reason"] == reason, row["uri"]
    images = [row["image_id"] for row in rows if row["outcome"] == cols.INGESTED]
    assert len(images) == len(set(images)) > 150
    pixels = delta.read(spark, lake.path(schemas.PIXELS), report.published.pixels)
    assert {row["image_id"] for row in pixels.select("image_id").distinct().collect()} == set(images)
    assert "INTERNAL" not in report.reasons
    again = ingest_job.run(spark, settings)
    assert (again.read, again.unchanged) == (0, len(files))


def test_an_archive_that_only_hadoop_can_read(spark: SparkSession, night: Night, tmp_path: Path) -> None:
    """By a mount of Hadoop's ViewFs, the same rows as from the folder itself; Spark sees no empty or hidden one."""
    jvm = spark.sparkContext._jsc
    assert jvm is not None
    jvm.hadoopConfiguration().set("fs.viewfs.mounttable.clinic.link./pacs", night.archive.as_uri())
    lake = LakePaths.of(night.settings.lake)
    settings = config.load(
        overrides=["ingest.archive=viewfs://clinic/pacs", f"lake.uri={tmp_path / 'lake'}", key_file_of(lake)],
        environ={},
    )
    report = ingest_job.run(spark, settings)
    assert report.listed == report.read == 9
    mounted, direct = live_rows(spark, settings), live_rows(spark, night.settings)
    assert mounted["tags"] == direct["tags"]
    assert mounted["pixels"] == direct["pixels"]
    assert ingest_job.run(spark, settings).unchanged == 9
    absent = config.load(overrides=[f"lake.uri={tmp_path / 'other'}", "ingest.archive=viewfs://clinic/no"], environ={})
    with pytest.raises(InputError, match="does not exist"):
        ingest_job.run(spark, absent)


def test_bad_archives_and_lakes_are_refused_before_anything_is_made(
    spark: SparkSession, make_settings: MakeSettings, tmp_path: Path
) -> None:
    archive = tmp_path / "archive"
    archive.mkdir()
    (tmp_path / "file").touch()
    for overrides, message in [
        ((), "no archive named"),
        ((f"ingest.archive={tmp_path / 'absent'}",), "does not exist"),
        ((f"ingest.archive={tmp_path / 'file'}",), "is a file"),
        ((f"ingest.archive={archive}", f"lake.uri={tmp_path / 'file'}"), "is a file"),
        ((f"ingest.archive={archive}", f"lake.uri={archive / 'lake'}"), "is inside archive"),
    ]:
        with pytest.raises(InputError, match=message):
            ingest_job.run(spark, make_settings(*overrides))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["archive", "file"]


def test_an_empty_archive_that_is_known_is_refused_as_a_lost_mount(spark: SparkSession, night: Night) -> None:
    before = live_rows(spark, night.settings)
    away = night.archive.with_name("away")
    night.archive.rename(away)
    night.archive.mkdir()
    try:
        with pytest.raises(InputError, match="is it mounted"):
            ingest_job.run(spark, night.settings)
    finally:
        night.archive.rmdir()
        away.rename(night.archive)
    assert live_rows(spark, night.settings) == before


ENTRIES: dict[str, Callable[[Path], object]] = {
    "link to itself": lambda path: path.symlink_to(path),
    "link to nothing": lambda path: path.symlink_to(path.parent / "absent"),
    "link through a file": lambda path: path.symlink_to(path.parent / "sound.dcm" / "x"),
    "link with a long name": lambda path: path.symlink_to("x" * 4000),
    "pipe": os.mkfifo,
    "socket": lambda path: socket.socket(socket.AF_UNIX).bind(str(path)),
}


def test_an_entry_that_is_no_file_costs_nothing_but_itself(
    spark: SparkSession, make_settings: MakeSettings, tmp_path: Path
) -> None:
    """What was read at or below it stays: links may lead to storage that is not mounted tonight."""
    archive = tmp_path / "archive"
    archive.mkdir()
    uids = (f"1.2.3.{number}" for number in count())
    for folder in ("", *(f"MILLER{number}/" for number in range(8))):
        sample(archive, f"{folder}sound.dcm", hour=1, SOPInstanceUID=next(uids))
    # Links to a folder and to a file outside, which will lead nowhere.
    for name in ("elsewhere/one.dcm", "one.dcm"):
        sample(tmp_path / "outside", name, hour=1, SOPInstanceUID=next(uids))
    (archive / "folder").symlink_to(tmp_path / "outside" / "elsewhere")
    (archive / "file").symlink_to(tmp_path / "outside" / "one.dcm")
    settings = make_settings(f"ingest.archive={archive}")
    assert ingest_job.run(spark, settings).outcomes == {cols.INGESTED: 11}
    before = live_rows(spark, settings)
    (tmp_path / "outside").rename(tmp_path / "unmounted")
    working = os.getcwd()
    for name, make in ENTRIES.items():
        for folder in (archive, archive / "MILLER7"):
            # The path of a socket is bounded.
            os.chdir(folder)
            make(Path(name) if name == "socket" else folder / name)
            os.chdir(working)
    report = ingest_job.run(spark, settings)
    assert report.reasons == {cols.NOT_A_FILE: 2 * len(ENTRIES) + 1}
    assert report.outcomes == {cols.NOT_AN_IMAGE: 2 * len(ENTRIES) + 1}
    named = live_rows(spark, settings)
    assert objects(named) == before
    again = ingest_job.run(spark, settings)
    assert again.read == 0 and live_rows(spark, settings) == named
    (tmp_path / "unmounted").rename(tmp_path / "outside")
    for folder in (archive, archive / "MILLER7"):
        for name in ENTRIES:
            (folder / name).unlink()
    ingest_job.run(spark, settings)
    assert objects(live_rows(spark, settings)) == before


def objects(rows: dict[str, list[tuple[object, ...]]]) -> dict[str, list[tuple[object, ...]]]:
    """The rows of objects that are files, or have frames."""
    gone = {cols.NOT_A_FILE, cols.DELETED}
    return {
        table: [row for row in some if gone.isdisjoint(each for each in row if isinstance(each, str))]
        for table, some in rows.items()
    }


@pytest.mark.parametrize("folders", [3, 40], ids=["by the driver", "in tasks"])
def test_a_folder_that_cannot_be_listed_deletes_nothing(
    spark: SparkSession, make_settings: MakeSettings, tmp_path: Path, folders: int
) -> None:
    """The vault names it with the cause; the message does not, since names of folders may be patients'."""
    archive = tmp_path / "archive"
    for number in range(folders):
        sample(archive, f"MILLER{number}/one.dcm", hour=1, SOPInstanceUID=f"1.2.3.{number}")
    settings = make_settings(f"ingest.archive={archive}")
    ingest_job.run(spark, settings)
    before = live_rows(spark, settings)
    # Nobody can list the network of a process that has ended, root included.
    ended = subprocess.Popen(["true"])
    lost = {archive / "MILLER1": tmp_path / "one", archive / "MILLER2": tmp_path / "two"}
    for folder, elsewhere in lost.items():
        folder.rename(elsewhere)
        folder.symlink_to(f"/proc/{ended.pid}/net")
    with pytest.raises(EnvironmentProblem, match="2 folders or prefixes of the archive could not be listed") as raised:
        ingest_job.run(spark, settings)
    ended.wait()
    file = Path(storage.local_path(LakePaths.of(settings.lake).unlisted))
    assert f"{file} names them" in str(raised.value) and "MILLER" not in str(raised.value)
    heading, *named = csv.reader(file.read_text(encoding="utf-8").splitlines())
    assert heading == ["folder", "cause"]
    assert [folder for folder, _ in named] == [storage.canonical(str(folder)) for folder in lost]
    assert all(cause and f"({cause})" in str(raised.value) for _, cause in named)
    assert live_rows(spark, settings) == before
    for folder, elsewhere in lost.items():
        folder.unlink()
        elsewhere.rename(folder)
    assert ingest_job.run(spark, settings).unchanged == folders
    assert not file.exists()


def test_all_folders_that_permissions_refuse_are_named(
    spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may list every folder, so the refusal is put into the store of the driver."""
    archive, store = tmp_path / "archive", ObjectStore(config.load(environ={}).storage)
    for name in ("MILLER, A", "sound", 'MILLER\n"B"'):
        (archive / name / "below").mkdir(parents=True)
        (archive / name / "one.dcm").write_bytes(b"x")
    root = storage.canonical(str(archive))
    scan = ObjectStore.scan_folder

    def refuse(self: ObjectStore, uri: str) -> Any:
        if "MILLER" in uri:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return scan(self, uri)

    monkeypatch.setattr(ObjectStore, "scan_folder", refuse)
    named_in = storage.canonical(str(tmp_path / "vault" / "unlisted.csv"))
    found = listing.list_archive(spark, root, store)
    with pytest.raises(EnvironmentProblem, match=r"^2 folders .* listed \(Permission denied\): nothing") as raised:
        listing.check_listing(found, named_in, store)
    assert "MILLER" not in str(raised.value)
    with open(storage.local_path(named_in), newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    denied = [f'{root}/MILLER\n"B"', f"{root}/MILLER, A"]
    assert rows == [["folder", "cause"], *([folder, "Permission denied"] for folder in denied)]
    # A task lists what is beside them too, though nothing more once storage fails in another way.
    below = list(listing.objects_below(root, store))
    assert {each.folder for each in below if isinstance(each, listing.Unlisted)} == set(denied)
    assert [each.uri for each in below if isinstance(each, storage.StoredObject)] == [f"{root}/sound/one.dcm"]

    def fail(self: ObjectStore, uri: str) -> Any:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(ObjectStore, "scan_folder", fail)
    assert list(listing.objects_below(root, store)) == [listing.Unlisted(root, os.strerror(errno.EIO))]


@pytest.mark.parametrize("folders", [3, 40], ids=["by the driver", "in tasks"])
def test_a_prefix_that_object_storage_refuses_is_named(
    spark: SparkSession, s3: S3Server, bucket: Place, tmp_path: Path, folders: int
) -> None:
    """With the server's code for the cause, below the archive as below the vault."""
    archive = s3.root / bucket.uri.removeprefix("s3a://")
    for number in range(folders):
        sample(archive, f"MILLER{number}/one.dcm", hour=1, SOPInstanceUID=f"1.2.3.{number}")

    def refuse(request: Request) -> Fault | None:
        return Answer(403, "AccessDenied") if request.is_listing and "MILLER1%2F&" in request.target + "&" else None

    named_in = f"{bucket.uri.rpartition('/')[0]}/vault/unlisted.csv"
    with FaultProxy(s3.host, s3.port, [refuse]) as proxy:
        store = ObjectStore(s3_settings(proxy.endpoint))
        found = listing.list_archive(spark, bucket.uri, store)
        with pytest.raises(EnvironmentProblem, match=r"^1 folders .*AccessDenied") as raised:
            listing.check_listing(found, named_in, store)
    assert f"{named_in} names them" in str(raised.value) and "MILLER" not in str(raised.value)
    heading, row = csv.reader(store_text(s3, named_in).splitlines())
    assert heading == ["folder", "cause"]
    assert row[0] == f"{bucket.uri}/MILLER1" and "AccessDenied" in row[1] and "MILLER" not in row[1]


def test_an_archive_that_hadoop_cannot_list_is_named(
    spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: DataFrameReader, path: str) -> Any:
        raise AnalysisException("permission denied: MILLER")

    store, named_in = ObjectStore(config.load(environ={}).storage), storage.canonical(str(tmp_path / "unlisted.csv"))
    with monkeypatch.context() as patched:
        patched.setattr(DataFrameReader, "load", fail)
        found = listing.list_archive(spark, "hdfs://name:8020/MILLER", store)
    with pytest.raises(EnvironmentProblem, match=r"^1 folders .* listed \(AnalysisException\)") as raised:
        listing.check_listing(found, named_in, store)
    assert "MILLER" not in str(raised.value)
    named = (tmp_path / "unlisted.csv").read_text(encoding="utf-8").splitlines()
    assert named == ["folder,cause", "hdfs://name:8020/MILLER,AnalysisException"]


def store_text(s3: S3Server, uri: str) -> str:
    return (s3.root / uri.removeprefix("s3a://")).read_text(encoding="utf-8")


def test_a_storage_that_refuses_everything_rejects_no_object(
    spark: SparkSession, make_settings: MakeSettings, tmp_path: Path
) -> None:
    """One object that cannot be read is rejected and tried again every night; all of them are the storage's fault."""
    archive = tmp_path / "archive"
    archive.mkdir()
    for number in range(11):
        # Listed like any file; reading it fails for everybody, root included.
        (archive / f"{number}.dcm").symlink_to("/proc/self/mem")
    settings = make_settings(f"ingest.archive={archive}")
    with pytest.raises(EnvironmentProblem, match="refused all 11 objects"):
        ingest_job.run(spark, settings)
    sample(archive, "readable.dcm")
    report = ingest_job.run(spark, settings)
    assert report.reasons == {cols.UNREADABLE: 11} and report.outcomes[cols.INGESTED] == 1
