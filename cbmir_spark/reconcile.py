"""What to read, and who stands for each SOP instance: the bookkeeping of ingest as pure DataFrame transforms.

SOURCES is both catalogue and quarantine. A listing compared with it says what is new, changed or gone; what was then
parsed, together with the known rows of the same images, says who wins, who is a duplicate or a conflict, which rows
leave TAGS and PIXELS and which arrive. Nothing here reads or writes a table.
"""

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from cbmir_spark import tables as t

# What became of an object in a task, before it is known whether it wins.
PARSED = "parsed"
# Columns of the work of a run.
SLICE = "slice"
PROMOTED = "promoted"
ACTION = "action"
READ, UNCHANGED, MISSING = "read", "unchanged", "missing"


def compare(listing: DataFrame, known: DataFrame) -> DataFrame:
    """What to do with each object: (uri, size, modified, action), action one of read, unchanged, missing.

    `listing` is (uri, size, modified); `known` are rows of SOURCES below the same archive. An object that vanished
    last time is read again when it is listed; one already marked deleted and still absent is left out.
    """
    before = known.select(
        t.URI,
        F.col(t.SIZE).alias("known_size"),
        F.col(t.MODIFIED).alias("known_modified"),
        F.col(t.OUTCOME).alias("known_outcome"),
    )
    same = (
        (F.col(t.SIZE) == F.col("known_size"))
        & (F.col(t.MODIFIED) == F.col("known_modified"))
        & ~F.col("known_outcome").isin(t.VANISHED, t.DELETED)
    )
    action = F.when(F.col(t.SIZE).isNull(), MISSING).when(same, UNCHANGED).otherwise(READ)
    return (
        listing.join(before, on=t.URI, how="full_outer")
        .where(F.col(t.SIZE).isNotNull() | (F.col("known_outcome") != t.DELETED))
        .select(
            t.URI,
            F.coalesce(t.SIZE, "known_size").alias(t.SIZE),
            F.coalesce(t.MODIFIED, "known_modified").alias(t.MODIFIED),
            action.alias(ACTION),
        )
    )


def promote(actions: DataFrame, sources: DataFrame) -> DataFrame:
    """Survivors to read again, because the object whose rows stand for their SOP instance changed or is gone.

    Returns (uri, size, modified, cause): duplicates and conflict losers of the same image, with the URI that made
    them matter.
    """
    moved = actions.where(F.col(ACTION) != UNCHANGED).select(t.URI)
    causes = (
        sources.where(F.col(t.OUTCOME) == t.INGESTED)
        .join(moved, on=t.URI, how="left_semi")
        .select(F.col(t.URI).alias("cause"), t.IMAGE_ID)
    )
    survivors = sources.where(F.col(t.OUTCOME).isin(t.DUPLICATE, t.CONFLICT)).join(moved, on=t.URI, how="left_anti")
    return survivors.join(causes, on=t.IMAGE_ID, how="inner").select(t.URI, t.SIZE, t.MODIFIED, "cause")


def slices(actions: DataFrame, promoted: DataFrame, count: int) -> DataFrame:
    """The work in `count` batches: (uri, size, modified, action, promoted, slice).

    Objects are spread by a hash of their URI, so that no sort is needed; what is missing goes first, and a promoted
    survivor goes with its cause, since its image must not be without rows in between.
    """

    def by(column: Column) -> Column:
        return F.pmod(F.xxhash64(column), F.lit(count)).cast("int")

    missing = F.col(ACTION) == MISSING
    work = actions.where(F.col(ACTION) != UNCHANGED).select(
        t.URI,
        t.SIZE,
        t.MODIFIED,
        ACTION,
        F.lit(False).alias(PROMOTED),
        F.when(missing, 0).otherwise(by(F.col(t.URI))).alias(SLICE),
    )
    gone = actions.where(missing).select(F.col(t.URI).alias("cause"), F.lit(True).alias("gone"))
    raised = promoted.join(gone, on="cause", how="left").select(
        t.URI,
        t.SIZE,
        t.MODIFIED,
        F.lit(READ).alias(ACTION),
        F.lit(True).alias(PROMOTED),
        F.when(F.col("gone"), 0).otherwise(by(F.col("cause"))).alias(SLICE),
    )
    return work.unionByName(raised)


def resolve(staged: DataFrame, sources: DataFrame, work: DataFrame, slice_: int) -> DataFrame:
    """Who stands for each SOP instance that this slice touches.

    Contenders are what was just parsed and the known rows of the same images that no slice is yet to read again.
    The content written last wins, then the one with the larger digest; among objects of that content the oldest
    stands for it. So the answer depends on what storage holds and never on the order in which it was read.

    Returns one row for each contender: (uri, size, modified, digest, image_id, outcome, winner_digest, current_digest,
    current_batch), plus one with a null uri for each image without any contender left.
    """
    of_slice = work.where(F.col(SLICE) == slice_).select(t.URI)
    stands = F.col(t.OUTCOME).isin(t.INGESTED, t.DUPLICATE, t.CONFLICT)
    parsed = staged.where(F.col(t.OUTCOME) == PARSED).select(t.URI, t.SIZE, t.MODIFIED, t.DIGEST, t.IMAGE_ID)
    known = sources.where(stands)
    touched = (
        parsed.select(t.IMAGE_ID)
        .unionByName(known.join(of_slice, on=t.URI, how="left_semi").select(t.IMAGE_ID))
        .distinct()
    )
    settled = (
        known.join(touched, on=t.IMAGE_ID, how="left_semi")
        .join(work.where(F.col(SLICE) >= slice_).select(t.URI), on=t.URI, how="left_anti")
        .select(t.URI, t.SIZE, t.MODIFIED, t.DIGEST, t.IMAGE_ID)
    )
    current = (
        known.where(F.col(t.OUTCOME) == t.INGESTED)
        .join(touched, on=t.IMAGE_ID, how="left_semi")
        .groupBy(t.IMAGE_ID)
        .agg(F.max(F.struct(t.BATCH, t.DIGEST)).alias("current"))
        .select(
            t.IMAGE_ID,
            F.col(f"current.{t.DIGEST}").alias("current_digest"),
            F.col(f"current.{t.BATCH}").alias("current_batch"),
        )
    )
    content = Window.partitionBy(t.IMAGE_ID, t.DIGEST)
    best = Window.partitionBy(t.IMAGE_ID).orderBy(
        F.desc("content_time"), F.desc(t.DIGEST), F.asc(t.MODIFIED), F.asc(t.URI)
    )
    whole = best.rowsBetween(Window.unboundedPreceding, Window.unboundedFollowing)
    ranked = (
        parsed.unionByName(settled)
        .withColumn("content_time", F.max(t.MODIFIED).over(content))
        .withColumn("place", F.row_number().over(best))
        .withColumn("winner_digest", F.first(t.DIGEST).over(whole))
    )
    outcome = (
        F.when(F.col("place") == 1, t.INGESTED)
        .when(F.col(t.DIGEST) == F.col("winner_digest"), t.DUPLICATE)
        .otherwise(t.CONFLICT)
    )
    return (
        touched.join(ranked, on=t.IMAGE_ID, how="left")
        .join(current, on=t.IMAGE_ID, how="left")
        .select(
            t.URI,
            t.SIZE,
            t.MODIFIED,
            t.DIGEST,
            t.IMAGE_ID,
            F.when(F.col(t.URI).isNotNull(), outcome).alias(t.OUTCOME),
            "winner_digest",
            "current_digest",
            "current_batch",
        )
    )


def superseded(resolved: DataFrame) -> DataFrame:
    """Images whose rows must go: (image_id, current_batch), since other content won or nothing is left."""
    lost = F.col("winner_digest").isNull() | (F.col("winner_digest") != F.col("current_digest"))
    return (
        resolved.where(F.col("current_digest").isNotNull() & lost)
        .select(t.IMAGE_ID, F.col("current_batch").alias(t.BATCH))
        .distinct()
    )


def newcomers(resolved: DataFrame) -> DataFrame:
    """Images whose winning content is not in the tables yet: (image_id, digest)."""
    absent = F.col("current_digest").isNull() | (F.col("winner_digest") != F.col("current_digest"))
    return (
        resolved.where(F.col("winner_digest").isNotNull() & absent)
        .select(t.IMAGE_ID, F.col("winner_digest").alias(t.DIGEST))
        .distinct()
    )


def arrivals(staged: DataFrame, resolved: DataFrame) -> DataFrame:
    """Staged objects whose content won and is not in the tables yet: one for each image."""
    chosen = (
        staged.where(F.col(t.OUTCOME) == PARSED)
        .join(newcomers(resolved), on=[t.IMAGE_ID, t.DIGEST], how="left_semi")
        .groupBy(t.IMAGE_ID)
        .agg(F.min(t.URI).alias(t.URI))
    )
    return staged.join(F.broadcast(chosen.select(t.URI)), on=t.URI, how="left_semi")


def tag_rows(arrived: DataFrame, batch: int) -> DataFrame:
    """Rows of TAGS."""
    return arrived.select("tags.*", F.lit(batch).cast("bigint").alias(t.BATCH))


def pixel_rows(frames: DataFrame, arrived: DataFrame, batch: int) -> DataFrame:
    """Rows of PIXELS, from the staged frames of the objects that arrived; the objects' URIs are broadcast."""
    kept = frames.join(F.broadcast(arrived.select(t.URI)), on=t.URI, how="left_semi").drop(t.URI)
    return kept.withColumn(t.BATCH, F.lit(batch).cast("bigint"))


def source_rows(staged: DataFrame, resolved: DataFrame, gone: DataFrame, key_id: str, batch: int) -> DataFrame:
    """Rows of SOURCES for all that this slice decided on; `batch` of an ingested object is where its rows lie."""
    here = F.lit(batch).cast("bigint")
    kept = F.col("winner_digest") == F.col("current_digest")
    decided = resolved.where(F.col(t.URI).isNotNull()).select(
        t.URI,
        t.SIZE,
        t.MODIFIED,
        t.DIGEST,
        t.OUTCOME,
        F.lit(None).cast("string").alias(t.REASON),
        t.IMAGE_ID,
        F.when(kept, F.col("current_batch")).otherwise(here).alias(t.BATCH),
    )
    unusable = staged.where(F.col(t.OUTCOME) != PARSED).select(
        t.URI,
        t.SIZE,
        t.MODIFIED,
        t.DIGEST,
        t.OUTCOME,
        t.REASON,
        F.lit(None).cast("string").alias(t.IMAGE_ID),
        here.alias(t.BATCH),
    )
    deleted = gone.select(
        t.URI,
        t.SIZE,
        t.MODIFIED,
        F.lit(None).cast("string").alias(t.DIGEST),
        F.lit(t.DELETED).alias(t.OUTCOME),
        F.lit(None).cast("string").alias(t.REASON),
        F.lit(None).cast("string").alias(t.IMAGE_ID),
        here.alias(t.BATCH),
    )
    rows = decided.unionByName(unusable).unionByName(deleted)
    return rows.withColumn(t.KEY_ID, F.lit(key_id)).select(*[f.name for f in t.SOURCES.schema])
