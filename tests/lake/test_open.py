"""An open lake: what it refuses, and what it never creates."""

from pathlib import Path

import pytest
from pyspark.sql import SparkSession

from cbmir_spark import config, storage
from cbmir_spark.cli import doctor
from cbmir_spark.errors import ConfigError, InputError, TableError
from cbmir_spark.index import verify as index_verify
from cbmir_spark.lake import lease
from cbmir_spark.lake.open import open_for_writing, open_lake
from cbmir_spark.lake.paths import LakePaths
from cbmir_spark.lake.pseudonyms import KEY_FILE
from tests.conftest import MakeSettings
from tests.support.tiny_lake import Drawn, publish


def files_below(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def settings(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> config.Settings:
    folder = tmp_path_factory.mktemp("opened")
    made = config.load(overrides=[f"lake.uri={folder / 'lake'}"], environ={})
    publish(spark, made, [Drawn("a", "p", "CT", "CHEST")])
    return made


def test_a_lake_is_read_at_the_versions_that_it_was_opened_at(spark: SparkSession, settings: config.Settings) -> None:
    lake = open_lake(spark, settings)
    assert lake.tags is lake.tags and lake.tags.count() == 1
    publish(spark, settings, [Drawn("b", "q", "MR", "BRAIN")], 2)
    assert (lake.tags.count(), lake.pixels.count(), lake.sources.count()) == (1, 1, 1)
    again = open_lake(spark, settings)
    assert lake.at(again.versions).tags.count() == 2


def test_without_its_key_a_lake_is_opened_by_nobody_and_no_key_appears(
    spark: SparkSession, settings: config.Settings
) -> None:
    lake = Path(storage.local_path(LakePaths.of(settings.lake).uri))
    key_file = lake / "vault" / KEY_FILE
    content = key_file.read_bytes()
    key_file.unlink()
    before = files_below(lake)
    try:
        for enter in (open_lake, index_verify.run):
            with pytest.raises(ConfigError, match=r"pseudonym\.key is missing: restore it .* or set privacy\.key_file"):
                enter(spark, settings)
        with pytest.raises(ConfigError, match="is missing"), open_for_writing(spark, settings, lease.INDEX):
            pass
        (check,) = [check for check in doctor.run(settings) if check.name == "Pseudonym key"]
        assert not check.ok and "is missing: restore it" in check.found
        assert files_below(lake) - before <= {lake / "vault" / lease.FOLDER / f"{lease.INDEX}.lock"}
    finally:
        key_file.write_bytes(content)
    open_lake(spark, settings)


def test_another_key_is_refused_naming_both(spark: SparkSession, settings: config.Settings, tmp_path: Path) -> None:
    (tmp_path / "other").write_text("some other key of enough bytes")
    lake = LakePaths.of(settings.lake).uri
    other = config.load(overrides=[f"lake.uri={lake}", f"privacy.key_file={tmp_path / 'other'}"], environ={})
    with pytest.raises(TableError, match=r"made with pseudonym key [0-9a-f]{12}, the settings give [0-9a-f]{12}"):
        open_lake(spark, other)


def test_a_lake_that_is_not_there_is_opened_empty_and_nothing_is_created(
    spark: SparkSession, make_settings: MakeSettings, tmp_path: Path
) -> None:
    lake = open_lake(spark, make_settings())
    assert lake.published is None
    with pytest.raises(TableError, match="run `cbmir ingest` first"):
        _ = lake.tags
    with pytest.raises(ConfigError):
        _ = lake.names
    with (
        pytest.raises(TableError, match="run `cbmir ingest` first"),
        open_for_writing(spark, make_settings(), lease.INDEX),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_place_of_a_lake_is_refused(
    spark: SparkSession, make_settings: MakeSettings, tmp_path: Path
) -> None:
    (tmp_path / "lake").write_text("")
    with pytest.raises(InputError, match="is a file"):
        open_lake(spark, make_settings())
