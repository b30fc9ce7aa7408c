"""One Spark session for the whole suite, settings rooted in a test's own folder, and the shared real data."""

import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pyspark.sql import SparkSession

from cbmir_spark import config, log
from cbmir_spark.cli import app as app_module
from cbmir_spark.spark import session
from tests.support import s3_server

REPO = Path(__file__).resolve().parent.parent

# A developer's own settings must not decide what the tests see.
for name in [name for name in os.environ if name.startswith(config.ENVIRONMENT_PREFIX)]:
    del os.environ[name]
# Nor may their cloud account: Spark's JVM and its workers inherit this environment.
for name in [name for name in os.environ if name.startswith("AWS_")]:
    del os.environ[name]
os.environ.update(s3_server.CREDENTIALS)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that use the S3 server, and run the files with slow tests first.

    Each of two processes takes a file at a time: a long one at the end would leave the other without work.
    """
    for item in items:
        if "s3" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.server)
    slow = {item.path for item in items if any(item.get_closest_marker(mark) for mark in ("slow", "more"))}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def spark(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SparkSession]:
    scratch = tmp_path_factory.mktemp("spark")
    settings = config.load(
        overrides=[
            "spark.master=local[2]",
            "spark.driver_memory=3g",
            # Tables here have tens of rows: the defaults of 200 and 50 partitions would be all overhead.
            # C1 alone has a cache of 48 MB, which a suite fills: then nothing is compiled any more.
            # A suite's plans run once each, over tens of rows: compiling them costs more than it saves.
            "spark.conf.spark.driver.extraJavaOptions="
            "-XX:TieredStopAtLevel=1 -XX:ReservedCodeCacheSize=240m -XX:+UseSerialGC",
            "spark.conf.spark.sql.codegen.wholeStage=false",
            "spark.conf.spark.sql.codegen.factoryMode=NO_CODEGEN",
            "spark.conf.spark.sql.shuffle.partitions=2",
            "spark.conf.spark.databricks.delta.snapshotPartitions=2",
            "spark.conf.spark.sql.sources.parallelPartitionDiscovery.parallelism=4",
            f"spark.conf.spark.sql.warehouse.dir={scratch / 'warehouse'}",
            f"spark.conf.spark.local.dir={scratch / 'local'}",
        ]
    )
    built = session.build(settings, "tests")
    yield built
    built.stop()


MakeSettings = Callable[..., config.Settings]
Cbmir = Callable[..., tuple[int, str, str]]


@pytest.fixture
def make_settings(tmp_path: Path) -> MakeSettings:
    """Settings whose lake is a fresh folder; further `section.key=value` overrides are arguments."""

    def make(*overrides: str) -> config.Settings:
        return config.load(overrides=[f"lake.uri={tmp_path / 'lake'}", *overrides], environ={})

    return make


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[s3_server.S3Server]:
    """A real S3 server for the whole suite; each test makes buckets of its own."""
    with s3_server.running(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real images beside the checkout, which is not part of the project."""
    folder = REPO.parent / "shared" / "data"
    if not (folder / "dicom_index.csv").is_file():
        pytest.skip(f"the shared real images are not at {folder}")
    return folder


@pytest.fixture
def logging_restored() -> Iterator[None]:
    """The command line decides how its process logs, for good; pytest's own handler is the root logger's."""
    logger = logging.getLogger(log.ROOT)
    handlers, level, propagate = list(logger.handlers), logger.level, logger.propagate
    yield
    logger.handlers[:] = handlers
    logger.setLevel(level)
    logger.propagate = propagate


@pytest.fixture
def cbmir(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], logging_restored: None) -> Cbmir:
    """Run the console script in this process: (exit status, stdout, stderr)."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["cbmir", *arguments])
        status: object = 0
        try:
            app_module.main()
        except SystemExit as ended:
            status = ended.code or 0
        printed = capsys.readouterr()
        return int(str(status)), printed.out, printed.err

    return call
