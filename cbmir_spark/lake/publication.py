"""THE tables: schema, partitioning, constraints; how they are read, conformed, written and published.

Two roots: the lake (de-identified, for everyone) and the vault (for those who may see identities). TAGS and PIXELS
are written first; the commit of SOURCES comes last and pins the versions of both that belong to it. Readers open the
pinned versions, so a job killed between two tables is never seen. The next writer brings both back to what is
published before it appends a batch, so that none is there twice.
"""

import json
import logging
from dataclasses import asdict, dataclass, replace

from delta.tables import DeltaTable
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from cbmir_spark.errors import TableError
from cbmir_spark.lake.columns import URI
from cbmir_spark.lake.delta import append, commit_message, conform, ensure, exists, version
from cbmir_spark.lake.paths import LakePaths
from cbmir_spark.lake.schemas import PIXELS, SOURCES, TAGS

logger = logging.getLogger(__name__)

# A property of SOURCES: the vocabulary that was last published without rows.
VOCABULARY_PROPERTY = "cbmir.vocabulary"


@dataclass(frozen=True)
class Published:
    """Versions of the three ingest tables that belong together, and what all their rows have in common.

    `batch` is the newest one in them (0: none yet), `key_id` names the key of their pseudonyms, `preprocessing` is the
    version of their pixels, `vocabulary` that of the mapping which gave them modality and body part ("": unknown).
    """

    sources: int
    tags: int
    pixels: int
    batch: int
    key_id: str
    preprocessing: str
    vocabulary: str = ""

    def message(self) -> str:
        """What the commit of SOURCES carries; its own version is the commit's."""
        return json.dumps({name: value for name, value in asdict(self).items() if name != SOURCES.name})


def publish_empty(
    spark: SparkSession, lake: LakePaths, key_id: str, preprocessing: str, vocabulary: str = ""
) -> Published:
    """Create TAGS, PIXELS and at last SOURCES, whose first commit publishes that they are empty: batch 0."""
    ensure(spark, TAGS, lake.path(TAGS))
    ensure(spark, PIXELS, lake.path(PIXELS))
    pinned = Published(
        sources=-1,
        tags=version(spark, lake.path(TAGS)),
        pixels=version(spark, lake.path(PIXELS)),
        batch=0,
        key_id=key_id,
        preprocessing=preprocessing,
        vocabulary=vocabulary,
    )
    with commit_message(spark, pinned.message()):
        ensure(spark, SOURCES, lake.path(SOURCES))
    return replace(pinned, sources=version(spark, lake.path(SOURCES)))


def publish(
    spark: SparkSession, lake: LakePaths, rows: DataFrame, pinned: Published, only_new: bool = False
) -> Published:
    """Commit SOURCES by URI, pinning the versions of TAGS and PIXELS that belong to it; readers see the batch now.

    With `only_new` no URI of `rows` is in SOURCES yet: they are appended, and nothing of it has to be read.
    """
    path = lake.path(SOURCES)
    if only_new:
        return replace(pinned, sources=append(rows, SOURCES, path, pinned.message()))
    target = DeltaTable.forPath(spark, path).alias("t")
    merge = target.merge(conform(rows, SOURCES).alias("s"), f"t.{URI} = s.{URI}")
    with commit_message(spark, pinned.message()):
        merge.whenMatchedUpdateAll().whenNotMatchedInsertAll().execute()
    return replace(pinned, sources=version(spark, path))


def publish_without_rows(spark: SparkSession, lake: LakePaths, pinned: Published) -> Published:
    """Commit that other versions of TAGS and PIXELS, or another vocabulary, belong to the same rows of SOURCES."""
    path = lake.path(SOURCES)
    with commit_message(spark, pinned.message()):
        # An empty append or merge leaves no commit behind.
        spark.sql(
            f"ALTER TABLE delta.`{path.replace('`', '``')}` SET TBLPROPERTIES "
            f"('{VOCABULARY_PROPERTY}' = '{pinned.vocabulary}')"
        )
    return replace(pinned, sources=version(spark, path))


def published(spark: SparkSession, lake: LakePaths) -> Published | None:
    """The newest versions that belong together, or None before the first batch is published."""
    path = lake.path(SOURCES)
    if not exists(spark, path):
        return None
    history = DeltaTable.forPath(spark, path)
    for limit in (20, None):
        commits = history.history(limit) if limit else history.history()
        rows = commits.where(F.col("userMetadata").isNotNull()).orderBy(F.desc("version"))
        for row in rows.select("version", "userMetadata").take(1):
            return Published(sources=row["version"], **json.loads(row["userMetadata"]))
    return None


def require_published(spark: SparkSession, lake: LakePaths) -> Published:
    """As `published`, with at least one batch. Raises TableError saying to ingest first."""
    found = published(spark, lake)
    if found is None or found.batch == 0:
        raise TableError(f"lake {lake.uri} holds no images yet: run `cbmir ingest` first")
    return found


def roll_back(spark: SparkSession, lake: LakePaths, pinned: Published) -> list[str]:
    """Bring TAGS and PIXELS back to what is published, where a job died before it published; the tables mended."""
    mended = []
    for table, wanted in ((TAGS, pinned.tags), (PIXELS, pinned.pixels)):
        path = lake.path(table)
        if version(spark, path) != wanted:
            DeltaTable.forPath(spark, path).restoreToVersion(wanted)
            logger.warning("unpublished rows rolled back", extra={"table": table.name})
            mended.append(table.name)
    return mended
