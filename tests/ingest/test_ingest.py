"""Ingest: one outcome for each object, one winner for each SOP instance, nothing twice, nothing half."""

import csv
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
from pydicom.data import get_testdata_file
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from cbmir_spark import config, storage
from cbmir_spark.dicom.read import Reason
from cbmir_spark.errors import EnvironmentProblem, InputError, TableError
from cbmir_spark.ingest import job as ingest_job
from cbmir_spark.lake import columns as cols
from cbmir_spark.lake import delta, publication, schemas
from cbmir_spark.lake.paths import LakePaths
from tests.conftest import MakeSettings
from tests.support import boundary
from tests.support.archives import at, sample
from tests.support.dicom_index import predicted

pytestmark = pytest.mark.slow


def _fill(folder: Path) -> Path:
    """Twelve objects: three images in five objects, a non-image, and six that cannot be used."""
    sample(folder, "ct/one.dcm", hour=1)
    shutil.copy2(folder / "ct/one.dcm", folder / "ct/one again.dcm")
    sample(folder, "ct/two.dcm", hour=1, SOPInstanceUID="1.2.3.2", PatientSex="F")
    sample(folder, "ct/two corrected.dcm", hour=2, SOPInstanceUID="1.2.3.2", PatientSex="M")
    sample(folder, "mr/three.dcm", source="MR_small.dcm", hour=1)
    shutil.copy(str(get_testdata_file("reportsi.dcm")), folder / "report.dcm")
    whole = (folder / "ct/one.dcm").read_bytes()
    (folder / "cut.dcm").write_bytes(whole[:-700])
    (folder / "empty.dcm").touch()
    (folder / ".hidden").write_text("not DICOM at all")
    (folder / "_notes.txt").write_text("nor this")
    (folder / "zeros.dcm").write_bytes(bytes(5000))
    sample(folder, "nameless.dcm", SOPInstanceUID="not.a.uid")
    return folder


def _live(spark: SparkSession, settings: config.Settings) -> dict[str, list[tuple[object, ...]]]:
    """The live rows of the three tables without what depends on the run."""
    lake = LakePaths.of(settings.lake)
    pinned = publication.require_published(spark, lake)
    found = {}
    for table, version in (
        (schemas.TAGS, pinned.tags),
        (schemas.PIXELS, pinned.pixels),
        (schemas.SOURCES, pinned.sources),
    ):
        rows = delta.read(spark, lake.path(table), version).drop(cols.BATCH, cols.KEY_ID).collect()
        found[table.name] = sorted((tuple(row) for row in rows), key=repr)
    return found


def _outcomes(spark: SparkSession, settings: config.Settings) -> dict[str, str]:
    sources = delta.read(spark, LakePaths.of(settings.lake).path(schemas.SOURCES))
    return {row["uri"].rsplit("/archive/", 1)[1]: row["outcome"] for row in sources.collect()}


def _key_of(lake: LakePaths) -> str:
    return f"privacy.key_file={storage.local_path(lake.vault)}/pseudonym.key"


class Night(NamedTuple):
    """A lake after its first night; tests of it change neither lake nor archive."""

    archive: Path
    overrides: tuple[str, ...]
    settings: config.Settings
    report: ingest_job.Report


@pytest.fixture(scope="module")
def night(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Night:
    folder = tmp_path_factory.mktemp("night")
    archive = _fill(folder / "archive")
    # Slices of five: what belongs together comes in different ones.
    overrides = (f"ingest.archive={archive}", f"lake.uri={folder / 'lake'}", "ingest.max_files_per_batch=5")
    settings = config.load(overrides=overrides, environ={})
    return Night(archive, overrides, settings, ingest_job.run(spark, settings))


def test_each_object_gets_one_outcome(spark: SparkSession, night: Night) -> None:
    assert night.report.listed == 12 == night.report.read
    assert night.report.batches > 1
    assert _outcomes(spark, night.settings) == {
        "ct/one again.dcm": cols.INGESTED,
        "ct/one.dcm": cols.DUPLICATE,
        "ct/two.dcm": cols.CONFLICT,
        "ct/two corrected.dcm": cols.INGESTED,
        "mr/three.dcm": cols.INGESTED,
        "report.dcm": cols.NOT_AN_IMAGE,
        "cut.dcm": cols.REJECTED,
        "empty.dcm": cols.REJECTED,
        ".hidden": cols.NOT_AN_IMAGE,
        "_notes.txt": cols.NOT_AN_IMAGE,
        "zeros.dcm": cols.NOT_AN_IMAGE,
        "nameless.dcm": cols.REJECTED,
    }
    live = _live(spark, night.settings)
    assert len(live["tags"]) == 3 == len(live["pixels"])
    tags = delta.read(spark, LakePaths.of(night.settings.lake).path(schemas.TAGS), night.report.published.tags)
    assert {row["sex"] for row in tags.where("modality = 'CT'").collect()} == {"M", "O"}


def test_a_second_run_writes_nothing_but_that_it_ran(spark: SparkSession, night: Night) -> None:
    lake = LakePaths.of(night.settings.lake)
    versions = [delta.version(spark, lake.path(table)) for table in (schemas.TAGS, schemas.PIXELS, schemas.SOURCES)]
    again = ingest_job.run(spark, night.settings)
    assert (again.read, again.unchanged, again.deleted, again.batches) == (0, 12, 0, 0)
    assert versions == [
        delta.version(spark, lake.path(table)) for table in (schemas.TAGS, schemas.PIXELS, schemas.SOURCES)
    ]
    runs = delta.read(spark, lake.path(schemas.RUNS)).orderBy("started").collect()
    assert [row["counts"]["listed"] for row in runs] == [12, 12]
    assert not (Path(storage.local_path(lake.vault)) / "staging").exists()


def test_a_run_looks_nothing_up_twice(spark: SparkSession, night: Night) -> None:
    """At the boundary, where Delta and storage would be asked again: the cost of a night without news."""
    lake = LakePaths.of(night.settings.lake)
    with boundary.counted() as counts:
        report = ingest_job.run(spark, night.settings)
    assert report.batches == 0
    published = report.published
    assert counts.histories == {lake.path(schemas.SOURCES): 1}
    assert counts.opened == {
        (lake.path(schemas.TAGS), published.tags): 1,
        (lake.path(schemas.PIXELS), published.pixels): 1,
        (lake.path(schemas.SOURCES), published.sources): 1,
    }
    # SOURCES for what is published, FORGOTTEN for tombstones, RUNS for its row.
    assert counts.checks == {lake.path(table): 1 for table in (schemas.SOURCES, schemas.FORGOTTEN, schemas.RUNS)}
    # TAGS and PIXELS against what is published, RUNS for the version written.
    assert counts.log_lookups == {lake.path(table): 1 for table in (schemas.TAGS, schemas.PIXELS, schemas.RUNS)}
    # The archive, and both roots of the lake.
    assert counts.storage("kind") == 3
    assert counts.storage("delete_folder") == 2
    assert counts.storage("read", "write_bytes", "find") == 0


def test_the_size_of_batches_does_not_matter(spark: SparkSession, night: Night, tmp_path: Path) -> None:
    lake = LakePaths.of(night.settings.lake)
    whole = [night.overrides[0], f"lake.uri={tmp_path / 'lake'}", _key_of(lake)]
    settings = config.load(overrides=whole, environ={})
    assert ingest_job.run(spark, settings).batches == 1
    assert _live(spark, settings) == _live(spark, night.settings)


def test_an_empty_archive_that_is_known_is_refused_as_a_lost_mount(spark: SparkSession, night: Night) -> None:
    before = _live(spark, night.settings)
    away = night.archive.with_name("away")
    night.archive.rename(away)
    night.archive.mkdir()
    try:
        with pytest.raises(InputError, match="is it mounted"):
            ingest_job.run(spark, night.settings)
    finally:
        night.archive.rmdir()
        away.rename(night.archive)
    assert _live(spark, night.settings) == before


def test_another_key_or_other_pixels_are_refused(spark: SparkSession, night: Night, tmp_path: Path) -> None:
    other = tmp_path / "other.key"
    other.write_text("another key, just as long")
    for override, message in [
        (f"privacy.key_file={other}", "pseudonym key"),
        ("pixels.aspect=stretch", "preprocessing"),
    ]:
        with pytest.raises(TableError, match=message):
            ingest_job.run(spark, config.load(overrides=[*night.overrides, override], environ={}))


def test_deleted_objects_leave_and_a_killed_run_is_never_seen(
    spark: SparkSession, make_settings: MakeSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second night deletes, changes and adds; it dies before it publishes, and the third converges."""
    archive = _fill(tmp_path / "archive")
    settings = make_settings(f"ingest.archive={archive}")
    ingest_job.run(spark, settings)
    before = _live(spark, settings)
    (archive / "ct/two corrected.dcm").unlink()
    (archive / "mr/three.dcm").unlink()
    sample(archive, "ct/one.dcm", hour=3, PatientSex="M")
    sample(archive, "ct/four.dcm", hour=4, SOPInstanceUID="1.2.3.4")

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(publication, "publish", die)
        with pytest.raises(KeyboardInterrupt):
            ingest_job.run(spark, settings)
    assert _live(spark, settings) == before
    lake = LakePaths.of(settings.lake)
    assert delta.version(spark, lake.path(schemas.TAGS)) > publication.require_published(spark, lake).tags

    report = ingest_job.run(spark, settings)
    assert set(report.rolled_back) == {"tags", "pixels"}
    assert (report.read, report.deleted) == (2, 2)
    outcomes = _outcomes(spark, settings)
    assert outcomes["ct/two corrected.dcm"] == outcomes["mr/three.dcm"] == cols.DELETED
    assert outcomes["ct/two.dcm"] == outcomes["ct/one.dcm"] == outcomes["ct/four.dcm"] == cols.INGESTED
    assert outcomes["ct/one again.dcm"] == cols.CONFLICT
    tags = delta.read(spark, lake.path(schemas.TAGS), report.published.tags).collect()
    assert sorted(row["sex"] for row in tags) == ["F", "M", "O"]
    fresh = make_settings(f"ingest.archive={archive}", f"lake.uri={tmp_path / 'other'}", _key_of(lake))
    ingest_job.run(spark, fresh)
    continued, undisturbed = _live(spark, settings), _live(spark, fresh)
    assert continued["tags"] == undisturbed["tags"]
    assert continued["pixels"] == undisturbed["pixels"]


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


def test_nothing_of_a_person_is_in_the_lake(spark: SparkSession, make_settings: MakeSettings, tmp_path: Path) -> None:
    """A token in each identifying attribute, and in the object's name, is found in no table outside the vault."""
    token = "ZQXJVTOKEN"
    folder = tmp_path / "archive"
    sample(
        folder,
        f"{token}/one.dcm",
        PatientName=token,
        PatientID=token,
        AccessionNumber=token,
        InstitutionName=token,
        ReferringPhysicianName=token,
        StudyDescription=token,
        SeriesDescription=token,
        ImageComments=token,
    )
    settings = make_settings(f"ingest.archive={folder}", f"lake.vault={tmp_path / 'vault'}")
    ingest_job.run(spark, settings)
    lake = LakePaths.of(settings.lake)
    for table in (schemas.TAGS, schemas.PIXELS, schemas.RUNS):
        for row in delta.read(spark, lake.path(table)).collect():
            assert token.lower() not in repr(row).lower(), table.name
    logs = [p.read_bytes() for p in (tmp_path / "lake").rglob("*") if p.is_file()]
    assert logs
    assert not any(token.encode() in content for content in logs)
    assert token in repr(delta.read(spark, lake.path(schemas.SOURCES)).collect())


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
        overrides=["ingest.archive=viewfs://clinic/pacs", f"lake.uri={tmp_path / 'lake'}", _key_of(lake)], environ={}
    )
    report = ingest_job.run(spark, settings)
    assert report.listed == report.read == 9
    mounted, direct = _live(spark, settings), _live(spark, night.settings)
    assert mounted["tags"] == direct["tags"]
    assert mounted["pixels"] == direct["pixels"]
    assert ingest_job.run(spark, settings).unchanged == 9
    absent = config.load(overrides=[f"lake.uri={tmp_path / 'other'}", "ingest.archive=viewfs://clinic/no"], environ={})
    with pytest.raises(InputError, match="does not exist"):
        ingest_job.run(spark, absent)


def test_objects_that_a_run_does_not_reach_are_deferred(
    spark: SparkSession, night: Night, make_settings: MakeSettings
) -> None:
    settings = make_settings(*night.overrides[:1], "ingest.max_files_per_batch=5", "ingest.max_batches=1")
    reported: list[tuple[int, int]] = []
    done = 0
    for _ in range(12):
        report = ingest_job.run(spark, settings, lambda done, total, figures: reported.append((done, total)))
        done += report.read
        assert report.listed == 12 == report.unchanged + report.deferred + report.read
        assert (report.batches, report.unchanged) == (1, done - report.read)
        if not report.deferred:
            break
    assert done == 12
    assert reported[0][1] == 12
    whole = delta.read(spark, LakePaths.of(settings.lake).path(schemas.TAGS), report.published.tags).drop(cols.BATCH)
    assert whole.count() == 3


def test_the_same_bytes_written_again_are_unchanged(
    spark: SparkSession, make_settings: MakeSettings, tmp_path: Path
) -> None:
    archive = tmp_path / "archive"
    sample(archive, "one.dcm", hour=1)
    (archive / "none.dcm").write_bytes(bytes(5000))
    settings = make_settings(f"ingest.archive={archive}")
    first = ingest_job.run(spark, settings)
    for path in archive.iterdir():
        os.utime(path, (at(9).timestamp(),) * 2)
    again = ingest_job.run(spark, settings)
    assert (again.unchanged, again.read, again.frames) == (2, 0, 0)
    assert (again.published.tags, again.published.pixels) == (first.published.tags, first.published.pixels)
    assert ingest_job.run(spark, settings).published == again.published


def test_an_image_marked_for_reading_is_read_and_its_rows_are_replaced(
    spark: SparkSession, make_settings: MakeSettings, tmp_path: Path
) -> None:
    """What remap asks for where a body part changes the window: the next run replaces rows of the same content."""
    archive = tmp_path / "archive"
    sample(archive, "one.dcm", hour=1)
    sample(archive, "two.dcm", hour=1, SOPInstanceUID="1.2.3.2")
    settings = make_settings(f"ingest.archive={archive}")
    first = ingest_job.run(spark, settings)
    lake = LakePaths.of(settings.lake)
    before = _live(spark, settings)
    sources = delta.read(spark, lake.path(schemas.SOURCES)).where("uri like '%two.dcm'")
    marked = sources.withColumn(cols.REASON, F.lit(cols.REREAD)).collect()
    publication.publish(spark, lake, spark.createDataFrame(marked, schemas.SOURCES.schema), first.published)
    again = ingest_job.run(spark, settings)
    assert (again.listed, again.unchanged, again.frames) == (2, 2, 1)
    assert _live(spark, settings) == before
    pixels = delta.read(spark, lake.path(schemas.PIXELS), again.published.pixels)
    assert sorted(row[cols.BATCH] for row in pixels.collect()) == [1, 2]
    assert ingest_job.run(spark, settings).batches == 0


def test_a_folder_that_cannot_be_listed_deletes_nothing(
    spark: SparkSession, make_settings: MakeSettings, tmp_path: Path
) -> None:
    """Nor does it name the folder: names of folders may be patients'."""
    archive = tmp_path / "archive"
    for number in range(40):
        sample(archive, f"MILLER{number}/one.dcm", hour=1, SOPInstanceUID=f"1.2.3.{number}")
    settings = make_settings(f"ingest.archive={archive}")
    ingest_job.run(spark, settings)
    before = _live(spark, settings)
    # A name that is a loop of links is an error for everybody, root included.
    shutil.rmtree(archive / "MILLER7")
    (archive / "MILLER7").symlink_to(archive / "MILLER7")
    with pytest.raises(EnvironmentProblem, match="could not be listed") as raised:
        ingest_job.run(spark, settings)
    assert "MILLER" not in str(raised.value)
    assert _live(spark, settings) == before


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


def test_a_lake_of_an_older_version_gets_the_columns_it_lacks(
    spark: SparkSession, make_settings: MakeSettings, tmp_path: Path
) -> None:
    archive = tmp_path / "archive"
    sample(archive, "one.dcm", hour=1)
    settings = make_settings(f"ingest.archive={archive}")
    ingest_job.run(spark, settings)
    lake = LakePaths.of(settings.lake)
    path = tmp_path / "older"
    delta.read(spark, lake.path(schemas.SOURCES)).drop(cols.ETAG).write.format("delta").save(str(path))
    evolved = delta.evolve(delta.TableVersion(spark, str(path), 0), schemas.SOURCES)
    assert evolved is not None
    assert cols.ETAG in delta.read(spark, str(path)).columns
    assert delta.evolve(delta.TableVersion(spark, str(path), evolved), schemas.SOURCES) is None
    assert delta.read(spark, str(path)).count() == 1
    other = tmp_path / "other"
    delta.read(spark, lake.path(schemas.SOURCES)).withColumn(cols.SIZE, F.lit("many")).write.format("delta").save(
        str(other)
    )
    with pytest.raises(TableError, match="size is string instead of bigint"):
        delta.evolve(delta.TableVersion(spark, str(other), 0), schemas.SOURCES)
