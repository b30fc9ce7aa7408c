"""Ingest: one outcome for each object, one winner for each SOP instance, nothing twice, nothing half."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
from delta.tables import DeltaTable
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from cbmir_spark import config, storage
from cbmir_spark.dicom.preprocessing import READING_REVISION
from cbmir_spark.errors import TableError
from cbmir_spark.ingest import job as ingest_job
from cbmir_spark.lake import columns as cols
from cbmir_spark.lake import delta, publication, schemas
from cbmir_spark.lake.paths import LakePaths
from tests.conftest import MakeSettings
from tests.support import boundary
from tests.support.archives import at, sample
from tests.support.nights import Night, fill, key_file_of, live_rows, outcomes_of

pytestmark = pytest.mark.slow


def test_each_object_gets_one_outcome(spark: SparkSession, night: Night) -> None:
    assert night.report.listed == 12 == night.report.read
    assert night.report.batches > 1
    assert outcomes_of(spark, night.settings) == {
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
    live = live_rows(spark, night.settings)
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
    assert counts.handles == counts.histories == {lake.path(schemas.SOURCES): 1}
    assert counts.opened == {
        (lake.path(schemas.TAGS), published.tags): 1,
        (lake.path(schemas.PIXELS), published.pixels): 1,
        (lake.path(schemas.SOURCES), published.sources): 1,
    }
    # FORGOTTEN for tombstones, RUNS for its row.
    assert counts.checks == {lake.path(table): 1 for table in (schemas.FORGOTTEN, schemas.RUNS)}
    # TAGS and PIXELS against what is published, RUNS for the version written.
    assert counts.log_lookups == {lake.path(table): 1 for table in (schemas.TAGS, schemas.PIXELS, schemas.RUNS)}
    # The archive, and both roots of the lake.
    assert counts.storage("kind") == 3
    assert counts.storage("delete_folder") == 2
    assert counts.storage("read", "write_bytes", "find") == 0


def test_the_size_of_batches_does_not_matter(spark: SparkSession, night: Night, tmp_path: Path) -> None:
    lake = LakePaths.of(night.settings.lake)
    whole = [night.overrides[0], f"lake.uri={tmp_path / 'lake'}", key_file_of(lake)]
    settings = config.load(overrides=whole, environ={})
    assert ingest_job.run(spark, settings).batches == 1
    assert live_rows(spark, settings) == live_rows(spark, night.settings)


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
    archive = fill(tmp_path / "archive")
    settings = make_settings(f"ingest.archive={archive}")
    ingest_job.run(spark, settings)
    before = live_rows(spark, settings)
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
    assert live_rows(spark, settings) == before
    lake = LakePaths.of(settings.lake)
    assert delta.version(spark, lake.path(schemas.TAGS)) > publication.require_published(spark, lake).tags

    report = ingest_job.run(spark, settings)
    assert set(report.rolled_back) == {"tags", "pixels"}
    assert (report.read, report.deleted) == (2, 2)
    outcomes = outcomes_of(spark, settings)
    assert outcomes["ct/two corrected.dcm"] == outcomes["mr/three.dcm"] == cols.DELETED
    assert outcomes["ct/two.dcm"] == outcomes["ct/one.dcm"] == outcomes["ct/four.dcm"] == cols.INGESTED
    assert outcomes["ct/one again.dcm"] == cols.CONFLICT
    tags = delta.read(spark, lake.path(schemas.TAGS), report.published.tags).collect()
    assert sorted(row["sex"] for row in tags) == ["F", "M", "O"]
    fresh = make_settings(f"ingest.archive={archive}", f"lake.uri={tmp_path / 'other'}", key_file_of(lake))
    ingest_job.run(spark, fresh)
    continued, undisturbed = live_rows(spark, settings), live_rows(spark, fresh)
    assert continued["tags"] == undisturbed["tags"]
    assert continued["pixels"] == undisturbed["pixels"]


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


def test_an_image_marked_for_reading_is_read_and_its_rows_are_replaced_where_they_differ(
    spark: SparkSession, make_settings: MakeSettings, tmp_path: Path
) -> None:
    """What remap and upgrade ask for: the next run replaces the rows of unchanged objects that are read otherwise."""
    archive = tmp_path / "archive"
    for number, name in enumerate(("one", "tags", "window", "same")):
        sample(archive, f"{name}.dcm", hour=1, SOPInstanceUID=f"1.2.3.{number}")
    settings = make_settings(f"ingest.archive={archive}")
    first = ingest_job.run(spark, settings)
    lake = LakePaths.of(settings.lake)
    before = live_rows(spark, settings)
    sources = delta.read(spark, lake.path(schemas.SOURCES))
    images = {row[cols.URI].rsplit("/", 1)[1]: row[cols.IMAGE_ID] for row in sources.collect()}
    other_tags, other_window = (f"{cols.IMAGE_ID} = '{images[name]}'" for name in ("tags.dcm", "window.dcm"))
    DeltaTable.forPath(spark, lake.path(schemas.TAGS)).update(other_tags, {cols.YEAR: "1999"})
    DeltaTable.forPath(spark, lake.path(schemas.PIXELS)).update(other_window, {cols.WINDOW_LOW: "0D"})
    marked = sources.where("uri not like '%one.dcm'").withColumn(cols.REASON, F.lit(cols.REREAD)).collect()
    changed = replace(
        first.published,
        tags=delta.version(spark, lake.path(schemas.TAGS)),
        pixels=delta.version(spark, lake.path(schemas.PIXELS)),
    )
    publication.publish(spark, lake, spark.createDataFrame(marked, schemas.SOURCES.schema), changed)
    again = ingest_job.run(spark, settings)
    assert (again.listed, again.unchanged, again.frames) == (4, 4, 2)
    assert live_rows(spark, settings) == before
    batches = {"one.dcm": 1, "tags.dcm": 2, "window.dcm": 2, "same.dcm": 1}
    for table, version in ((schemas.PIXELS, again.published.pixels), (schemas.TAGS, again.published.tags)):
        rows = delta.read(spark, lake.path(table), version).collect()
        assert {row[cols.IMAGE_ID]: row[cols.BATCH] for row in rows} == {images[k]: b for k, b in batches.items()}
    rows = delta.read(spark, lake.path(schemas.SOURCES)).collect()
    assert {row[cols.URI].rsplit("/", 1)[1]: row[cols.BATCH] for row in rows} == batches
    assert {(row[cols.REASON], row[cols.REVISION]) for row in rows} == {(None, READING_REVISION)}
    assert ingest_job.run(spark, settings).batches == 0


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
