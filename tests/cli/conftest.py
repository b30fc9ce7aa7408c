"""What the tests of commands share."""

import pytest
from pyspark.sql import SparkSession

from cbmir_spark.api import Lake
from cbmir_spark.cli import command


@pytest.fixture
def on_the_tests_session(spark: SparkSession, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands run in the session of the tests."""
    monkeypatch.setattr(command, "lake_for", lambda settings: Lake(settings, spark))
