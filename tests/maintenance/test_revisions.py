"""Which objects a change of the reader may concern: too many rather than too few, and not those read since."""

from typing import Any

import pytest
from pyspark.sql import DataFrame, SparkSession

from cbmir_spark import config
from cbmir_spark.dicom.preprocessing import READING_REVISION
from cbmir_spark.errors import InputError
from cbmir_spark.ingest.parse import preprocessing_of
from cbmir_spark.lake import columns as cols
from cbmir_spark.lake import schemas
from cbmir_spark.maintenance import revisions

NATIVE, JPEG = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.4.50"
# A slice that no change concerns: uncompressed, in its fixed window, with every tag.
SOUND: dict[str, Any] = {
    cols.SERIES_ID: "series",
    cols.STUDY_ID: "study",
    cols.PATIENT_ID: "patient",
    cols.MODALITY: "CT",
    cols.BODY_PART: "CHEST",
    cols.MODALITY_RAW: "CT",
    cols.BODY_PART_RAW: "CHEST",
    cols.KIND: "image",
    cols.SEX: "F",
    cols.AGE_YEARS: 40.0,
    cols.YEAR: 2020,
    cols.LATERALITY: "L",
    cols.VIEW_POSITION: "AP",
    cols.ROWS: 512,
    cols.COLUMNS: 512,
    cols.FRAMES: 1,
    cols.PIXEL_SPACING_ROW: 0.7,
    cols.PIXEL_SPACING_COLUMN: 0.7,
    cols.SLICE_THICKNESS: 1.0,
    cols.PHOTOMETRIC: "MONOCHROME2",
    cols.BITS_STORED: 12,
    cols.SIGNED: True,
    cols.SAMPLES_PER_PIXEL: 1,
    cols.TRANSFER_SYNTAX: NATIVE,
    cols.SOP_CLASS: "1.2.840.10008.5.1.4.1.1.2",
    cols.BURNED_IN: "NO",
    cols.TEXT_RISK: False,
    cols.BATCH: 1,
}
CHEST, OTHER = (-1000.0, 400.0), (12.0, 345.0)
SOURCES = f"{cols.URI} string, {cols.OUTCOME} string, {cols.REASON} string, {cols.IMAGE_ID} string, revision int"
PIXELS = f"{cols.IMAGE_ID} string, {cols.WINDOW_LOW} double, {cols.WINDOW_HIGH} double"


def objects(
    spark: SparkSession,
    images: dict[str, dict[str, Any]],
    windows: dict[str, tuple[float, float]] | None = None,
    others: list[tuple[str, str, str | None, str | None, int | None]] | None = None,
    revision: int | None = None,
) -> DataFrame:
    """Ingested images by URI, with what of their tags differs from SOUND; of those in `windows` another window.

    `others` are (uri, outcome, reason, image_id, revision).
    """
    sources = [(uri, cols.INGESTED, None, uri, revision) for uri in images]
    tags = [{cols.IMAGE_ID: uri} | SOUND | differs for uri, differs in images.items()]
    names = schemas.TAGS.schema.fieldNames()
    tagged = spark.createDataFrame([tuple(row[name] for name in names) for row in tags], schemas.TAGS.schema)
    pixels = [(uri, *(windows or {}).get(uri, CHEST)) for uri in images]
    fixed = revisions.fixed_windows([("CT", "CHEST"), ("MR", "HEAD"), ("PT", "CHEST")], preprocessing())
    return revisions.objects_of(
        spark.createDataFrame([*sources, *(others or [])], SOURCES),
        tagged,
        spark.createDataFrame(pixels, PIXELS),
        spark.createDataFrame(fixed, revisions.FIXED_WINDOWS_SCHEMA),
    )


def preprocessing() -> Any:
    return preprocessing_of(config.load(environ={}).pixels)


def concerned(found: DataFrame, skip: tuple[str, ...] = ("patients",)) -> dict[str, list[str]]:
    rows = revisions.may_change(found, revisions.chosen(skip)).collect()
    assert len({row[cols.URI] for row in rows}) == len(rows)
    return {row[cols.URI]: sorted(row[revisions.MAY_CHANGE]) for row in rows}


def test_only_modalities_with_a_unit_of_their_own_have_a_fixed_window() -> None:
    """That of PET is divided by what the image says of its patient."""
    assert revisions.fixed_windows(
        [("CT", "CHEST"), ("CT", "KNEE"), ("MR", "HEAD"), ("PT", "CHEST")], preprocessing()
    ) == [
        ("CT", "CHEST", -1000.0, 400.0),
        ("CT", "KNEE", -160.0, 240.0),
    ]


def test_each_change_selects_what_it_may_concern(spark: SparkSession) -> None:
    found = objects(
        spark,
        {
            "sound": {},
            "compressed": {cols.TRANSFER_SYNTAX: JPEG},
            "capture": {cols.BITS_STORED: 8},
            "percentiles": {},
            "float": {cols.BITS_STORED: 32},
            "magnetic resonance": {cols.MODALITY: "MR", cols.BODY_PART: "HEAD"},
            "color": {cols.PHOTOMETRIC: "RGB"},
            "palette": {cols.PHOTOMETRIC: "PALETTE COLOR"},
            "subsampled": {cols.PHOTOMETRIC: "YBR_FULL_422"},
            "no year": {cols.YEAR: None},
            "old": {cols.AGE_YEARS: 90.0},
            "no spacing": {cols.PIXEL_SPACING_ROW: None},
            "several": {cols.TRANSFER_SYNTAX: JPEG, cols.AGE_YEARS: None, cols.PHOTOMETRIC: "PALETTE COLOR"},
        },
        windows={"percentiles": OTHER, "magnetic resonance": OTHER},
    )
    assert concerned(found) == {
        "compressed": ["codestreams"],
        "capture": ["units"],
        "percentiles": ["units"],
        "float": ["units"],
        "magnetic resonance": ["units"],
        "palette": ["colors"],
        "subsampled": ["colors"],
        "no year": ["tags"],
        "old": ["tags"],
        "no spacing": ["tags"],
        "several": ["codestreams", "colors", "tags"],
    }
    assert concerned(found, ("patients", "units", "tags")) == {
        "compressed": ["codestreams"],
        "palette": ["colors"],
        "subsampled": ["colors"],
        "several": ["codestreams", "colors"],
    }


def test_one_frame_in_another_window_is_enough(spark: SparkSession) -> None:
    images = {"volume": {cols.FRAMES: 2}}
    pixels = spark.createDataFrame([("volume", *CHEST), ("volume", *OTHER)], PIXELS)
    tags = spark.createDataFrame(
        [tuple(({cols.IMAGE_ID: "volume"} | SOUND | images["volume"])[n] for n in schemas.TAGS.schema.fieldNames())],
        schemas.TAGS.schema,
    )
    windows = spark.createDataFrame(
        revisions.fixed_windows([("CT", "CHEST")], preprocessing()), revisions.FIXED_WINDOWS_SCHEMA
    )
    sources = spark.createDataFrame([("volume", cols.INGESTED, None, "volume", None)], SOURCES)
    assert concerned(revisions.objects_of(sources, tags, pixels, windows)) == {"volume": ["units"]}


def test_what_was_refused_is_selected_by_its_reason(spark: SparkSession) -> None:
    others = [
        ("cut", cols.REJECTED, "TRUNCATED", None, None),
        ("text", cols.NOT_AN_IMAGE, "NOT_DICOM", None, 1),
        ("forgotten", cols.REJECTED, cols.ERASED, None, None),
        ("large", cols.REJECTED, "TOO_LARGE", None, None),
        ("read since", cols.REJECTED, "TRUNCATED", None, READING_REVISION),
        ("gone", cols.DELETED, None, None, None),
        ("copy", cols.DUPLICATE, None, "sound", None),
    ]
    found = objects(spark, {"sound": {}}, others=others)
    assert concerned(found) == {"cut": ["refused"], "text": ["refused"]}
    assert concerned(found, ("patients", "refused")) == {}


@pytest.mark.parametrize(("revision", "selected"), [(None, True), (1, True), (READING_REVISION, False)])
def test_what_was_read_by_this_revision_is_not_selected(
    spark: SparkSession, revision: int | None, selected: bool
) -> None:
    found = objects(spark, {"compressed": {cols.TRANSFER_SYNTAX: JPEG}}, revision=revision)
    assert concerned(found) == ({"compressed": ["codestreams"]} if selected else {})


def test_another_rule_for_patients_concerns_every_image_whoever_read_it(spark: SparkSession) -> None:
    found = objects(spark, {"sound": {}}, others=[("cut", cols.REJECTED, "TRUNCATED", None, 2)], revision=2)
    assert concerned(found, ()) == {"sound": ["patients"]}


def test_changes_are_skipped_by_name() -> None:
    names = {change.name for change in revisions.chosen(())}
    assert names == {"codestreams", "units", "colors", "tags", "refused", "patients"}
    assert {change.name for change in revisions.chosen(("tags", "refused"))} == names - {"tags", "refused"}
    with pytest.raises(InputError, match="no change is called colours, size: give codestreams, units"):
        revisions.chosen(("size", "tags", "colours"))
