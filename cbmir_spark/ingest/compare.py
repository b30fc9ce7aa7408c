"""Compare a listing with SOURCES: which objects are new, changed or missing, and in which slice to read them.

Pure DataFrame transforms; nothing here reads or writes a table.
"""

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from cbmir_spark.ingest.listing import NOT_A_FILE
from cbmir_spark.lake import columns as cols

# Columns of the work of a run.
SLICE = "slice"
PROMOTED = "promoted"
ACTION = "action"
# True for a known object that is marked to be read again although it did not change.
MARKED = "marked"
READ, UNCHANGED, MISSING = "read", "unchanged", "missing"
KNOWN_OUTCOME, KNOWN_DIGEST, KNOWN_IMAGE = "known_outcome", "known_digest", "known_image"


def compare(listing: DataFrame, known: DataFrame) -> DataFrame:
    """Decide about each object: (uri, size, modified, etag, action, marked, known_outcome, known_digest, known_image).

    `action` is one of read, unchanged, missing. `listing` is (uri, size, modified, etag); `known` are rows of SOURCES
    below the same archive. Objects that vanished or could not be read last time, or are marked for reading, are read if
    they are listed; those already marked deleted and still absent are left out.
    """
    before = known.select(
        cols.URI,
        F.col(cols.SIZE).alias("known_size"),
        F.col(cols.MODIFIED).alias("known_modified"),
        F.col(cols.ETAG).alias("known_etag"),
        F.col(cols.OUTCOME).alias(KNOWN_OUTCOME),
        F.col(cols.DIGEST).alias(KNOWN_DIGEST),
        F.col(cols.IMAGE_ID).alias(KNOWN_IMAGE),
        (F.col(cols.REASON) == cols.REREAD).alias("known_marked"),
        (F.col(cols.REASON) == cols.UNREADABLE).alias("refused"),
    )
    # Times of object storage have whole seconds; an ETag, where there is one, distinguishes two writes in one second.
    etags = F.coalesce(F.col(cols.ETAG) == F.col("known_etag"), F.lit(True))
    same = (F.col(cols.SIZE) == F.col("known_size")) & (F.col(cols.MODIFIED) == F.col("known_modified")) & etags
    marked = F.coalesce(F.col("known_marked"), F.lit(False))
    due = marked | F.coalesce(F.col("refused"), F.lit(False))
    settled = ~due & ~F.col(KNOWN_OUTCOME).isin(cols.VANISHED, cols.DELETED)
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
            marked.alias(MARKED),
            KNOWN_OUTCOME,
            KNOWN_DIGEST,
            KNOWN_IMAGE,
        )
    )


def keep_unreachable(listing: DataFrame, known: DataFrame) -> tuple[DataFrame, DataFrame]:
    """Keep what is known at or below an entry that is no file: a link may lead to storage that is not mounted.

    Returns `listing` and `known` for `compare`: a known object is listed as it was, and what is known below the entry
    is neither listed nor missing.
    """
    entries = listing.where(F.col(cols.SIZE) == NOT_A_FILE).select(F.col(cols.URI).alias("entry"))
    live = known.where(~F.col(cols.OUTCOME).isin(cols.DELETED, cols.VANISHED, cols.NOT_AN_IMAGE))
    at = live.join(entries, F.col(cols.URI) == F.col("entry"), "left_semi")
    below = F.startswith(F.col(cols.URI), F.concat("entry", F.lit("/")))
    others = listing.join(F.broadcast(at.select(cols.URI)), on=cols.URI, how="left_anti")
    return others.unionByName(at.select(*listing.columns)), known.join(F.broadcast(entries), below, "left_anti")


def promote(actions: DataFrame, sources: DataFrame) -> DataFrame:
    """Select the objects to read again because the one that represents their SOP instance changed or is missing.

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
        F.lit(False).alias(MARKED),
        F.col(cols.OUTCOME).alias(KNOWN_OUTCOME),
        F.col(cols.DIGEST).alias(KNOWN_DIGEST),
        F.col(cols.IMAGE_ID).alias(KNOWN_IMAGE),
    )


def slices(actions: DataFrame, promoted: DataFrame, count: int) -> DataFrame:
    """Divide the work into `count` slices: the columns of `actions`, promoted, slice.

    Known objects of one image share a slice, so that the image has rows throughout; images that miss an object come
    first. Everything else is spread by a hash, so that no sort is needed.
    """
    work = actions.where(F.col(ACTION) != UNCHANGED).withColumn(PROMOTED, F.lit(False))
    missing = actions.where((F.col(ACTION) == MISSING) & F.col(KNOWN_IMAGE).isNotNull())
    incomplete = missing.select(KNOWN_IMAGE, F.lit(True).alias("incomplete")).distinct()
    spread = F.pmod(F.xxhash64(F.coalesce(F.col(KNOWN_IMAGE), F.col(cols.URI))), F.lit(count)).cast("int")
    first = (F.col(ACTION) == MISSING) | F.col("incomplete").isNotNull()
    return (
        work.unionByName(promoted.withColumn(PROMOTED, F.lit(True)))
        .join(incomplete, on=KNOWN_IMAGE, how="left")
        .select(*actions.columns, PROMOTED, F.when(first, 0).otherwise(spread).alias(SLICE))
    )
