"""Reconciling: which objects are read, which one wins in any order of arrival, and which one replaces a missing one."""

import random

from pyspark.sql import DataFrame, SparkSession

from cbmir_spark.ingest import compare, reconcile
from cbmir_spark.lake import columns as cols
from cbmir_spark.lake import schemas
from tests.support.archives import at


def _listing(spark: SparkSession, *rows: tuple[str, int, int]) -> DataFrame:
    full = [(u, s, at(h), None) for u, s, h in rows]
    return spark.createDataFrame(full, "uri string, size bigint, modified timestamp, etag string")


def _sources(spark: SparkSession, *rows: tuple[str, int, int, str | None, str, str | None, int]) -> DataFrame:
    """(uri, size, hour, digest, outcome, image_id, batch)"""
    full = [(u, s, at(h), None, d, o, None, None, i, "key", b, None) for u, s, h, d, o, i, b in rows]
    return spark.createDataFrame(full, schemas.SOURCES.schema)


def _staged(spark: SparkSession, *rows: tuple[str, int, str, str]) -> DataFrame:
    """(uri, hour, digest, image_id), all parsed"""
    schema = (
        "uri string, size bigint, modified timestamp, etag string, digest string, outcome string, reason string, "
        "detail string, image_id string"
    )
    return spark.createDataFrame(
        [(u, 1, at(h), None, d, reconcile.PARSED, None, None, i) for u, h, d, i in rows], schema
    )


def _work(spark: SparkSession, *rows: tuple[str, str | None, int]) -> DataFrame:
    """(uri, known_image, slice)"""
    return spark.createDataFrame(list(rows), "uri string, known_image string, slice int")


def test_compare_reads_only_what_is_new_or_changed(spark: SparkSession) -> None:
    listing = _listing(spark, ("same", 1, 1), ("new", 1, 1), ("longer", 2, 1), ("later", 1, 2), ("back", 1, 1))
    known = _sources(
        spark,
        ("same", 1, 1, "d", cols.INGESTED, "i", 1),
        ("longer", 1, 1, None, cols.REJECTED, None, 1),
        ("later", 1, 1, None, cols.NOT_AN_IMAGE, None, 1),
        ("back", 1, 1, None, cols.VANISHED, None, 1),
        ("gone", 1, 1, "d", cols.DUPLICATE, "i", 1),
        ("long gone", 1, 1, None, cols.DELETED, None, 1),
    )

    actions = {row["uri"]: row["action"] for row in compare.compare(listing, known).collect()}
    assert actions == {
        "same": "unchanged",
        "new": "read",
        "longer": "read",
        "later": "read",
        "back": "read",
        "gone": "missing",
    }


def _winner(resolved: DataFrame) -> dict[str, str]:
    return {row["uri"]: row["outcome"] for row in resolved.collect() if row["uri"] is not None}


def test_the_winner_does_not_depend_on_the_order_of_arrival(spark: SparkSession) -> None:
    objects = [("a", 1, "x", "i"), ("b", 3, "y", "i"), ("c", 5, "x", "i"), ("d", 5, "w", "i"), ("e", 2, "x", "i")]
    expected = {"a": cols.INGESTED, "b": cols.CONFLICT, "c": cols.DUPLICATE, "d": cols.CONFLICT, "e": cols.DUPLICATE}
    shuffled = random.Random(7)
    for _ in range(3):
        order = shuffled.sample(objects, len(objects))
        cut = shuffled.randrange(len(order))
        first, second = order[:cut], order[cut:]
        known: list[tuple[str, int, int, str | None, str, str | None, int]] = []
        if first:
            work = _work(spark, *[(o[0], None, 0) for o in first])
            resolved = reconcile.resolve(_staged(spark, *first), _sources(spark), work, 0).collect()
            known = [(r["uri"], 1, r["modified"].hour, r["digest"], r["outcome"], "i", 1) for r in resolved]
        if second:
            work = _work(spark, *[(o[0], None, 0) for o in second])
            resolved_df = reconcile.resolve(_staged(spark, *second), _sources(spark, *known), work, 0)
            assert _winner(resolved_df) == expected


def test_a_duplicate_of_known_content_rewrites_nothing(spark: SparkSession) -> None:
    known = _sources(spark, ("a", 1, 1, "x", cols.INGESTED, "i", 4))
    staged = _staged(spark, ("b", 9, "x", "i"))
    resolved = reconcile.resolve(staged, known, _work(spark, ("b", None, 0)), 0)
    assert _winner(resolved) == {"a": cols.INGESTED, "b": cols.DUPLICATE}
    assert reconcile.superseded(resolved).count() == 0
    assert reconcile.newcomers(resolved).count() == 0


def test_a_survivor_takes_the_place_of_what_is_gone(spark: SparkSession) -> None:
    known = _sources(
        spark,
        ("a", 1, 5, "x", cols.INGESTED, "i", 4),
        ("b", 1, 1, "y", cols.CONFLICT, "i", 4),
        ("c", 1, 5, "z", cols.INGESTED, "j", 4),
    )
    actions = compare.compare(_listing(spark, ("b", 1, 1)), known)
    promoted = compare.promote(actions, known)
    assert [(r["uri"], r["known_image"]) for r in promoted.collect()] == [("b", "i")]
    work = compare.slices(actions, promoted, 3)
    assert {(r["uri"], r["action"], r["promoted"], r["slice"]) for r in work.collect()} == {
        ("a", "missing", False, 0),
        ("c", "missing", False, 0),
        ("b", "read", True, 0),
    }
    resolved = reconcile.resolve(_staged(spark, ("b", 1, "y", "i")), known, work, 0)
    assert _winner(resolved) == {"b": cols.INGESTED}
    assert {(r["image_id"], r["batch"]) for r in reconcile.superseded(resolved).collect()} == {("i", 4), ("j", 4)}
    assert [(r["image_id"], r["digest"]) for r in reconcile.newcomers(resolved).collect()] == [("i", "y")]


def test_known_objects_of_one_image_are_read_together(spark: SparkSession) -> None:
    """Apart, the image would be without rows from the batch of the one to that of the other."""
    names = [f"{image}{n}" for image in "abcdef" for n in range(3)]
    known = _sources(spark, *[(u, 1, 1, "x", cols.DUPLICATE if u[1] != "0" else cols.INGESTED, u[0], 1) for u in names])
    listing = _listing(spark, *[(u, 2, 2) for u in names if u != "a1"], *[(f"new{n}", 1, 1) for n in range(9)])
    actions = compare.compare(listing, known)
    work = compare.slices(actions, compare.promote(actions, known), 4).collect()
    by_image = {image: {r["slice"] for r in work if r["known_image"] == image} for image in "abcdef"}
    assert {image: len(slices) for image, slices in by_image.items()} == dict.fromkeys("abcdef", 1)
    assert by_image["a"] == {0}
    assert len({r["slice"] for r in work}) > 1


def test_an_image_has_one_that_stands_for_it_while_another_waits_for_its_turn(spark: SparkSession) -> None:
    """`a` changed and is read in a later slice; what arrives before takes its place until then, never beside it."""
    known = _sources(spark, ("a", 1, 1, "x", cols.INGESTED, "i", 4))
    work = _work(spark, ("b", None, 0), ("a", "i", 1))
    resolved = reconcile.resolve(_staged(spark, ("b", 2, "y", "i")), known, work, 0)
    assert _winner(resolved) == {"b": cols.INGESTED, "a": cols.CONFLICT}
    assert [r["image_id"] for r in reconcile.superseded(resolved).collect()] == ["i"]
