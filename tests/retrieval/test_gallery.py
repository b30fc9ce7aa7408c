"""The gallery of an answer reads the pictures that it shows, and says which it withholds."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyspark.sql import SparkSession

from cbmir_spark import config, storage
from cbmir_spark.config import Choice
from cbmir_spark.lake import columns as cols
from cbmir_spark.lake import schemas
from cbmir_spark.lake.arrow import arrow_schema
from cbmir_spark.lake.open import OpenLake, open_lake
from cbmir_spark.reports.gallery import ShownQuery, thumbnail
from cbmir_spark.retrieval.gallery import SHOWN_HITS, pictures_of, write_gallery
from tests.support.browser import ParsedPage
from tests.support.tiny_lake import Drawn, draw, pseudonym, publish

IMAGES = [
    Drawn("plain", "one", "CT", "CHEST"),
    Drawn("other", "two", "CT", "HEAD"),
    Drawn("burned", "three", "CT", "CHEST", burned_in="YES", text_risk=True),
    Drawn("echo", "four", "US", "LIVER", burned_in="UNKNOWN", text_risk=True),
    Drawn("screen", "five", "CT", "CHEST", kind="screen", text_risk=None),
    Drawn("query", "six", "CT", "CHEST"),
]


@pytest.fixture(scope="module")
def lake(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> OpenLake:
    folder = tmp_path_factory.mktemp("gallery") / "lake"
    settings = config.load(overrides=[f"lake.uri={folder}"], environ={})
    publish(spark, settings, IMAGES)
    return open_lake(spark, settings)


def page_of(
    lake: OpenLake,
    results: str,
    queries: Sequence[ShownQuery] = (),
    choice: Choice = "exclude",
    facts: Mapping[str, object] | None = None,
) -> str:
    """The page that is written for the first three queries."""
    uri = write_gallery(lake, results, queries, 3, choice, facts or {})
    assert uri == f"{results}/gallery.html"
    return lake.store.read_bytes(uri).decode("utf-8")


def write_parquet(rows: list[tuple[object, ...]], table: schemas.Table, folder: Path) -> None:
    (folder / table.name).mkdir(parents=True)
    values = [dict(zip(table.schema.names, row, strict=True)) for row in rows]
    found = pa.Table.from_pylist(values, schema=arrow_schema(table.schema))
    pq.write_table(found, folder / table.name / "part-00000.parquet")


def write_results(folder: Path, hits: list[str], queries: int = 1) -> str:
    by_name = {image.name: image for image in IMAGES}
    rows: list[tuple[object, ...]] = []
    for query in range(queries):
        for rank, name in enumerate(hits, start=1):
            image = by_name[name]
            ids = (pseudonym(name), 0, pseudonym("series " + name), pseudonym("study"), pseudonym(image.patient))
            labels = (image.modality, image.body_part, cols.FROM_TAG, "CT/CHEST")
            rows.append((f"q{query:03d}", rank, float(rank), *ids, *labels, "F", 40.0, 2020))
    statuses: list[tuple[object, ...]] = [
        (f"q{query:03d}", "answered", None, ["CT/CHEST"], 5, len(hits)) for query in range(queries)
    ]
    statuses.append(("z-lost", "failed", "the file is not there", [], 0, 0))
    write_parquet(rows, schemas.RESULTS_HITS, folder)
    write_parquet(statuses, schemas.RESULTS_STATUSES, folder)
    return storage.canonical(str(folder))


def test_the_gallery_reads_the_shown_pictures_and_withholds_the_rest(lake: OpenLake, tmp_path: Path) -> None:
    results = write_results(tmp_path / "results", ["plain", "other", "burned", "echo", "screen"])
    queries = [ShownQuery("q000", image_id=pseudonym("query"))]
    page = page_of(lake, results, queries, facts={"model": "m-1"})
    seen = ParsedPage(page)
    expected = [
        thumbnail(draw(image, 0).tobytes(), side)
        for image, side in ((IMAGES[5], 224), (IMAGES[0], 144), (IMAGES[1], 144))
    ]
    assert seen.sources == expected
    assert page.count("withheld: may carry burned-in text") == 3
    assert "3 withheld" in seen.text and "the file is not there" in seen.text and "m-1" in seen.text
    assert seen.text.count("●") - 1 == 3 and seen.text.count("○") - 1 == 2  # one of each is in the legend
    pictures = pictures_of(lake, [(pseudonym("burned"), 0), (pseudonym("plain"), 0)], "exclude")
    assert pictures[pseudonym("burned"), 0].pixels is None and pictures[pseudonym("burned"), 0].withheld
    assert pictures[pseudonym("plain"), 0].pixels == draw(IMAGES[0], 0).tobytes()
    page = page_of(lake, results, queries, "include")
    assert "0 withheld" in ParsedPage(page).text or "withheld" not in ParsedPage(page).text
    assert len(ParsedPage(page).sources) == 6


def test_a_query_that_is_no_image_of_the_lake_brings_its_own_picture(lake: OpenLake, tmp_path: Path) -> None:
    results = write_results(tmp_path / "results", ["plain"], queries=4)
    pixels = np.full((256, 256), 77, np.uint8).tobytes()
    queries = [
        ShownQuery("q000", pixels=pixels, modality="CT", body_part="HEAD", age_years=3.0, text_risk=False),
        ShownQuery("q001", pixels=pixels, modality="US", body_part="LIVER"),
    ]
    page = page_of(lake, results, queries)
    seen = ParsedPage(page)
    assert "The first 3 of 5 queries" in " ".join(seen.text.split())
    assert "q001" in seen.text and "q003" not in seen.text
    assert seen.sources[0] == thumbnail(pixels, 224) and thumbnail(pixels, 224) not in seen.sources[1:]
    assert page.count("withheld: may carry burned-in text") == 1


def test_long_answers_are_cut_and_empty_ones_are_a_page_too(lake: OpenLake, tmp_path: Path) -> None:
    many = write_results(tmp_path / "many", ["plain"] * (SHOWN_HITS + 5))
    page = page_of(lake, many)
    assert page.count('title="Euclidean distance"') == SHOWN_HITS and "no picture stored" in page
    none = write_results(tmp_path / "none", [], queries=0)
    page = page_of(lake, none)
    assert "the file is not there" in page
