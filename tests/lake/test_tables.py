"""Tables: rows that do not conform never land, and readers see only versions that belong together."""

from dataclasses import replace
from datetime import UTC, datetime

import pytest
from py4j.protocol import Py4JJavaError
from pyspark.errors import AnalysisException, PySparkException
from pyspark.sql import DataFrame, SparkSession

from cbmir_spark.errors import TableError
from cbmir_spark.lake import columns as cols
from cbmir_spark.lake import delta, publication, schemas
from cbmir_spark.lake.conform import conform
from cbmir_spark.lake.paths import LakePaths
from tests.conftest import MakeSettings

DIGEST = "0" * 64


def _pixels(spark: SparkSession, batch: int, *images: str, size: int = cols.FRAME_BYTES) -> DataFrame:
    rows = [(image, 0, bytes(size), "px", 0.0, 1.0, DIGEST, batch) for image in images]
    return spark.createDataFrame(rows, schemas.PIXELS.schema)


def _images(spark: SparkSession, path: str, version: int | None = None) -> list[str]:
    return sorted(row["image_id"] for row in delta.read(spark, path, version).collect())


def test_conform_names_missing_extra_and_mistyped_columns(spark: SparkSession) -> None:
    df = spark.range(1).selectExpr("cast(id as string) image_id", "id frame", "1 surplus")
    with pytest.raises(TableError) as caught:
        conform(df, schemas.PIXELS)
    said = str(caught.value)
    assert "missing pixels, preprocessing" in said
    assert "not in the schema: surplus" in said
    assert "frame is bigint instead of int" in said


def test_conform_puts_columns_in_the_tables_order(spark: SparkSession) -> None:
    df = _pixels(spark, 1, "a")
    assert conform(df.select(*reversed(df.columns)), schemas.PIXELS).columns == schemas.PIXELS.schema.names


def test_constraints_refuse_rows_that_no_reader_could_use(spark: SparkSession, make_settings: MakeSettings) -> None:
    path = LakePaths.of(make_settings().lake).path(schemas.PIXELS)
    delta.ensure(spark, schemas.PIXELS, path)
    delta.append(_pixels(spark, 1, "a"), schemas.PIXELS, path)
    with pytest.raises((PySparkException, Py4JJavaError), match="whole_frame"):
        delta.append(_pixels(spark, 1, "b", size=100), schemas.PIXELS, path)
    with pytest.raises((PySparkException, Py4JJavaError), match=r"outcome_known|OUTCOME_KNOWN"):
        sources = LakePaths.of(make_settings().lake).path(schemas.SOURCES)
        delta.ensure(spark, schemas.SOURCES, sources)
        row = spark.sql(
            "SELECT 'u' uri, 1L size, timestamp'2026-01-01' modified, cast(null as string) etag, 'd' digest, "
            "'lost' outcome, 'r' reason, cast(null as string) detail, 'i' image_id, 'k' key_id, 1L batch, 2 revision"
        )
        delta.append(row, schemas.SOURCES, sources)
    assert _images(spark, path) == ["a"]


def test_ensure_twice_changes_nothing(spark: SparkSession, make_settings: MakeSettings) -> None:
    path = LakePaths.of(make_settings().lake).path(schemas.TAGS)
    delta.ensure(spark, schemas.TAGS, path)
    version = delta.version(spark, path)
    delta.ensure(spark, schemas.TAGS, path)
    assert delta.version(spark, path) == version


def test_version_and_properties_are_found_with_deltas_private_classes_or_without(
    spark: SparkSession, make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = LakePaths.of(make_settings().lake).path(schemas.PIXELS)
    absent = LakePaths.of(make_settings().lake).path(schemas.TAGS)
    delta.ensure(spark, schemas.PIXELS, path, {"cbmir.model": "m-1"})
    version = delta.append(_pixels(spark, 1, "a"), schemas.PIXELS, path)
    found = delta.latest(spark, path)
    assert found is not None and (found.version, found.properties["cbmir.model"]) == (version, "m-1") == (1, "m-1")
    assert delta.latest(spark, absent) is None
    monkeypatch.setattr(delta, "DELTA_LOG", "org.apache.spark.sql.delta.elsewhere.DeltaLog")
    assert delta.latest(spark, path) == found
    assert delta.latest(spark, absent) is None
    with pytest.raises(TableError, match="there is no table at"):
        delta.version(spark, absent)


def test_a_table_that_is_missing_is_named_and_a_version_that_is_missing_is_not_mistaken_for_it(
    spark: SparkSession, make_settings: MakeSettings
) -> None:
    path = LakePaths.of(make_settings().lake).path(schemas.PIXELS)
    with pytest.raises(TableError, match="there is no table at"):
        delta.read(spark, path)
    delta.ensure(spark, schemas.PIXELS, path)
    assert delta.read(spark, path, 0).count() == 0
    with pytest.raises(AnalysisException):
        delta.read(spark, path, 7)


def test_images_are_deleted_only_in_the_batches_that_are_named(
    spark: SparkSession, make_settings: MakeSettings
) -> None:
    path = LakePaths.of(make_settings().lake).path(schemas.PIXELS)
    delta.ensure(spark, schemas.PIXELS, path)
    delta.append(_pixels(spark, 1, "a", "b"), schemas.PIXELS, path)
    delta.append(_pixels(spark, 2, "d"), schemas.PIXELS, path)
    delta.delete_images(spark, path, spark.createDataFrame([("a",), ("d",)], "image_id string"), [1])
    assert _images(spark, path) == ["b", "d"]


def test_readers_open_what_was_published_and_the_rest_can_be_taken_back(
    spark: SparkSession, make_settings: MakeSettings
) -> None:
    lake = LakePaths.of(make_settings().lake)
    assert publication.published(spark, lake) is None
    empty = publication.publish_empty(spark, lake, "key", "px")
    assert publication.published(spark, lake) == empty
    with pytest.raises(TableError, match="run `cbmir ingest` first"):
        publication.require_published(spark, lake)
    written = delta.append(_pixels(spark, 1, "a"), schemas.PIXELS, lake.path(schemas.PIXELS))
    source = (
        "file:///a",
        1,
        datetime(2026, 1, 1, tzinfo=UTC),
        None,
        DIGEST,
        cols.INGESTED,
        None,
        None,
        "a",
        "key",
        1,
        2,
    )
    sources = spark.createDataFrame([source], schemas.SOURCES.schema)
    first = publication.publish(spark, lake, sources, replace(empty, pixels=written, batch=1))
    delta.append(_pixels(spark, 2, "b"), schemas.PIXELS, lake.path(schemas.PIXELS))
    assert publication.require_published(spark, lake) == first
    assert _images(spark, lake.path(schemas.PIXELS), first.pixels) == ["a"]
    assert publication.roll_back(spark, lake, first) == ["pixels"]
    assert _images(spark, lake.path(schemas.PIXELS)) == ["a"]


def test_the_vault_is_inside_the_lake_unless_it_is_named(make_settings: MakeSettings, tmp_path: object) -> None:
    lake = LakePaths.of(make_settings().lake)
    assert lake.path(schemas.SOURCES) == lake.uri + "/vault/sources"
    assert lake.path(schemas.TAGS) == lake.uri + "/tags"
    apart = LakePaths.of(make_settings(f"lake.vault={tmp_path}/apart").lake)
    assert apart.path(schemas.SOURCES) == f"file://{tmp_path}/apart/sources"
