"""Work out what a changed vocabulary changes in TAGS and FEATURES: pure transforms, without reading the archive.

Modality and body part are looked up again from the raw codes that TAGS stores. Images with equal codes get equal terms,
so the driver maps the distinct codes; joins apply them. Images whose pixels would now get another window are selected,
for the next ingest to read again. In FEATURES rows move to another partition and keep their vectors.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from cbmir_spark.dicom.preprocessing import Preprocessing
from cbmir_spark.dicom.vocabulary import Vocabulary
from cbmir_spark.dicom.vocabulary_tables import UNKNOWN
from cbmir_spark.lake import columns as cols

RAW = (cols.MODALITY_RAW, cols.BODY_PART_RAW)
TERMS = (cols.MODALITY, cols.BODY_PART)
PLACE = (*TERMS, cols.BODY_PART_SOURCE)
ROW = (cols.IMAGE_ID, cols.FRAME, cols.PIXELS_BATCH)
WINDOW = (cols.WINDOW_LOW, cols.WINDOW_HIGH)
_GRAY = ("MONOCHROME1", "MONOCHROME2")
NEVER, WHERE_USED, ALWAYS = "never", "where_used", "always"


@dataclass(frozen=True)
class Change:
    """The new terms of all images with the same codes and terms.

    `reread` selects those that need other pixels: NEVER, ALWAYS, or WHERE_USED, those made with `window_low` to
    `window_high`.
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


def codes(tags: DataFrame) -> DataFrame:
    """Count images by raw codes and current terms; as many rows as scanners write different codes."""
    return tags.groupBy(*RAW, *TERMS).count()


def changes(
    found: Iterable[tuple[str | None, str | None, str, str]], vocabulary: Vocabulary, preprocessing: Preprocessing
) -> list[Change]:
    """Find the changes among (modality_raw, body_part_raw, modality, body_part). Runs on the driver.

    A term without a raw code does not change: the object's value was no code, so it was not stored.
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


def _reread(modality: str, new_modality: str, old: tuple[float, float] | None, new: tuple[float, float] | None) -> str:
    """Select the images that need other pixels.

    Another modality changes the kind of picture and the units. PET windows are stored in the units of the image. A
    fixed window is not used where the units are unknown, so only images that used the old one would use the new one.
    """
    if modality != new_modality:
        return ALWAYS
    if old == new:
        return NEVER
    return ALWAYS if old is None or modality == "PT" else WHERE_USED


def changed_images(tags: DataFrame, changed: DataFrame) -> DataFrame:
    """Select the images that get other terms: image_id, batch, photometric and the columns of Change.

    `changed` has the columns of Change; it is small and goes to every task.
    """
    same = [F.col(f"tags.{name}").eqNullSafe(F.col(f"changed.{name}")) for name in (*RAW, *TERMS)]
    condition = same[0]
    for each in same[1:]:
        condition &= each
    return (
        tags.alias("tags")
        .join(F.broadcast(changed.alias("changed")), condition, "inner")
        .select(f"tags.{cols.IMAGE_ID}", f"tags.{cols.BATCH}", f"tags.{cols.PHOTOMETRIC}", "changed.*")
    )


def to_reread(images: DataFrame, pixels: DataFrame) -> DataFrame:
    """Select the changed images that need other pixels: (image_id). Color has no fixed window."""
    always = images.where((F.col("reread") == ALWAYS) & _may_be_other()).select(cols.IMAGE_ID)
    used = images.where((F.col("reread") == WHERE_USED) & _may_be_other()).select(cols.IMAGE_ID, cols.BATCH, *WINDOW)
    frames = pixels.select(cols.IMAGE_ID, cols.BATCH, *WINDOW)
    return always.unionByName(
        frames.join(used, on=[cols.IMAGE_ID, cols.BATCH, *WINDOW], how="left_semi").select(cols.IMAGE_ID)
    )


def _may_be_other() -> Column:
    return F.col(cols.PHOTOMETRIC).isin(*_GRAY) | (F.col(cols.MODALITY) != F.col(f"new_{cols.MODALITY}"))


def moves(features: DataFrame, tags: DataFrame, minimum: float) -> DataFrame:
    """Select the rows of FEATURES whose place differs from the one that TAGS gives them: key, place and new place.

    The body part is the tag's where there is one, else the prediction from probability `minimum` on, else UNKNOWN: as
    in `index.embed.body_parts`. Rows that had no tag and still have none do not move.
    """
    terms = tags.select(
        cols.IMAGE_ID,
        F.col(cols.BATCH).alias(cols.PIXELS_BATCH),
        *[F.col(name).alias(f"tag_{name}") for name in TERMS],
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
    placed = features.select(*ROW, *PLACE, cols.PREDICTED, cols.PROBABILITY).join(
        terms, on=[cols.IMAGE_ID, cols.PIXELS_BATCH], how="inner"
    )
    new = {cols.MODALITY: F.col(f"tag_{cols.MODALITY}"), cols.BODY_PART: body_part, cols.BODY_PART_SOURCE: source}
    moved = placed.select(*ROW, *PLACE, *[column.alias(f"new_{name}") for name, column in new.items()])
    other = F.lit(False)
    for name in PLACE:
        other |= F.col(name) != F.col(f"new_{name}")
    return moved.where(other)
