"""Tables: rows that do not conform never land, and readers see only versions that belong together."""

from dataclasses import replace
from datetime import UTC, datetime

import pytest
from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame, SparkSession

from cbmir_spark import tables as t
from cbmir_spark.errors import InputError, TableError
from tests.conftest import MakeSettings

DIGEST = "0" * 64


def _pixels(spark: SparkSession, batch: int, *images: str, size: int = t.FRAME_BYTES) -> DataFrame:
    rows = [(image, 0, bytes(size), "px", 0.0, 1.0, DIGEST, batch) for image in images]
    return spark.createDataFrame(rows, t.PIXELS.schema)


def _images(spark: SparkSession, path: str, version: int | None = None) -> list[str]:
    return sorted(row["image_id"] for row in t.read(spark, path, version).collect())


def test_conform_names_missing_extra_and_mistyped_columns(spark: SparkSession) -> None:
    df = spark.range(1).selectExpr("cast(id as string) image_id", "id frame", "1 surplus")
    with pytest.raises(TableError) as caught:
        t.conform(df, t.PIXELS)
    said = str(caught.value)
    assert "missing pixels, preprocessing" in said
    assert "not in the schema: surplus" in said
    assert "frame is bigint instead of int" in said


def test_conform_puts_columns_in_the_tables_order(spark: SparkSession) -> None:
    df = _pixels(spark, 1, "a")
    assert t.conform(df.select(*reversed(df.columns)), t.PIXELS).columns == t.PIXELS.schema.names


def test_constraints_refuse_rows_that_no_reader_could_use(spark: SparkSession, make_settings: MakeSettings) -> None:
    path = t.Lake.of(make_settings()).path(t.PIXELS)
    t.ensure(spark, t.PIXELS, path)
    t.append(_pixels(spark, 1, "a"), t.PIXELS, path)
    with pytest.raises((PySparkException, Py4JJavaError), match="whole_frame"):
        t.append(_pixels(spark, 1, "b", size=100), t.PIXELS, path)
    with pytest.raises((PySparkException, Py4JJavaError), match=r"outcome_known|OUTCOME_KNOWN"):
        sources = t.Lake.of(make_settings()).path(t.SOURCES)
        t.ensure(spark, t.SOURCES, sources)
        row = spark.sql(
            "SELECT 'u' uri, 1L size, timestamp'2026-01-01' modified, cast(null as string) etag, 'd' digest, "
            "'lost' outcome, 'r' reason, "
            "'i' image_id, 'k' key_id, 1L batch"
        )
        t.append(row, t.SOURCES, sources)
    assert _images(spark, path) == ["a"]


def test_ensure_twice_changes_nothing(spark: SparkSession, make_settings: MakeSettings) -> None:
    path = t.Lake.of(make_settings()).path(t.TAGS)
    t.ensure(spark, t.TAGS, path)
    version = t.version(spark, path)
    t.ensure(spark, t.TAGS, path)
    assert t.version(spark, path) == version


def test_images_are_deleted_only_in_the_batches_that_are_named(
    spark: SparkSession, make_settings: MakeSettings
) -> None:
    path = t.Lake.of(make_settings()).path(t.PIXELS)
    t.ensure(spark, t.PIXELS, path)
    t.append(_pixels(spark, 1, "a", "b"), t.PIXELS, path)
    t.append(_pixels(spark, 2, "d"), t.PIXELS, path)
    t.delete_images(spark, path, spark.createDataFrame([("a",), ("d",)], "image_id string"), [1])
    assert _images(spark, path) == ["b", "d"]


def test_readers_open_what_was_published_and_the_rest_can_be_taken_back(
    spark: SparkSession, make_settings: MakeSettings
) -> None:
    lake = t.Lake.of(make_settings())
    assert t.published(spark, lake) is None
    empty = t.publish_empty(spark, lake, "key", "px")
    assert t.published(spark, lake) == empty
    with pytest.raises(TableError, match="run `cbmir ingest` first"):
        t.require_published(spark, lake)
    written = t.append(_pixels(spark, 1, "a"), t.PIXELS, lake.path(t.PIXELS))
    source = ("file:///a", 1, datetime(2026, 1, 1, tzinfo=UTC), None, DIGEST, t.INGESTED, None, "a", "key", 1)
    sources = spark.createDataFrame([source], t.SOURCES.schema)
    first = t.publish(spark, lake, sources, replace(empty, pixels=written, batch=1))
    t.append(_pixels(spark, 2, "b"), t.PIXELS, lake.path(t.PIXELS))
    assert t.require_published(spark, lake) == first
    assert _images(spark, lake.path(t.PIXELS), first.pixels) == ["a"]
    assert t.roll_back(spark, lake, first) == ["pixels"]
    assert _images(spark, lake.path(t.PIXELS)) == ["a"]


def test_a_lake_that_is_a_file_is_refused(make_settings: MakeSettings, tmp_path: object) -> None:
    file = f"{tmp_path}/file"
    with open(file, "w"):
        pass
    with pytest.raises(InputError, match="is a file"):
        t.Lake.of(make_settings(f"lake.uri={file}"))


def test_the_vault_is_inside_the_lake_unless_it_is_named(make_settings: MakeSettings, tmp_path: object) -> None:
    lake = t.Lake.of(make_settings())
    assert lake.path(t.SOURCES) == lake.uri + "/vault/sources"
    assert lake.path(t.TAGS) == lake.uri + "/tags"
    apart = t.Lake.of(make_settings(f"lake.vault={tmp_path}/apart"))
    assert apart.path(t.SOURCES) == f"file://{tmp_path}/apart/sources"
