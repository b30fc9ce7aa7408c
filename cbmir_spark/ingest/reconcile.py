"""Decide which object represents each SOP instance, and which rows arrive and leave: pure DataFrame transforms.

SOURCES is both catalogue and quarantine. The parsed objects, together with the known rows of the same images, show
which object wins, which are duplicates or conflicts, which rows leave TAGS and PIXELS and which arrive. Nothing here
reads or writes a table.
"""

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from cbmir_spark.dicom.preprocessing import READING_REVISION
from cbmir_spark.ingest.compare import (
    ACTION,
    KNOWN_DIGEST,
    KNOWN_IMAGE,
    KNOWN_OUTCOME,
    MISSING,
    PROMOTED,
    READ,
    SLICE,
    UNCHANGED,
)
from cbmir_spark.lake import columns as cols
from cbmir_spark.lake import schemas

# Outcome of an object that a task could use, before it is known whether it wins.
PARSED = "parsed"
# A staged row's identifiers by kind.
IDENTIFIERS = "identifiers"
# The attempt of a task that staged an object; its frames carry the same.
STAGED_BY = "staged_by"
# Columns beside the rows of SOURCES that a slice results in.
TALLY, KNOWN = "tally", "known"


def same_as_before(staged: DataFrame, frames: DataFrame, tags: DataFrame, pixels: DataFrame) -> DataFrame:
    """Select the staged objects that give the rows which their images have already: (image_id, digest).

    `staged` and `frames` are STAGED and STAGED_FRAMES, `tags` and `pixels` the tables. Of PIXELS the columns without
    the pixels are read.
    """
    names = [f.name for f in schemas.TAGS.schema if f.name != cols.BATCH]
    read = staged.where(F.col(cols.OUTCOME) == PARSED).select(
        cols.IMAGE_ID,
        cols.DIGEST,
        cols.URI,
        STAGED_BY,
        F.struct(*[F.col(f"tags.{name}") for name in names]).alias("new_tags"),
    )
    images = F.broadcast(read.select(cols.IMAGE_ID).distinct())
    before = tags.join(images, on=cols.IMAGE_ID, how="left_semi").select(
        F.col(cols.IMAGE_ID), F.struct(*names).alias("old_tags")
    )
    of_frame = (cols.FRAME, cols.PIXEL_DIGEST, cols.PREPROCESSING, cols.WINDOW_LOW, cols.WINDOW_HIGH)
    all_frames = F.sort_array(F.collect_list(F.struct(*of_frame)))
    new = frames.groupBy(cols.URI, STAGED_BY).agg(all_frames.alias("new_frames"))
    old = pixels.join(images, on=cols.IMAGE_ID, how="left_semi").groupBy(cols.IMAGE_ID)
    return (
        read.join(before, on=cols.IMAGE_ID)
        .where(F.col("new_tags").eqNullSafe(F.col("old_tags")))
        .join(new, on=[cols.URI, STAGED_BY])
        .join(old.agg(all_frames.alias("old_frames")), on=cols.IMAGE_ID)
        .where(F.col("new_frames").eqNullSafe(F.col("old_frames")))
        .select(cols.IMAGE_ID, cols.DIGEST)
        .distinct()
    )


def resolve(
    staged: DataFrame, sources: DataFrame, work: DataFrame, slice_: int, same: DataFrame | None = None
) -> DataFrame:
    """Choose the object that represents each SOP instance which this slice touches.

    Contenders are the objects just parsed and the known rows of the same images, except those that a later slice reads
    again: one of them that represents its image gives way to any contender until its slice is read.
    The content written last wins, then the one with the larger digest; the oldest object with that content represents
    the image. Times are compared in whole seconds, as object storage gives them. So the result depends on the content
    of storage alone, not on the order of reading or on the file system.

    Returns one row for each contender: (uri, size, modified, etag, digest, revision, image_id, known_outcome, outcome,
    winner_digest, current_digest, current_batch, stale), plus one with a null uri for each image without any
    contender left. `known_outcome` is that of a row of SOURCES which was not read again; `stale` rows in the tables
    must be written again whichever object wins: their object was marked to be read again, and is not among the `same`,
    which `same_as_before` found.
    """
    ingested = F.col(KNOWN_OUTCOME) == cols.INGESTED
    contender = (cols.URI, cols.SIZE, cols.MODIFIED, cols.ETAG, cols.DIGEST)
    parsed = staged.where(F.col(cols.OUTCOME) == PARSED).select(
        cols.IMAGE_ID,
        *contender,
        F.lit(READING_REVISION).alias(cols.REVISION),
        F.lit(None).cast("string").alias(KNOWN_OUTCOME),
        F.lit(None).cast("bigint").alias(cols.BATCH),
        F.lit(False).alias("reread"),
        F.lit(True).alias("contends"),
        F.lit(False).alias("pending"),
    )
    # A batch has a bounded number of images: broadcast, they spare SOURCES the shuffle.
    of_slice = work.where((F.col(SLICE) == slice_) & F.col(KNOWN_IMAGE).isNotNull())
    touched = F.broadcast(
        parsed.select(cols.IMAGE_ID).unionByName(of_slice.select(F.col(KNOWN_IMAGE).alias(cols.IMAGE_ID))).distinct()
    )
    later = F.coalesce(F.col(SLICE) > slice_, F.lit(False))
    known = (
        sources.where(F.col(cols.OUTCOME).isin(cols.INGESTED, cols.DUPLICATE, cols.CONFLICT))
        .join(touched, on=cols.IMAGE_ID, how="left_semi")
        .join(work.where(F.col(KNOWN_IMAGE).isNotNull()).select(cols.URI, SLICE), on=cols.URI, how="left")
        .withColumn(KNOWN_OUTCOME, F.col(cols.OUTCOME))
        .select(
            cols.IMAGE_ID,
            *contender,
            cols.REVISION,
            KNOWN_OUTCOME,
            cols.BATCH,
            F.coalesce(ingested & (F.col(cols.REASON) == cols.REREAD), F.lit(False)).alias("reread"),
            (F.col(SLICE).isNull() | (F.col(SLICE) < slice_) | (later & ingested)).alias("contends"),
            later.alias("pending"),
        )
    )
    image = Window.partitionBy(cols.IMAGE_ID)
    best = image.orderBy(
        F.desc("contends"),
        F.asc("pending"),
        F.desc("content_time"),
        F.desc(cols.DIGEST),
        F.asc(cols.MODIFIED),
        F.asc(cols.URI),
    )
    whole = best.rowsBetween(Window.unboundedPreceding, Window.unboundedFollowing)
    modified, digest = (
        F.when(F.col("contends") & ~F.col("pending"), F.col(name)) for name in (cols.MODIFIED, cols.DIGEST)
    )
    ranked = (
        parsed.unionByName(known)
        .withColumn("current", F.max(F.when(ingested, F.struct(cols.BATCH, cols.DIGEST))).over(image))
        .withColumn("stale", F.bool_or("reread").over(image))
        .withColumn(
            "content_time", F.date_trunc("second", F.max(modified).over(Window.partitionBy(cols.IMAGE_ID, cols.DIGEST)))
        )
        .withColumn("position", F.row_number().over(best))
        .withColumn("winner_digest", F.first(digest).over(whole))
        .where(F.col("contends") | (F.col("position") == 1))
    )
    outcome = (
        F.when(F.col("pending"), cols.CONFLICT)
        .when(F.col("position") == 1, cols.INGESTED)
        .when(F.col(cols.DIGEST) == F.col("winner_digest"), cols.DUPLICATE)
        .otherwise(cols.CONFLICT)
    )
    stale = F.col("stale")
    if same is not None:
        unchanged = same.select(
            cols.IMAGE_ID, F.col(cols.DIGEST).alias("winner_digest"), F.lit(True).alias("unchanged")
        )
        ranked = ranked.join(unchanged, on=[cols.IMAGE_ID, "winner_digest"], how="left")
        stale &= F.col("unchanged").isNull()
    return ranked.select(
        cols.IMAGE_ID,
        *[F.when(F.col("contends"), F.col(name)).alias(name) for name in (*contender, cols.REVISION, KNOWN_OUTCOME)],
        F.when(F.col("contends"), outcome).alias(cols.OUTCOME),
        "winner_digest",
        F.col(f"current.{cols.DIGEST}").alias("current_digest"),
        F.col(f"current.{cols.BATCH}").alias("current_batch"),
        stale.alias("stale"),
    )


def _outdated() -> Column:
    """True where the rows in the tables are not those of the winner."""
    return F.col("winner_digest").isNull() | (F.col("winner_digest") != F.col("current_digest")) | F.col("stale")


def superseded(resolved: DataFrame) -> DataFrame:
    """Select the images whose rows must be deleted, (image_id, batch): other content won, or no object is left."""
    return (
        resolved.where(F.col("current_digest").isNotNull() & _outdated())
        .select(cols.IMAGE_ID, F.col("current_batch").alias(cols.BATCH))
        .distinct()
    )


def newcomers(resolved: DataFrame) -> DataFrame:
    """Select the images whose winning content is not in the tables yet: (image_id, digest)."""
    absent = F.col("current_digest").isNull() | _outdated()
    return (
        resolved.where(F.col("winner_digest").isNotNull() & absent)
        .select(cols.IMAGE_ID, F.col("winner_digest").alias(cols.DIGEST))
        .distinct()
    )


def arrivals(staged: DataFrame, resolved: DataFrame) -> DataFrame:
    """Select the staged objects whose content won and is not in the tables yet: one for each image."""
    chosen = (
        staged.where(F.col(cols.OUTCOME) == PARSED)
        .join(newcomers(resolved), on=[cols.IMAGE_ID, cols.DIGEST], how="left_semi")
        .groupBy(cols.IMAGE_ID)
        .agg(F.min(cols.URI).alias(cols.URI))
    )
    return staged.join(F.broadcast(chosen.select(cols.URI)), on=cols.URI, how="left_semi")


def tag_rows(arrived: DataFrame, batch: int) -> DataFrame:
    """Make rows of TAGS."""
    return arrived.select("tags.*", F.lit(batch).cast("bigint").alias(cols.BATCH))


def identity_rows(arrived: DataFrame, key_id: str) -> DataFrame:
    """Make rows of IDENTITY: the identifiers of the images that arrived, and of what they belong to."""
    owners = [(kind, F.col(f"tags.{column}")) for kind, column in schemas.OWNERS.items()]
    named = [F.struct(F.lit(kind).alias(cols.KIND), id_.alias(cols.PSEUDONYM)) for kind, id_ in owners]
    return (
        arrived.select(IDENTIFIERS, F.explode(F.array(*named)).alias("owner"))
        .select(
            "owner.*",
            F.col(IDENTIFIERS)[F.col(f"owner.{cols.KIND}")].alias(cols.IDENTIFIER),
            F.when(F.col(f"owner.{cols.KIND}") == "patient", F.col(IDENTIFIERS)[cols.ISSUER]).alias(cols.ISSUER),
        )
        .where(F.col(cols.IDENTIFIER).isNotNull())
        .withColumn(cols.KEY_ID, F.lit(key_id))
        .distinct()
    )


def pixel_rows(frames: DataFrame, arrived: DataFrame, batch: int) -> DataFrame:
    """Make rows of PIXELS from the staged frames of the objects that arrived.

    `arrived` is broadcast. Of an object, the frames of the task attempt that staged its row are taken.
    """
    chosen = frames.join(F.broadcast(arrived.select(cols.URI, STAGED_BY)), on=[cols.URI, STAGED_BY], how="left_semi")
    return chosen.drop(cols.URI, STAGED_BY).withColumn(cols.BATCH, F.lit(batch).cast("bigint"))


def source_rows(staged: DataFrame, resolved: DataFrame, work: DataFrame, key_id: str, batch: int) -> DataFrame:
    """Make the rows of SOURCES that this slice results in, with `tally` and `known` beside them.

    `batch` of an ingested object is the one of its rows. `tally` is what to count a read object as: its outcome,
    UNCHANGED for the same content with the same outcome as before, null for an object that was not listed as new or
    changed. `known` is true where SOURCES has the URI already. Known rows that do not change are left out.
    """
    here = F.lit(batch).cast("bigint")
    none = F.lit(None).cast("string")
    current = ~_outdated()
    unchanged = (F.col(KNOWN_OUTCOME) == F.col(cols.OUTCOME)) & (current | (F.col(cols.OUTCOME) != cols.INGESTED))
    decided = resolved.where(F.col(cols.URI).isNotNull() & ~F.coalesce(unchanged, F.lit(False))).select(
        cols.URI,
        cols.SIZE,
        cols.MODIFIED,
        cols.ETAG,
        cols.DIGEST,
        cols.OUTCOME,
        none.alias(cols.REASON),
        none.alias(cols.DETAIL),
        cols.IMAGE_ID,
        F.when(current, F.col("current_batch")).otherwise(here).alias(cols.BATCH),
        cols.REVISION,
        F.col(KNOWN_OUTCOME).isNotNull().alias("settled"),
    )
    unusable = staged.where(F.col(cols.OUTCOME) != PARSED).select(
        cols.URI,
        cols.SIZE,
        cols.MODIFIED,
        cols.ETAG,
        cols.DIGEST,
        cols.OUTCOME,
        cols.REASON,
        cols.DETAIL,
        none.alias(cols.IMAGE_ID),
        here.alias(cols.BATCH),
        F.lit(READING_REVISION).alias(cols.REVISION),
        F.lit(False).alias("settled"),
    )
    deleted = work.where(F.col(ACTION) == MISSING).select(
        cols.URI,
        cols.SIZE,
        cols.MODIFIED,
        cols.ETAG,
        none.alias(cols.DIGEST),
        F.lit(cols.DELETED).alias(cols.OUTCOME),
        none.alias(cols.REASON),
        none.alias(cols.DETAIL),
        none.alias(cols.IMAGE_ID),
        here.alias(cols.BATCH),
        F.lit(None).cast("int").alias(cols.REVISION),
        F.lit(True).alias("settled"),
    )
    rows = decided.unionByName(unusable).unionByName(deleted)
    read = work.where(F.col(ACTION) == READ).select(cols.URI, PROMOTED, KNOWN_OUTCOME, KNOWN_DIGEST)
    again = (F.col(cols.DIGEST) == F.col(KNOWN_DIGEST)) & (F.col(cols.OUTCOME) == F.col(KNOWN_OUTCOME))
    tally = F.when(again, UNCHANGED).otherwise(F.col(cols.OUTCOME))
    return rows.join(F.broadcast(read), on=cols.URI, how="left").select(
        *[f.name for f in schemas.SOURCES.schema if f.name != cols.KEY_ID],
        F.lit(key_id).alias(cols.KEY_ID),
        F.when(F.col(PROMOTED).isNotNull() & ~F.col(PROMOTED), tally).alias(TALLY),
        (F.col("settled") | F.col(KNOWN_OUTCOME).isNotNull()).alias(KNOWN),
    )
