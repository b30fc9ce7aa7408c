"""A changed vocabulary → TAGS and FEATURES as if they had been made with it; the archive is not read.

Modality and body part are looked up anew from the raw codes that TAGS keeps: a code that stayed the same means the
same for all images that have it, so the driver maps the distinct ones. Images whose pixels would now get another
window are marked, and the next ingest reads those again. In FEATURES rows change their partition and keep their vector.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from pyspark import StorageLevel
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from cbmir_spark import storage
from cbmir_spark.config import Settings
from cbmir_spark.dicom.preprocessing import Preprocessing
from cbmir_spark.dicom.vocabulary import Vocabulary
from cbmir_spark.dicom.vocabulary_tables import UNKNOWN
from cbmir_spark.errors import TableError
from cbmir_spark.ingest import parse
from cbmir_spark.lake import columns as cols
from cbmir_spark.lake import delta, lease, publication, schemas
from cbmir_spark.lake.paths import LakePaths
from cbmir_spark.lake.publication import Published
from cbmir_spark.lake.runs import Record
from cbmir_spark.storage import ObjectStore

_RAW = (cols.MODALITY_RAW, cols.BODY_PART_RAW)
_TERMS = (cols.MODALITY, cols.BODY_PART)
_PLACE = (*_TERMS, cols.BODY_PART_SOURCE)
_ROW = (cols.IMAGE_ID, cols.FRAME, cols.PIXELS_BATCH)
_WINDOW = (cols.WINDOW_LOW, cols.WINDOW_HIGH)
_GRAY = ("MONOCHROME1", "MONOCHROME2")
NEVER, WHERE_USED, ALWAYS = "never", "where_used", "always"


@dataclass(frozen=True)
class Change:
    """Images that have the same codes and terms, and the terms that they get.

    `reread` says which of them need other pixels: NEVER, ALWAYS, or those in which the window `low` to `high` was used.
    """

    modality_raw: str | None
    body_part_raw: str | None
    modality: str
    body_part: str
    new_modality: str
    new_body_part: str
    reread: str
    window_low: float | None
    window_high: float | None


@dataclass(frozen=True)
class Report:
    """What a remap did. `codes` are distinct pairs of raw codes, `moved` rows of FEATURES by model."""

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
    """A raw code without a term, and how many images have it, by modality: the most frequent modality first."""

    raw: str
    images: int
    modalities: Mapping[str, int]


@dataclass(frozen=True)
class Gaps:
    """What the vocabulary of the settings has no term for, the most frequent first; `images` are all of the lake."""

    vocabulary: str
    images: int
    body_parts: Sequence[Unmapped]
    modalities: Sequence[Unmapped]


# --- transforms ---


def codes(tags: DataFrame) -> DataFrame:
    """Distinct raw codes with the terms that they have now, and counts of images: as many as scanners can write."""
    return tags.groupBy(*_RAW, *_TERMS).count()


def changes(
    found: Iterable[tuple[str | None, str | None, str, str]], vocabulary: Vocabulary, preprocessing: Preprocessing
) -> list[Change]:
    """Of (modality_raw, body_part_raw, modality, body_part) those that get other terms. Runs on the driver.

    A term without a raw code stays: what the object said was no code, so it was not kept.
    """
    changed = []
    for modality_raw, body_part_raw, modality, body_part in found:
        new_modality = modality if modality_raw is None else vocabulary.modality(modality_raw)
        new_body_part = body_part if body_part_raw is None else vocabulary.body_part(body_part_raw)
        if (new_modality, new_body_part) != (modality, body_part):
            old, new = (
                preprocessing.window(*terms) for terms in ((modality, body_part), (new_modality, new_body_part))
            )
            reread = _reread(modality, new_modality, old, new)
            low, high = old if reread == WHERE_USED and old else (None, None)
            changed.append(
                Change(modality_raw, body_part_raw, modality, body_part, new_modality, new_body_part, reread, low, high)
            )
    return changed


def gaps(found: Iterable[tuple[str | None, str | None, int]], vocabulary: Vocabulary) -> Gaps:
    """Of (modality_raw, body_part_raw, images) what has no term, but for what the site itself maps to UNKNOWN."""
    parts: dict[str, Counter[str]] = {}
    modalities: dict[str, Counter[str]] = {}
    total = 0
    for modality_raw, body_part_raw, images in found:
        total += images
        modality = vocabulary.modality(modality_raw)
        if body_part_raw is not None and not vocabulary.is_settled(body_part_raw):
            parts.setdefault(body_part_raw, Counter())[modality] += images
        if modality_raw is not None and modality == UNKNOWN:
            modalities.setdefault(modality_raw, Counter())[modality] += images

    def ranked(counted: Mapping[str, Counter[str]]) -> list[Unmapped]:
        rows = [Unmapped(raw, counts.total(), dict(counts.most_common())) for raw, counts in counted.items()]
        return sorted(rows, key=lambda row: (-row.images, row.raw))

    return Gaps(vocabulary.version, total, ranked(parts), ranked(modalities))


def _reread(modality: str, new_modality: str, old: tuple[float, float] | None, new: tuple[float, float] | None) -> str:
    """Which images need other pixels.

    With the modality the kind of picture and the units change too. Of PET, windows are kept in the image's own units.
    A fixed window is not used where those are unknown, so only images that used the old one would use the new one.
    """
    if modality != new_modality:
        return ALWAYS
    if old == new:
        return NEVER
    return ALWAYS if old is None or modality == "PT" else WHERE_USED


def changed_images(tags: DataFrame, changed: DataFrame) -> DataFrame:
    """Images that get other terms, with their batch: the columns of Change beside image_id, batch and photometric.

    `changed` has the columns of Change; it is small and goes to every task.
    """
    same = [F.col(f"tags.{name}").eqNullSafe(F.col(f"changed.{name}")) for name in (*_RAW, *_TERMS)]
    condition = same[0]
    for each in same[1:]:
        condition &= each
    return (
        tags.alias("tags")
        .join(F.broadcast(changed.alias("changed")), condition, "inner")
        .select(f"tags.{cols.IMAGE_ID}", f"tags.{cols.BATCH}", f"tags.{cols.PHOTOMETRIC}", "changed.*")
    )


def to_reread(images: DataFrame, pixels: DataFrame) -> DataFrame:
    """Of changed images those whose pixels would be others: (image_id). Color has no fixed window."""
    always = images.where((F.col("reread") == ALWAYS) & _may_be_other()).select(cols.IMAGE_ID)
    used = images.where((F.col("reread") == WHERE_USED) & _may_be_other()).select(cols.IMAGE_ID, cols.BATCH, *_WINDOW)
    frames = pixels.select(cols.IMAGE_ID, cols.BATCH, *_WINDOW)
    return always.unionByName(
        frames.join(used, on=[cols.IMAGE_ID, cols.BATCH, *_WINDOW], how="left_semi").select(cols.IMAGE_ID)
    )


def _may_be_other() -> Column:
    return F.col(cols.PHOTOMETRIC).isin(*_GRAY) | (F.col(cols.MODALITY) != F.col(f"new_{cols.MODALITY}"))


def moves(features: DataFrame, tags: DataFrame, minimum: float) -> DataFrame:
    """Rows of FEATURES whose place is not the one that TAGS gives them: their key, place and new place.

    The body part is the tag's where there is one, else the prediction from probability `minimum` on, else UNKNOWN: as
    in features.body_parts. Rows that were without a tag and still are stay where they are.
    """
    terms = tags.select(
        cols.IMAGE_ID,
        F.col(cols.BATCH).alias(cols.PIXELS_BATCH),
        *[F.col(name).alias(f"tag_{name}") for name in _TERMS],
    )
    tag = F.col(f"tag_{cols.BODY_PART}")
    tagged = tag != UNKNOWN
    # Classes are called CHEST or CT/CHEST.
    predicted = F.substring_index(cols.PREDICTED, "/", -1)
    sure = (F.col(cols.PROBABILITY).cast("double") >= minimum) & (predicted != UNKNOWN)
    stays = ~tagged & (F.col(cols.BODY_PART_SOURCE) != cols.FROM_TAG)
    body_part = F.when(tagged, tag).when(stays, F.col(cols.BODY_PART)).when(sure, predicted).otherwise(F.lit(UNKNOWN))
    source = (
        F.when(tagged, cols.FROM_TAG)
        .when(stays, F.col(cols.BODY_PART_SOURCE))
        .when(sure, cols.FROM_PREDICTION)
        .otherwise(F.lit(cols.FROM_NOTHING))
    )
    placed = features.select(*_ROW, *_PLACE, cols.PREDICTED, cols.PROBABILITY).join(
        terms, on=[cols.IMAGE_ID, cols.PIXELS_BATCH], how="inner"
    )
    new = {cols.MODALITY: F.col(f"tag_{cols.MODALITY}"), cols.BODY_PART: body_part, cols.BODY_PART_SOURCE: source}
    moved = placed.select(*_ROW, *_PLACE, *[column.alias(f"new_{name}") for name, column in new.items()])
    other = F.lit(False)
    for name in _PLACE:
        other |= F.col(name) != F.col(f"new_{name}")
    return moved.where(other)


# --- runs ---


def run(spark: SparkSession, settings: Settings) -> Report:
    """Apply `vocabulary` of the settings to a lake; run again it changes nothing.

    TAGS first, then SOURCES, whose commit publishes both and the vocabulary, then each FEATURES table in one commit of
    its own. Killed in between, the next run finishes it. Raises TableError where there is nothing to apply it to, or
    where the `pixels` settings are not those that the lake was made with, Busy while another job writes to the lake.
    """
    lake = LakePaths.of(settings.lake)
    with (
        lease.hold(lake.vault, lease.TABLES, ObjectStore(settings.storage)) as tables,
        lease.hold(lake.vault, lease.INDEX, ObjectStore(settings.storage)) as index,
    ):
        return _run(spark, settings, lake, (tables, index))


def _run(spark: SparkSession, settings: Settings, lake: LakePaths, held: Sequence[lease.Held]) -> Report:
    record = Record.begin("remap")
    vocabulary = Vocabulary(settings.vocabulary.body_parts)
    preprocessing = parse.preprocessing_of(settings)
    pinned = publication.require_published(spark, lake)
    if pinned.preprocessing != preprocessing.version:
        raise TableError(
            f"lake {lake.uri} holds pixels of preprocessing {pinned.preprocessing}, the `pixels` settings give "
            f"{preprocessing.version}: put the settings back, so that it can be said which windows change"
        )
    _check(held)
    publication.roll_back(spark, lake, pinned)
    # Rows of SOURCES are written whole: a table of an older version has to have all columns first.
    if (evolved := delta.evolve(spark, schemas.SOURCES, lake.path(schemas.SOURCES), pinned.message())) is not None:
        pinned = replace(pinned, sources=evolved)
    done = _Done(pinned, 0, 0, 0)
    if pinned.vocabulary != vocabulary.version:
        done = _remap_tags(spark, lake, pinned, vocabulary, preprocessing, record, held)
    with record.stage("features"):
        tags = delta.read(spark, lake.path(schemas.TAGS), done.published.tags)
        tables = _features(spark, lake, settings)
        minimum = settings.index.min_probability
        moved = {name: _move(spark, path, tags, minimum, held) for name, path in tables.items()}
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
        lake,
        counts=counts,
        versions_read={"sources": pinned.sources, "tags": pinned.tags, "pixels": pinned.pixels},
        versions_written={"sources": done.published.sources, "tags": done.published.tags},
    )
    return report


def unmapped(spark: SparkSession, settings: Settings) -> Gaps:
    """The codes of a lake's images that the vocabulary of the settings has no term for; nothing is written."""
    lake = LakePaths.of(settings.lake)
    pinned = publication.require_published(spark, lake)
    found = codes(delta.read(spark, lake.path(schemas.TAGS), pinned.tags)).collect()
    return gaps(
        ((*(row[name] for name in _RAW), row["count"]) for row in found), Vocabulary(settings.vocabulary.body_parts)
    )


@dataclass(frozen=True)
class _Done:
    published: Published
    codes: int
    images: int
    reread: int


def _remap_tags(
    spark: SparkSession,
    lake: LakePaths,
    pinned: Published,
    vocabulary: Vocabulary,
    preprocessing: Preprocessing,
    record: Record,
    held: Sequence[lease.Held],
) -> _Done:
    with record.stage("compare"):
        tags = delta.read(spark, lake.path(schemas.TAGS), pinned.tags)
        found = [tuple(row[name] for name in (*_RAW, *_TERMS)) for row in codes(tags).collect()]
        changed = changes(found, vocabulary, preprocessing)
        table = _as_table(spark, changed)
        images = changed_images(tags, table).persist(StorageLevel.MEMORY_AND_DISK)
        batches = Counter({row[cols.BATCH]: row["count"] for row in images.groupBy(cols.BATCH).count().collect()})
    _check(held)
    with record.stage("write"):
        tags_version = pinned.tags
        if batches:
            inside = f"t.{cols.BATCH} IN ({', '.join(str(batch) for batch in sorted(batches))})"
            tags_version = delta.update_rows(spark, lake.path(schemas.TAGS), table, (*_RAW, *_TERMS), _TERMS, inside)
    with record.stage("publish"):
        pixels = delta.read(spark, lake.path(schemas.PIXELS), pinned.pixels).where(F.col(cols.BATCH).isin(*batches))
        sources = delta.read(spark, lake.path(schemas.SOURCES), pinned.sources).where(
            F.col(cols.OUTCOME) == cols.INGESTED
        )
        marked = sources.join(to_reread(images, pixels), on=cols.IMAGE_ID, how="left_semi")
        marked = marked.withColumn(cols.REASON, F.lit(cols.REREAD)).persist(StorageLevel.MEMORY_AND_DISK)
        reread = marked.count()
        _check(held)
        belongs = replace(pinned, tags=tags_version, vocabulary=vocabulary.version)
        published = (
            publication.publish(spark, lake, marked, belongs)
            if reread
            else publication.publish_without_rows(spark, lake, belongs)
        )
        marked.unpersist()
        images.unpersist()
    return _Done(published, len({c[:2] for c in _codes_of(changed)}), batches.total(), reread)


def _check(held: Sequence[lease.Held]) -> None:
    for each in held:
        each.check()


def _codes_of(changed: Sequence[Change]) -> list[tuple[str | None, str | None]]:
    return [(change.modality_raw, change.body_part_raw) for change in changed]


def _as_table(spark: SparkSession, changed: Sequence[Change]) -> DataFrame:
    text = ", ".join(f"{name} string" for name in (*_RAW, *_TERMS, *(f"new_{name}" for name in _TERMS), "reread"))
    rows = [tuple(vars(change).values()) for change in changed]
    return spark.createDataFrame(rows, f"{text}, {cols.WINDOW_LOW} double, {cols.WINDOW_HIGH} double")


def _features(spark: SparkSession, lake: LakePaths, settings: Settings) -> dict[str, str]:
    """Paths of all FEATURES tables by model."""
    root = storage.join(lake.uri, schemas.FEATURES.name)
    if ObjectStore(settings.storage).kind(root) != "folder":
        return {}
    folders, _ = ObjectStore(settings.storage).list_folder(root)
    named = {folder.rstrip("/").rsplit("/", 1)[1]: folder.rstrip("/") for folder in sorted(folders)}
    return {name: path for name, path in named.items() if delta.exists(spark, path)}


def _move(spark: SparkSession, path: str, tags: DataFrame, minimum: float, held: Sequence[lease.Held]) -> int:
    """Bring the rows of one FEATURES table to their places; how many were elsewhere. Only their partitions are read."""
    moved = moves(delta.read(spark, path, delta.version(spark, path)), tags, minimum).persist(
        StorageLevel.MEMORY_AND_DISK
    )
    places = moved.groupBy(*_TERMS).count().collect()
    if places:
        within = " OR ".join(
            f"(t.{cols.MODALITY} = '{modality}' AND t.{cols.BODY_PART} = '{body_part}')"
            for modality, body_part in sorted((row[cols.MODALITY], row[cols.BODY_PART]) for row in places)
        )
        _check(held)
        delta.update_rows(spark, path, moved, (*_ROW, *_TERMS), _PLACE, within)
    moved.unpersist()
    return sum(row["count"] for row in places)
