"""What jobs ask of Delta and of storage: versions looked up once, each table opened once, however long the list."""

import itertools
from collections.abc import Callable

import pytest
from pyspark.sql import SparkSession

from cbmir_spark import config, storage
from cbmir_spark.api import Lake
from cbmir_spark.lake import schemas
from cbmir_spark.lake.paths import LakePaths
from cbmir_spark.retrieval.query_sources import Query
from tests.support import boundary
from tests.support.tiny_lake import publish
from tests.support.training import images, settings_for

pytestmark = pytest.mark.slow

# Of which each batch has 8,192 images, or 512 series.
QUERIES = {"image": 20_000, "series": 1_100}


@pytest.fixture(scope="module")
def lake(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Lake:
    settings = settings_for(tmp_path_factory.mktemp("boundary"), "training.epochs=1", "evaluation.k=3")
    publish(spark, settings, images())
    lake = Lake(settings, spark)
    lake.train()
    lake.index()
    return lake


def assert_each_asked_once(counts: boundary.Counts, lake: Lake) -> None:
    """Published versions are looked up once, and no Delta table is opened twice or at two versions."""
    paths = LakePaths.of(lake.settings.lake)
    assert counts.histories[paths.path(schemas.SOURCES)] == 1
    opened = [path for path, _ in counts.opened.elements()]
    assert len(opened) == len(set(opened)), counts.opened
    assert all(times == 1 for times in counts.checks.values()), counts.checks


@pytest.mark.parametrize("level", ["image", "series"])
def test_a_long_list_costs_no_more_lookups_than_a_short_one(spark: SparkSession, lake: Lake, level: str) -> None:
    name = f"{level}_id"
    ids = [row[name] for row in lake.tags.select(name).distinct().sort(name).collect()]
    asked = {}
    for number in (1, QUERIES[level]):
        queries = [
            Query(f"q{each}", **{name: given}) for each, given in zip(range(number), itertools.cycle(ids), strict=False)
        ]
        with boundary.counted() as counts:
            answer = lake.search(queries, level=level, k=3, gallery=0, out=f"{lake.uri}/out-{level}-{number}")
        assert answer.report.answered == number
        assert_each_asked_once(counts, lake)
        asked[number] = counts
    parts = list(storage.ObjectStore(lake.settings.storage).list_objects(f"{lake.uri}/out-{level}-{number}/hits"))
    few, many = asked.values()
    assert len(parts) >= 3
    assert (few.opened, few.handles, few.checks, few.histories) == (
        many.opened,
        many.handles,
        many.checks,
        many.histories,
    )
    assert few.log_lookups == many.log_lookups


@pytest.mark.parametrize(
    "call",
    [
        lambda lake: lake.index(),
        lambda lake: lake.evaluate(out=f"{lake.uri}/evaluation"),
        lambda lake: lake.verify(),
        lambda lake: lake.unmapped(),
        lambda lake: lake.tags,
        lambda lake: lake.pixels,
        lambda lake: lake.sources,
        lambda lake: lake.features(),
        lambda lake: lake.feature_files(),
    ],
    ids=["index", "evaluate", "verify", "unmapped", "tags", "pixels", "sources", "features", "files"],
)
def test_every_method_opens_the_lake_once(lake: Lake, call: Callable[[Lake], object]) -> None:
    with boundary.counted() as counts:
        call(lake)
    assert_each_asked_once(counts, lake)


def test_opening_asks_for_nothing(spark: SparkSession, lake: Lake) -> None:
    with boundary.counted() as counts:
        opened = Lake(config.load(overrides=[f"lake.uri={lake.uri}"], environ={}), spark)
        assert opened.uri == lake.uri and lake.uri in repr(opened)
    assert counts == boundary.Counts()
