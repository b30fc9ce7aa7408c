"""What to read, and who stands for each SOP instance: the bookkeeping of ingest as pure DataFrame transforms.

SOURCES is both catalogue and quarantine. A listing compared with it says what is new, changed or gone; what was then
parsed, together with the known rows of the same images, says who wins, who is a duplicate or a conflict, which rows
leave TAGS and PIXELS and which arrive. Nothing here reads or writes a table.
"""

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from cbmir_spark.lake import columns as cols
from cbmir_spark.lake import schemas

# What became of an object in a task, before it is known whether it wins.
PARSED = "parsed"
# What a staged row has of its identifiers, by kind.
IDENTIFIERS = "identifiers"
# Columns of the work of a run.
SLICE = "slice"
PROMOTED = "promoted"
# The attempt of a task that staged an object; its frames carry the same.
STAGED_BY = "staged_by"
# Columns beside the rows of SOURCES that a slice decided on.
TALLY, KNOWN = "tally", "known"
ACTION = "action"
READ, UNCHANGED, MISSING = "read", "unchanged", "missing"
KNOWN_OUTCOME, KNOWN_DIGEST, KNOWN_IMAGE = "known_outcome", "known_digest", "known_image"


def compare(listing: DataFrame, known: DataFrame) -> DataFrame:
    """What to do with each object: (uri, size, modified, etag, action, known_outcome, known_digest, known_image).

    `action` is one of read, unchanged, missing. `listing` is (uri, size, modified, etag); `known` are rows of SOURCES
    below the same archive. What vanished or could not be read last time, or has to be read anew, is read when it is
    listed; what is already marked deleted and still absent is left out.
    """
    before = known.select(
        cols.URI,
        F.col(cols.SIZE).alias("known_size"),
        F.col(cols.MODIFIED).alias("known_modified"),
        F.col(cols.ETAG).alias("known_etag"),
        F.col(cols.OUTCOME).alias(KNOWN_OUTCOME),
        F.col(cols.DIGEST).alias(KNOWN_DIGEST),
        F.col(cols.IMAGE_ID).alias(KNOWN_IMAGE),
        F.coalesce(F.col(cols.REASON).isin(cols.REREAD, cols.UNREADABLE), F.lit(False)).alias("due"),
    )
    # Times of object storage have whole seconds; where there is an ETag it tells two writes of one second apart.
    etags = F.coalesce(F.col(cols.ETAG) == F.col("known_etag"), F.lit(True))
    same = (F.col(cols.SIZE) == F.col("known_size")) & (F.col(cols.MODIFIED) == F.col("known_modified")) & etags
    settled = ~F.col("due") & ~F.col(KNOWN_OUTCOME).isin(cols.VANISHED, cols.DELETED)
    action = F.when(F.col(cols.SIZE).isNull(), MISSING).when(same & settled, UNCHANGED).otherwise(READ)
    return (
        listing.join(before, on=cols.URI, how="full_outer")
        .where(F.col(cols.SIZE).isNotNull() | (F.col(KNOWN_OUTCOME) != cols.DELETED))
        .select(
            cols.URI,
            F.coalesce(cols.SIZE, "known_size").alias(cols.SIZE),
            F.coalesce(cols.MODIFIED, "known_modified").alias(cols.MODIFIED),
            F.when(F.col(cols.SIZE).isNull(), F.col("known_etag")).otherwise(F.col(cols.ETAG)).alias(cols.ETAG),
            action.alias(ACTION),
            KNOWN_OUTCOME,
            KNOWN_DIGEST,
            KNOWN_IMAGE,
        )
    )


def promote(actions: DataFrame, sources: DataFrame) -> DataFrame:
    """Survivors to read again, because the object whose rows stand for their SOP instance changed or is gone.

    Returns duplicates and conflict losers of the same image, in the columns of `actions`.
    """
    known = actions.where((F.col(ACTION) != UNCHANGED) & F.col(KNOWN_OUTCOME).isNotNull())
    moved = known.select(cols.URI)
    causes = (
        known.where(F.col(KNOWN_OUTCOME) == cols.INGESTED).select(F.col(KNOWN_IMAGE).alias(cols.IMAGE_ID)).distinct()
    )
    survivors = sources.where(F.col(cols.OUTCOME).isin(cols.DUPLICATE, cols.CONFLICT)).join(
        moved, on=cols.URI, how="left_anti"
    )
    return survivors.join(causes, on=cols.IMAGE_ID, how="left_semi").select(
        cols.URI,
        cols.SIZE,
        cols.MODIFIED,
        cols.ETAG,
        F.lit(READ).alias(ACTION),
        F.col(cols.OUTCOME).alias(KNOWN_OUTCOME),
        F.col(cols.DIGEST).alias(KNOWN_DIGEST),
        F.col(cols.IMAGE_ID).alias(KNOWN_IMAGE),
    )


def slices(actions: DataFrame, promoted: DataFrame, count: int) -> DataFrame:
    """The work in `count` batches: the columns of `actions`, promoted, slice.

    Known objects of one image go together, since it must not be without rows in between; those of images of which an
    object is missing go first. Everything else is spread by a hash, so that no sort is needed.
    """
    work = actions.where(F.col(ACTION) != UNCHANGED).withColumn(PROMOTED, F.lit(False))
    gone = actions.where((F.col(ACTION) == MISSING) & F.col(KNOWN_IMAGE).isNotNull())
    bereft = gone.select(KNOWN_IMAGE, F.lit(True).alias("bereft")).distinct()
    spread = F.pmod(F.xxhash64(F.coalesce(F.col(KNOWN_IMAGE), F.col(cols.URI))), F.lit(count)).cast("int")
    first = (F.col(ACTION) == MISSING) | F.col("bereft").isNotNull()
    return (
        work.unionByName(promoted.withColumn(PROMOTED, F.lit(True)))
        .join(bereft, on=KNOWN_IMAGE, how="left")
        .select(*actions.columns, PROMOTED, F.when(first, 0).otherwise(spread).alias(SLICE))
    )


def resolve(staged: DataFrame, sources: DataFrame, work: DataFrame, slice_: int) -> DataFrame:
    """Who stands for each SOP instance that this slice touches.

    Contenders are what was just parsed and the known rows of the same images that no slice is yet to read again. One
    that is, and stands for its image, gives way to them until its turn comes.
    The content written last wins, then the one with the larger digest; among objects of that content the oldest
    stands for it. Times count in whole seconds, as object storage gives them. So the answer depends on what storage
    holds and never on the order in which it was read, or on the file system that it was read from.

    Returns one row for each contender: (uri, size, modified, etag, digest, image_id, known_outcome, outcome,
    winner_digest, current_digest, current_batch, stale), plus one with a null uri for each image without any
    contender left. `known_outcome` is that of a row of SOURCES which was not read again, `stale` says that the rows
    in the tables have to be made anew whoever wins.
    """
    ingested = F.col(KNOWN_OUTCOME) == cols.INGESTED
    contender = (cols.URI, cols.SIZE, cols.MODIFIED, cols.ETAG, cols.DIGEST)
    parsed = staged.where(F.col(cols.OUTCOME) == PARSED).select(
        cols.IMAGE_ID,
        *contender,
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
    written, held = (
        F.when(F.col("contends") & ~F.col("pending"), F.col(name)) for name in (cols.MODIFIED, cols.DIGEST)
    )
    ranked = (
        parsed.unionByName(known)
        .withColumn("current", F.max(F.when(ingested, F.struct(cols.BATCH, cols.DIGEST))).over(image))
        .withColumn("stale", F.bool_or("reread").over(image))
        .withColumn(
            "content_time", F.date_trunc("second", F.max(written).over(Window.partitionBy(cols.IMAGE_ID, cols.DIGEST)))
        )
        .withColumn("place", F.row_number().over(best))
        .withColumn("winner_digest", F.first(held).over(whole))
        .where(F.col("contends") | (F.col("place") == 1))
    )
    outcome = (
        F.when(F.col("pending"), cols.CONFLICT)
        .when(F.col("place") == 1, cols.INGESTED)
        .when(F.col(cols.DIGEST) == F.col("winner_digest"), cols.DUPLICATE)
        .otherwise(cols.CONFLICT)
    )
    return ranked.select(
        cols.IMAGE_ID,
        *[F.when(F.col("contends"), F.col(name)).alias(name) for name in (*contender, KNOWN_OUTCOME)],
        F.when(F.col("contends"), outcome).alias(cols.OUTCOME),
        "winner_digest",
        F.col(f"current.{cols.DIGEST}").alias("current_digest"),
        F.col(f"current.{cols.BATCH}").alias("current_batch"),
        "stale",
    )


def _lost() -> Column:
    """Whether the rows in the tables do not show what won."""
    return F.col("winner_digest").isNull() | (F.col("winner_digest") != F.col("current_digest")) | F.col("stale")


def superseded(resolved: DataFrame) -> DataFrame:
    """Images whose rows must go: (image_id, batch), since other content won or nothing is left."""
    return (
        resolved.where(F.col("current_digest").isNotNull() & _lost())
        .select(cols.IMAGE_ID, F.col("current_batch").alias(cols.BATCH))
        .distinct()
    )


def newcomers(resolved: DataFrame) -> DataFrame:
    """Images whose winning content is not in the tables yet: (image_id, digest)."""
    absent = F.col("current_digest").isNull() | _lost()
    return (
        resolved.where(F.col("winner_digest").isNotNull() & absent)
        .select(cols.IMAGE_ID, F.col("winner_digest").alias(cols.DIGEST))
        .distinct()
    )


def arrivals(staged: DataFrame, resolved: DataFrame) -> DataFrame:
    """Staged objects whose content won and is not in the tables yet: one for each image."""
    chosen = (
        staged.where(F.col(cols.OUTCOME) == PARSED)
        .join(newcomers(resolved), on=[cols.IMAGE_ID, cols.DIGEST], how="left_semi")
        .groupBy(cols.IMAGE_ID)
        .agg(F.min(cols.URI).alias(cols.URI))
    )
    return staged.join(F.broadcast(chosen.select(cols.URI)), on=cols.URI, how="left_semi")


def tag_rows(arrived: DataFrame, batch: int) -> DataFrame:
    """Rows of TAGS."""
    return arrived.select("tags.*", F.lit(batch).cast("bigint").alias(cols.BATCH))


def identity_rows(arrived: DataFrame, key_id: str) -> DataFrame:
    """Rows of IDENTITY: who the images that arrived are, and what they belong to."""
    owners = [(kind, F.col(f"tags.{column}")) for kind, column in schemas.OWNERS.items()]
    named = [F.struct(F.lit(kind).alias(cols.KIND), id_.alias(cols.PSEUDONYM)) for kind, id_ in owners]
    return (
        arrived.select(IDENTIFIERS, F.explode(F.array(*named)).alias("owner"))
        .select("owner.*", F.col(IDENTIFIERS)[F.col(f"owner.{cols.KIND}")].alias(cols.IDENTIFIER))
        .where(F.col(cols.IDENTIFIER).isNotNull())
        .withColumn(cols.KEY_ID, F.lit(key_id))
        .distinct()
    )


def pixel_rows(frames: DataFrame, arrived: DataFrame, batch: int) -> DataFrame:
    """Rows of PIXELS, from the staged frames of the objects that arrived.

    `arrived` is broadcast. An object counts with the frames of the attempt that its own row came from.
    """
    kept = frames.join(F.broadcast(arrived.select(cols.URI, STAGED_BY)), on=[cols.URI, STAGED_BY], how="left_semi")
    return kept.drop(cols.URI, STAGED_BY).withColumn(cols.BATCH, F.lit(batch).cast("bigint"))


def source_rows(staged: DataFrame, resolved: DataFrame, work: DataFrame, key_id: str, batch: int) -> DataFrame:
    """Rows of SOURCES for all that this slice decided on, and `tally`, `known` beside them.

    `batch` of an ingested object is where its rows lie. `tally` is what a row counts as among the objects that were
    read: its outcome, UNCHANGED for the same content with the same outcome as before, null for what was not listed as
    new or changed. `known` says that SOURCES has the URI already. Known rows that stay as they are are left out.
    """
    here = F.lit(batch).cast("bigint")
    none = F.lit(None).cast("string")
    kept = ~_lost()
    stays = (F.col(KNOWN_OUTCOME) == F.col(cols.OUTCOME)) & (kept | (F.col(cols.OUTCOME) != cols.INGESTED))
    decided = resolved.where(F.col(cols.URI).isNotNull() & ~F.coalesce(stays, F.lit(False))).select(
        cols.URI,
        cols.SIZE,
        cols.MODIFIED,
        cols.ETAG,
        cols.DIGEST,
        cols.OUTCOME,
        none.alias(cols.REASON),
        cols.IMAGE_ID,
        F.when(kept, F.col("current_batch")).otherwise(here).alias(cols.BATCH),
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
        none.alias(cols.IMAGE_ID),
        here.alias(cols.BATCH),
        F.lit(False).alias("settled"),
    )
    gone = work.where(F.col(ACTION) == MISSING).select(
        cols.URI,
        cols.SIZE,
        cols.MODIFIED,
        cols.ETAG,
        none.alias(cols.DIGEST),
        F.lit(cols.DELETED).alias(cols.OUTCOME),
        none.alias(cols.REASON),
        none.alias(cols.IMAGE_ID),
        here.alias(cols.BATCH),
        F.lit(True).alias("settled"),
    )
    rows = decided.unionByName(unusable).unionByName(gone)
    read = work.where(F.col(ACTION) == READ).select(cols.URI, PROMOTED, KNOWN_OUTCOME, KNOWN_DIGEST)
    again = (F.col(cols.DIGEST) == F.col(KNOWN_DIGEST)) & (F.col(cols.OUTCOME) == F.col(KNOWN_OUTCOME))
    tally = F.when(again, UNCHANGED).otherwise(F.col(cols.OUTCOME))
    return rows.join(F.broadcast(read), on=cols.URI, how="left").select(
        *[f.name for f in schemas.SOURCES.schema if f.name != cols.KEY_ID],
        F.lit(key_id).alias(cols.KEY_ID),
        F.when(F.col(PROMOTED).isNotNull() & ~F.col(PROMOTED), tally).alias(TALLY),
        (F.col("settled") | F.col(KNOWN_OUTCOME).isNotNull()).alias(KNOWN),
    )
