"""Publish versions of SOURCES, TAGS and PIXELS that belong together, and find the published ones.

TAGS and PIXELS are written first. The commit of SOURCES comes last and pins their versions. Readers open the pinned
versions, so they never see a job that was killed between two tables. The next writer rolls TAGS and PIXELS back to
what is published before it appends a batch, so that no row is there twice.
"""

import json
import logging
from dataclasses import asdict, dataclass, replace

from pyspark.sql import DataFrame, SparkSession

from cbmir_spark import __version__
from cbmir_spark.errors import TableError
from cbmir_spark.lake import delta
from cbmir_spark.lake.columns import URI
from cbmir_spark.lake.paths import LakePaths
from cbmir_spark.lake.pseudonyms import PatientRule
from cbmir_spark.lake.schemas import PIXELS, SOURCES, TAGS

logger = logging.getLogger(__name__)

# Increase it with a change of the tables that earlier versions of the package cannot continue.
LAKE_FORMAT = 2

# A property of SOURCES: the vocabulary that was last published without rows.
VOCABULARY_PROPERTY = "cbmir.vocabulary"


@dataclass(frozen=True)
class Published:
    """Versions of the three ingest tables that belong together, and what all their rows have in common.

    `batch` is the newest batch in them (0: none yet), `key_id` names the key of their pseudonyms, `preprocessing` is
    the version of their pixels, `vocabulary` that of the mapping to modality and body part ("": unknown), `patients`
    the rule for what identifies a patient. `software` is the version of this package that published them.
    """

    sources: int
    tags: int
    pixels: int
    batch: int
    key_id: str
    preprocessing: str
    vocabulary: str = ""
    patients: PatientRule = PatientRule.FIRST
    software: str = ""

    def message(self) -> str:
        """The commit message that publishes these versions; that of SOURCES is the commit's."""
        values = {name: value for name, value in asdict(self).items() if name != SOURCES.name}
        return json.dumps(values | {"format": LAKE_FORMAT, "software": __version__})


def published(spark: SparkSession, lake: LakePaths) -> Published | None:
    """Look up the published versions; None before the first ingest. Raises TableError for a lake of a newer format."""
    found = delta.last_message(spark, lake.path(SOURCES))
    if found is None:
        return None
    values = json.loads(found.text)
    if (written := values.pop("format", 1)) > LAKE_FORMAT:
        raise TableError(
            f"lake {lake.uri} has format {written}, written by cbmir_spark {values.get('software')}; this version, "
            f"{__version__}, reads formats up to {LAKE_FORMAT}: install that version or a newer one"
        )
    return Published(sources=found.version, **values | {"patients": PatientRule(values.get("patients", "first"))})


def require_published(spark: SparkSession, lake: LakePaths) -> Published:
    """Look up the published versions. Raises TableError if no image has been ingested."""
    found = published(spark, lake)
    if found is None or found.batch == 0:
        raise TableError(no_images(lake))
    return found


def no_images(lake: LakePaths) -> str:
    """The message for a lake without images."""
    return f"lake {lake.uri} holds no images yet: run `cbmir ingest` first"


def publish_empty(
    spark: SparkSession,
    lake: LakePaths,
    key_id: str,
    preprocessing: str,
    vocabulary: str = "",
    patients: PatientRule = PatientRule.ISSUER,
) -> Published:
    """Create TAGS, PIXELS and then SOURCES, whose first commit publishes them as empty: batch 0."""
    delta.ensure(spark, TAGS, lake.path(TAGS))
    delta.ensure(spark, PIXELS, lake.path(PIXELS))
    pinned = Published(
        sources=-1,
        tags=delta.version(spark, lake.path(TAGS)),
        pixels=delta.version(spark, lake.path(PIXELS)),
        batch=0,
        key_id=key_id,
        preprocessing=preprocessing,
        vocabulary=vocabulary,
        patients=patients,
        software=__version__,
    )
    with delta.commit_message(spark, pinned.message()):
        delta.ensure(spark, SOURCES, lake.path(SOURCES))
    return replace(pinned, sources=delta.version(spark, lake.path(SOURCES)))


def publish(
    spark: SparkSession, lake: LakePaths, rows: DataFrame, pinned: Published, only_new: bool = False
) -> Published:
    """Write rows of SOURCES by URI, in the commit that publishes the pinned versions of TAGS and PIXELS with it.

    With `only_new` no URI of `rows` is in SOURCES yet: they are appended, and SOURCES is not read.
    """
    path = lake.path(SOURCES)
    if only_new:
        return replace(pinned, sources=delta.append(rows, SOURCES, path, pinned.message()))
    return replace(pinned, sources=delta.upsert(rows, SOURCES, path, [URI], pinned.message()))


def publish_without_rows(spark: SparkSession, lake: LakePaths, pinned: Published) -> Published:
    """Publish other versions of TAGS and PIXELS, or another vocabulary, with the same rows of SOURCES."""
    # An empty append or merge makes no commit.
    sources = delta.set_property(spark, lake.path(SOURCES), VOCABULARY_PROPERTY, pinned.vocabulary, pinned.message())
    return replace(pinned, sources=sources)


def roll_back(spark: SparkSession, lake: LakePaths, pinned: Published) -> list[str]:
    """Restore TAGS and PIXELS to the published versions, after a job died before it published; the tables restored."""
    rolled_back = []
    for table, wanted in ((TAGS, pinned.tags), (PIXELS, pinned.pixels)):
        path = lake.path(table)
        if delta.version(spark, path) != wanted:
            delta.restore(spark, path, wanted)
            logger.warning("unpublished rows rolled back", extra={"table": table.name})
            rolled_back.append(table.name)
    return rolled_back
