"""A changed vocabulary, on an indexed lake of drawn frames: as if the lake had been made with it."""

import dataclasses
import shutil
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pytest
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from cbmir_spark import config, storage
from cbmir_spark.cli import views
from cbmir_spark.config import Settings
from cbmir_spark.dicom.preprocessing import Preprocessing
from cbmir_spark.dicom.vocabulary import Vocabulary
from cbmir_spark.dicom.vocabulary_tables import UNKNOWN
from cbmir_spark.errors import TableError
from cbmir_spark.index import embed as index_embed
from cbmir_spark.index import job as index_job
from cbmir_spark.ingest import job as ingest_job
from cbmir_spark.ingest import parse
from cbmir_spark.lake import columns as cols
from cbmir_spark.lake import delta, publication, schemas
from cbmir_spark.lake.paths import LakePaths
from cbmir_spark.maintenance import remap, term_changes
from tests.conftest import MakeSettings
from tests.support.dicom_files import made
from tests.support.models import save_model
from tests.support.tiny_lake import Drawn, key_of, pseudonym, publish

pytestmark = pytest.mark.slow

# Raw values, the window that was used, and the batch: what a lake keeps of its archive.
BY_RAW = [
    (Drawn("head", "p1", "CT", "", body_part_raw="SCHAEDEL NATIV", window=(-160.0, 240.0)), 1),
    (Drawn("head of unknown units", "p1", "CT", "", body_part_raw="SCHAEDEL NATIV", window=(3.0, 900.0)), 1),
    (Drawn("chest", "p2", "CT", "", body_part_raw="CHEST", window=(-1000.0, 400.0)), 1),
    (Drawn("knee", "p2", "CT", "", body_part_raw="KNEE", window=(-160.0, 240.0)), 1),
    (Drawn("brain", "p3", "MR", "", body_part_raw="STUDIE 3"), 1),
    (Drawn("no part", "p3", "MR", ""), 1),
    (Drawn("hand", "p4", "US", "", body_part_raw="HAND"), 1),
    (Drawn("hand of MR", "p4", "MR", "", body_part_raw="HAND"), 1),
    (Drawn("scout", "p2", "CT", "", body_part_raw="CHEST", kind="localizer", window=(-1000.0, 400.0)), 1),
    (Drawn("chest again", "p5", "CT", "", body_part_raw="CHEST", frames=3, window=(-1000.0, 400.0)), 1),
    (Drawn("another knee", "p5", "CT", "", body_part_raw="KNEE", window=(-160.0, 240.0)), 2),
]
SITE = {"Schaedel nativ": "HEAD", "CHEST": "LUNG", "STUDIE 3": "BRAIN", "HAND": "UNKNOWN"}
PARTS = [f"vocabulary.body_parts.{raw}={term}" for raw, term in SITE.items()]


def make_lake(spark: SparkSession, folder: Path, *overrides: str) -> Settings:
    """A lake as ingest and index leave it with the vocabulary of the settings."""
    key = folder.parent / "key"
    key.write_text("one key for all lakes of these tests")
    given = [f"lake.uri={folder / 'lake'}", "index.min_probability=0.0", f"index.model={folder.parent / 'model'}"]
    given += [f"privacy.key_file={key}"]
    settings = config.load(overrides=[*given, *overrides], environ={})
    vocabulary = Vocabulary(settings.vocabulary.body_parts)
    lake = LakePaths.of(settings.lake)
    publication.publish_empty(
        spark, lake, key_of(settings), parse.preprocessing_of(settings.pixels).version, vocabulary.version
    )
    for batch in (1, 2):
        drawn = [
            dataclasses.replace(
                image,
                looks=image.name,
                modality_raw=image.modality,
                body_part=vocabulary.body_part(image.body_part_raw),
            )
            for image, its_batch in BY_RAW
            if its_batch == batch
        ]
        publish(spark, settings, drawn, batch)
    if not (folder.parent / "model").exists():
        save_model(folder.parent / "model", preprocessing=parse.preprocessing_of(settings.pixels).version)
    index_job.run(spark, settings)
    return settings


class Lakes(NamedTuple):
    before: Settings
    wanted: Settings
    rows_before: dict[str, list[str]]
    rows_wanted: dict[str, list[str]]


@pytest.fixture(scope="module")
def lakes(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Lakes:
    folder = tmp_path_factory.mktemp("remap")
    before, wanted = make_lake(spark, folder / "before"), make_lake(spark, folder / "wanted", *PARTS)
    return Lakes(before, wanted, rows(spark, before), rows(spark, wanted))


def copy(lakes: Lakes, folder: Path) -> Settings:
    """The lake made with the old vocabulary, to be changed, with settings that name the new one."""
    shutil.copytree(storage.local_path(LakePaths.of(lakes.before.lake).uri), folder / "lake")
    return lakes.wanted.override({"lake.uri": folder / "lake"})


def rows(spark: SparkSession, settings: Settings) -> dict[str, list[str]]:
    """All that readers see, sorted."""
    lake = LakePaths.of(settings.lake)
    pinned = publication.require_published(spark, lake)
    found = {
        "tags": delta.read(spark, lake.path(schemas.TAGS), pinned.tags),
        "pixels": delta.read(spark, lake.path(schemas.PIXELS), pinned.pixels),
        "sources": delta.read(spark, lake.path(schemas.SOURCES), pinned.sources).drop(cols.REASON),
    }
    (table,) = features(settings)
    found["features"] = delta.read(spark, table)
    return {name: sorted(repr(row) for row in df.collect()) for name, df in found.items()} | {
        "vocabulary": [pinned.vocabulary]
    }


def features(settings: Settings) -> list[str]:
    """Paths of the FEATURES tables."""
    return [str(path) for path in Path(storage.local_path(LakePaths.of(settings.lake).features_root)).iterdir()]


def versions(spark: SparkSession, settings: Settings) -> list[int]:
    lake = LakePaths.of(settings.lake)
    paths = [lake.path(table) for table in (schemas.TAGS, schemas.PIXELS, schemas.SOURCES)]
    return [delta.version(spark, path) for path in (*paths, *features(settings))]


def test_it_equals_a_lake_that_was_made_with_the_new_vocabulary(
    spark: SparkSession, lakes: Lakes, tmp_path: Path
) -> None:
    settings = copy(lakes, tmp_path)
    for table in ("tags", "features"):
        assert lakes.rows_before[table] != lakes.rows_wanted[table]
    lake = LakePaths.of(settings.lake)
    second = [uri for uri in delta.live_files(spark, lake.path(schemas.TAGS)) if f"{cols.BATCH}=2/" in uri]
    report = remap.run(spark, settings)
    assert rows(spark, settings) == lakes.rows_wanted
    assert (report.codes, report.images, report.reread) == (5, 8, 1)
    # Two knees, the MR without a part, and the localizer, which is not indexed, have no row to move.
    assert list(report.moved.values()) == [9]
    assert report.vocabulary == Vocabulary(SITE).version != report.before == Vocabulary().version
    # Head: another window now. The other head's units are not known, and a lung has the window of a chest.
    sources = delta.read(spark, lake.path(schemas.SOURCES))
    marked = [row[cols.IMAGE_ID] for row in sources.where(F.col(cols.REASON) == cols.REREAD).collect()]
    assert marked == [pseudonym("head")]
    assert set(second) <= set(delta.live_files(spark, lake.path(schemas.TAGS))), "a batch without changes was rewritten"
    run = delta.read(spark, lake.path(schemas.RUNS)).where(F.col(cols.JOB) == "remap").collect()
    assert [row["counts"]["images"] for row in run] == [8]

    made = versions(spark, settings)
    again = remap.run(spark, settings)
    assert (again.codes, again.images, again.reread, sum(again.moved.values())) == (0, 0, 0, 0)
    assert versions(spark, settings) == made

    # And back: no pixels change once more, so no row of SOURCES carries the commit.
    remap.run(spark, settings.override({"vocabulary": lakes.before.vocabulary}))
    assert rows(spark, settings) == lakes.rows_before


def test_killed_anywhere_the_next_run_goes_on_to_the_same_tables(
    spark: SparkSession, lakes: Lakes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first run dies with TAGS written and not published, the second with both published and FEATURES to move."""
    settings = copy(lakes, tmp_path)

    def die_at(module: ModuleType, name: str, call: int) -> None:
        real, calls = getattr(module, name), [0]

        def die(*args: object, **named: object) -> object:
            calls[0] += 1
            if calls[0] == call:
                raise KeyboardInterrupt
            return real(*args, **named)

        with monkeypatch.context() as patched:
            patched.setattr(module, name, die)
            with pytest.raises(KeyboardInterrupt):
                remap.run(spark, settings)

    die_at(publication, "publish", 1)
    assert rows(spark, settings) == lakes.rows_before
    lake = LakePaths.of(settings.lake)
    assert delta.version(spark, lake.path(schemas.TAGS)) > publication.require_published(spark, lake).tags
    die_at(delta, "update_rows", 2)
    seen = rows(spark, settings)
    assert (seen["tags"], seen["features"]) == (lakes.rows_wanted["tags"], lakes.rows_before["features"])
    remap.run(spark, settings)
    assert rows(spark, settings) == lakes.rows_wanted


def test_other_pixels_and_an_empty_lake_are_refused(
    spark: SparkSession, lakes: Lakes, make_settings: MakeSettings
) -> None:
    with pytest.raises(TableError, match="run `cbmir ingest` first"):
        remap.run(spark, make_settings())
    other = lakes.before.override({"pixels.aspect": "stretch"})
    with pytest.raises(TableError, match="preprocessing"):
        remap.run(spark, other)


PREPROCESSING = Preprocessing(
    aspect="keep",
    windows={"CT": {"*": (-160.0, 240.0), "HEAD": (-20.0, 100.0)}, "PT": {"*": (0.0, 10.0), "BRAIN": (0.0, 20.0)}},
    percentiles=(1.0, 99.0),
    max_frames=8,
)


@pytest.mark.parametrize(
    ("found", "new", "reread"),
    [
        (("CT", "KOPF", "CT", UNKNOWN), ("CT", "HEAD"), term_changes.WHERE_USED),
        (("CT", "KNIE X", "CT", UNKNOWN), ("CT", "KNEE"), term_changes.NEVER),
        (("MR", "KOPF", "MR", UNKNOWN), ("MR", "HEAD"), term_changes.NEVER),
        (("PT", "HIRN X", "PT", UNKNOWN), ("PT", "BRAIN"), term_changes.ALWAYS),
        (("XR", "KOPF", UNKNOWN, "HEAD"), ("DX", "HEAD"), term_changes.ALWAYS),
        (("MRI", "KOPF", "CT", "HEAD"), ("MR", "HEAD"), term_changes.ALWAYS),
    ],
)
def test_which_codes_change_and_which_images_are_read_again(
    found: tuple[str, str, str, str], new: tuple[str, str], reread: str
) -> None:
    (change,) = term_changes.changes([found], Vocabulary({"KNIE X": "KNEE", "HIRN X": "BRAIN"}), PREPROCESSING)
    assert (change.new_modality, change.new_body_part, change.reread) == (*new, reread)
    used = (change.window_low, change.window_high)
    assert used == ((-160.0, 240.0) if reread == term_changes.WHERE_USED else (None, None))


def test_terms_without_a_code_do_not_change() -> None:
    assert (
        term_changes.changes([(None, None, "CT", "HEAD"), (None, "", "MR", UNKNOWN)], Vocabulary(), PREPROCESSING) == []
    )


def test_gaps_are_ranked_and_leave_out_what_the_site_settled() -> None:
    found = [
        ("CT", "FEMORALA", 3),
        ("MR", "FEMORALA", 5),
        ("CT", "OUTSIDE FIL", 2),
        ("CT", "CHEST", 100),
        ("ZZ", "CHEST", 4),
        ("CT", "OTHER", 9),
        ("CT", None, 50),
        (None, None, 1),
    ]
    gaps = remap.gaps(found, Vocabulary({"Other": "UNKNOWN", "ZQX": "HEAD"}))
    assert gaps.images == 174
    assert [(row.raw, row.images, row.modalities) for row in gaps.body_parts] == [
        ("FEMORALA", 8, {"MR": 5, "CT": 3}),
        ("OUTSIDE FIL", 2, {"CT": 2}),
    ]
    assert [(row.raw, row.images) for row in gaps.modalities] == [("ZZ", 4)]


def test_gaps_are_printed_as_settings_that_close_them(
    spark: SparkSession, lakes: Lakes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gaps = remap.unmapped(spark, lakes.before)
    assert {row.raw: row.modalities for row in gaps.body_parts} == {"SCHAEDEL NATIV": {"CT": 2}, "STUDIE 3": {"MR": 1}}
    views.gaps(gaps)
    printed = capsys.readouterr().out
    assert [line.split("#")[1].strip() for line in printed.splitlines() if ": UNKNOWN" in line] == ["CT 2", "MR 1"]
    pasted = tmp_path / "site.yaml"
    pasted.write_text(printed.replace('"SCHAEDEL NATIV": UNKNOWN', '"SCHAEDEL NATIV": HEAD'))
    given = [f"lake.uri={LakePaths.of(lakes.before.lake).uri}", f"privacy.key_file={lakes.before.privacy.key_file}"]
    settings = config.load(pasted, given, environ={})
    assert Vocabulary(settings.vocabulary.body_parts).body_part("Schaedel nativ") == "HEAD"
    closed = remap.unmapped(spark, settings)
    assert (closed.body_parts, closed.images) == ([], gaps.images)
    views.gaps(closed)
    assert "body_parts: {}" in capsys.readouterr().out


def test_a_vocabulary_applied_later_equals_one_that_was_there(
    spark: SparkSession, make_settings: MakeSettings, tmp_path: Path
) -> None:
    """Through the archive: the next ingest replaces what remap marks, and nothing else."""
    archive = tmp_path / "archive"
    archive.mkdir()
    values = np.arange(-1024, 0, dtype=np.int16).reshape(32, 32)
    units = {"RescaleSlope": 2, "RescaleIntercept": 1024}
    for name, elements in {
        "head": {"BodyPartExamined": "SCHAEDEL NATIV", **units},
        "head of no units": {"BodyPartExamined": "SCHAEDEL NATIV"},
        "knee": {"BodyPartExamined": "KNEE", **units},
    }.items():
        (archive / name).write_bytes(made(values, **elements))
    given = [f"ingest.archive={archive}"]
    before = make_settings(*given)
    ingest_job.run(spark, before)
    key = f"privacy.key_file={storage.local_path(LakePaths.of(before.lake).vault)}/pseudonym.key"
    later = make_settings(*given, *PARTS)
    with pytest.raises(TableError, match="run `cbmir remap` first"):
        ingest_job.run(spark, later)
    assert remap.run(spark, later).reread == 1
    assert ingest_job.run(spark, later).batches == 1
    assert ingest_job.run(spark, later).batches == 0
    fresh = make_settings(*given, *PARTS, f"lake.uri={tmp_path / 'fresh'}", key)
    ingest_job.run(spark, fresh)
    found = []
    for settings in (later, fresh):
        lake = LakePaths.of(settings.lake)
        pinned = publication.require_published(spark, lake)
        tables = [(schemas.TAGS, pinned.tags), (schemas.PIXELS, pinned.pixels), (schemas.SOURCES, pinned.sources)]
        read = [delta.read(spark, lake.path(table), version).drop(cols.BATCH) for table, version in tables]
        found.append([sorted(repr(row) for row in df.collect()) for df in read])
    assert found[0] == found[1]


@pytest.mark.parametrize("minimum", [0.5, 0.8])
def test_a_row_without_its_tag_gets_what_the_index_would_give_it(spark: SparkSession, minimum: float) -> None:
    labels = ["CT/CHEST", "HEAD", None, "MR/BRAIN", None]
    probabilities = [0.8, 0.5, 1.0, 0.1, 0.0]
    schema = (
        f"{cols.IMAGE_ID} string, {cols.PIXELS_BATCH} bigint, {cols.FRAME} int, {cols.MODALITY} string, "
        f"{cols.BODY_PART} string, {cols.BODY_PART_SOURCE} string, {cols.PREDICTED} string, "
        f"{cols.PROBABILITY} float"
    )
    rows = [
        (str(n), 1, 0, "CT", "KNEE", cols.FROM_TAG, label or UNKNOWN, probability)
        for n, (label, probability) in enumerate(zip(labels, probabilities, strict=True))
    ]
    tags = spark.createDataFrame(
        [(str(n), 1, "CT", UNKNOWN) for n in range(len(rows))],
        f"{cols.IMAGE_ID} string, {cols.BATCH} bigint, {cols.MODALITY} string, {cols.BODY_PART} string",
    )
    # As Arrow hands them over: 32-bit numbers, read as Python's.
    narrow = [row[0] for row in spark.createDataFrame([(p,) for p in probabilities], "p float").collect()]
    wanted = index_embed.body_parts([UNKNOWN] * len(rows), labels, narrow, minimum)
    moved = term_changes.moves(spark.createDataFrame(rows, schema), tags, minimum).orderBy(cols.IMAGE_ID).collect()
    assert [(row[f"new_{cols.BODY_PART}"], row[f"new_{cols.BODY_PART_SOURCE}"]) for row in moved] == wanted
