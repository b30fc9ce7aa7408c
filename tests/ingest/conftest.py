"""One lake after its first night for all tests of ingest that change neither lake nor archive."""

import pytest
from pyspark.sql import SparkSession

from cbmir_spark import config
from cbmir_spark.ingest import job as ingest_job
from tests.support.nights import Night, fill
from tests.support.places import bucket

__all__ = ["bucket", "night"]


@pytest.fixture(scope="package")
def night(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Night:
    folder = tmp_path_factory.mktemp("night")
    archive = fill(folder / "archive")
    # Slices of five: what belongs together comes in different ones.
    overrides = (f"ingest.archive={archive}", f"lake.uri={folder / 'lake'}", "ingest.max_files_per_batch=5")
    settings = config.load(overrides=overrides, environ={})
    return Night(archive, overrides, settings, ingest_job.run(spark, settings))
