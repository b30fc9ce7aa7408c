"""`cbmir remap`: apply a changed vocabulary to TAGS and FEATURES, as if they had been made with it.

The archive is not read and nothing is embedded again: `term_changes` says what changes. The codes of a lake that its
vocabulary does not know are listed by `unmapped`.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from pyspark import StorageLevel
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from cbmir_spark.config import IndexSettings, Settings
from cbmir_spark.dicom.preprocessing import Preprocessing
from cbmir_spark.dicom.vocabulary import Vocabulary
from cbmir_spark.dicom.vocabulary_tables import UNKNOWN
from cbmir_spark.errors import TableError
from cbmir_spark.index import layout
from cbmir_spark.ingest import parse
from cbmir_spark.lake import columns as cols
from cbmir_spark.lake import delta, lease, publication, schemas
from cbmir_spark.lake.delta import TableVersion
from cbmir_spark.lake.open import OpenLake, open_for_writing, open_lake
from cbmir_spark.lake.publication import Published
from cbmir_spark.lake.runs import Record
from cbmir_spark.maintenance.term_changes import (
    PLACE,
    RAW,
    ROW,
    TERMS,
    Change,
    changed_images,
    changes,
    codes,
    moves,
    to_reread,
)


@dataclass(frozen=True)
class Report:
    """Counts of one remap: `codes` are distinct pairs of raw codes, `moved` rows of FEATURES by model."""

    before: str
    vocabulary: str
    codes: int
    images: int
    reread: int
    moved: Mapping[str, int]
    seconds: Mapping[str, float]
    published: Published


@dataclass(frozen=True)
class Unmapped:
    """A raw code without a term, and the images that have it, by modality, the most frequent first."""

    raw: str
    images: int
    modalities: Mapping[str, int]


@dataclass(frozen=True)
class Gaps:
    """Raw codes without a term in the vocabulary of the settings, the most frequent first; `images` of the lake."""

    vocabulary: str
    images: int
    body_parts: Sequence[Unmapped]
    modalities: Sequence[Unmapped]


def run(spark: SparkSession, settings: Settings) -> Report:
    """Apply the `vocabulary` settings to a lake; a second run changes nothing.

    TAGS is written first, then SOURCES, whose commit publishes both and the vocabulary, then each FEATURES table in one
    commit. After a kill in between, the next run finishes the rest. Raises TableError for a lake without images, or
    made with other `pixels` settings, Busy while another job writes to the lake.
    """
    with open_for_writing(spark, settings, lease.TABLES, lease.INDEX) as lake:
        vocabulary = Vocabulary(settings.vocabulary.body_parts)
        return _run(lake, vocabulary, parse.preprocessing_of(settings), settings.index)


def _run(lake: OpenLake, vocabulary: Vocabulary, preprocessing: Preprocessing, settings: IndexSettings) -> Report:
    record = Record.begin("remap")
    spark, paths, pinned = lake.spark, lake.paths, lake.versions
    if pinned.preprocessing != preprocessing.version:
        raise TableError(
            f"lake {paths.uri} holds pixels of preprocessing {pinned.preprocessing}, the `pixels` settings give "
            f"{preprocessing.version}: put the settings back, as they decide which windows change"
        )
    lake.check_leases()
    publication.roll_back(spark, paths, pinned)
    # Whole rows of SOURCES are written, so a table of an older version needs all columns first.
    evolved = delta.evolve(lake.table(schemas.SOURCES, pinned.sources), schemas.SOURCES, pinned.message())
    if evolved is not None:
        pinned = replace(pinned, sources=evolved)
    done = _Done(pinned, 0, 0, 0)
    if pinned.vocabulary != vocabulary.version:
        done = _remap_tags(lake.at(pinned), vocabulary, preprocessing, record)
    with record.stage("features"):
        lake = lake.at(done.published)
        moved = {name: _move(lake, path, settings.min_probability) for name, path in _features(lake).items()}
    report = Report(
        before=pinned.vocabulary,
        vocabulary=vocabulary.version,
        codes=done.codes,
        images=done.images,
        reread=done.reread,
        moved=moved,
        seconds=record.seconds,
        published=done.published,
    )
    counts = {"codes": done.codes, "images": done.images, "reread": done.reread, "moved": sum(moved.values())}
    record.write(
        spark,
        paths,
        counts=counts,
        versions_read={"sources": pinned.sources, "tags": pinned.tags, "pixels": pinned.pixels},
        versions_written={"sources": done.published.sources, "tags": done.published.tags},
    )
    return report


def unmapped(spark: SparkSession, settings: Settings) -> Gaps:
    """List the codes of a lake's images that have no term in the vocabulary of the settings; writes nothing."""
    found = codes(open_lake(spark, settings).tags).collect()
    return gaps(
        ((*(row[name] for name in RAW), row["count"]) for row in found), Vocabulary(settings.vocabulary.body_parts)
    )


@dataclass(frozen=True)
class _Done:
    published: Published
    codes: int
    images: int
    reread: int


def _remap_tags(lake: OpenLake, vocabulary: Vocabulary, preprocessing: Preprocessing, record: Record) -> _Done:
    spark, pinned = lake.spark, lake.versions
    with record.stage("compare"):
        found = [tuple(row[name] for name in (*RAW, *TERMS)) for row in codes(lake.tags).collect()]
        changed = changes(found, vocabulary, preprocessing)
        table = _as_table(spark, changed)
        images = changed_images(lake.tags, table).persist(StorageLevel.MEMORY_AND_DISK)
        batches = Counter({row[cols.BATCH]: row["count"] for row in images.groupBy(cols.BATCH).count().collect()})
    lake.check_leases()
    with record.stage("write"):
        tags_version = pinned.tags
        if batches:
            inside = f"{delta.TARGET}.{cols.BATCH} IN ({', '.join(str(batch) for batch in sorted(batches))})"
            tags_version = delta.update_rows(
                spark, schemas.TAGS, lake.paths.path(schemas.TAGS), table, (*RAW, *TERMS), TERMS, inside
            )
    with record.stage("publish"):
        pixels = lake.pixels.where(F.col(cols.BATCH).isin(*batches))
        sources = lake.sources.where(F.col(cols.OUTCOME) == cols.INGESTED)
        marked = sources.join(to_reread(images, pixels), on=cols.IMAGE_ID, how="left_semi")
        marked = marked.withColumn(cols.REASON, F.lit(cols.REREAD)).persist(StorageLevel.MEMORY_AND_DISK)
        reread = marked.count()
        lake.check_leases()
        belongs = replace(pinned, tags=tags_version, vocabulary=vocabulary.version)
        published = (
            publication.publish(spark, lake.paths, marked, belongs)
            if reread
            else publication.publish_without_rows(spark, lake.paths, belongs)
        )
        marked.unpersist()
        images.unpersist()
    return _Done(published, len({c[:2] for c in _codes_of(changed)}), batches.total(), reread)


def _codes_of(changed: Sequence[Change]) -> list[tuple[str | None, str | None]]:
    return [(change.modality_raw, change.body_part_raw) for change in changed]


def _as_table(spark: SparkSession, changed: Sequence[Change]) -> DataFrame:
    text = ", ".join(f"{name} string" for name in (*RAW, *TERMS, *(f"new_{name}" for name in TERMS), "reread"))
    rows = [tuple(vars(change).values()) for change in changed]
    return spark.createDataFrame(rows, f"{text}, {cols.WINDOW_LOW} double, {cols.WINDOW_HIGH} double")


def _features(lake: OpenLake) -> dict[str, str]:
    """Paths of all FEATURES tables by model."""
    root, store = lake.paths.features_root, lake.store
    if store.kind(root) != "folder":
        return {}
    named = {folder.rstrip("/").rsplit("/", 1)[1]: folder.rstrip("/") for folder in store.list_folder(root)[0]}
    return {name: path for name, path in named.items() if delta.exists(lake.spark, path)}


def _move(lake: OpenLake, path: str, minimum: float) -> int:
    """Move the rows of one FEATURES table to their partitions; their number. Only their partitions are read."""
    features = TableVersion(lake.spark, path, delta.version(lake.spark, path)).rows
    moved = moves(features, lake.tags, minimum).persist(StorageLevel.MEMORY_AND_DISK)
    places = moved.groupBy(*TERMS).count().collect()
    if places:
        within = layout.predicate([(row[cols.MODALITY], row[cols.BODY_PART]) for row in places], delta.TARGET)
        lake.check_leases()
        delta.update_rows(lake.spark, layout.FEATURES, path, moved, (*ROW, *TERMS), PLACE, within)
    moved.unpersist()
    return sum(row["count"] for row in places)


def gaps(found: Iterable[tuple[str | None, str | None, int]], vocabulary: Vocabulary) -> Gaps:
    """Rank the codes of (modality_raw, body_part_raw, images) without a term, except what the site maps to UNKNOWN."""
    parts: dict[str, Counter[str]] = {}
    modalities: dict[str, Counter[str]] = {}
    total = 0
    for modality_raw, body_part_raw, images in found:
        total += images
        modality = vocabulary.modality(modality_raw)
        if body_part_raw is not None and not vocabulary.is_mapped(body_part_raw):
            parts.setdefault(body_part_raw, Counter())[modality] += images
        if modality_raw is not None and modality == UNKNOWN:
            modalities.setdefault(modality_raw, Counter())[modality] += images

    def ranked(counted: Mapping[str, Counter[str]]) -> list[Unmapped]:
        rows = [Unmapped(raw, counts.total(), dict(counts.most_common())) for raw, counts in counted.items()]
        return sorted(rows, key=lambda row: (-row.images, row.raw))

    return Gaps(vocabulary.version, total, ranked(parts), ranked(modalities))
