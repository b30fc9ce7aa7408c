"""What each revision of the reader changed, and which objects of a lake it may read in another way.

Pure: conditions in SQL on what SOURCES, TAGS and PIXELS know of an object. A condition that cannot tell selects too
many objects rather than too few: reading one again that does not change costs time and writes nothing.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from cbmir_spark.dicom.preprocessing import Preprocessing
from cbmir_spark.dicom.stored import NATIVE
from cbmir_spark.errors import InputError
from cbmir_spark.lake import columns as cols

__all__ = ["CHANGES", "MAY_CHANGE", "PATIENTS", "Change", "chosen", "fixed_windows", "may_change", "objects_of"]

# Names of the changes that select an object.
MAY_CHANGE = "may_change"
_FIXED = "fixed_window"
_FIXED_ENDS = ("fixed_low", "fixed_high")


@dataclass(frozen=True)
class Change:
    """One change of the reader: its name, its revision, what it corrects, and the objects that it may concern.

    `where` is SQL about the objects with one of the `outcomes`.
    """

    name: str
    revision: int
    what: str
    where: str
    outcomes: tuple[str, ...] = (cols.INGESTED,)


def _in(values: Iterable[str]) -> str:
    return f"({', '.join(repr(value) for value in values)})"


# Beside the revisions: a lake whose rule for patients differs from the settings. The tables do not show which IDs were
# cut and which issuers ignored.
PATIENTS = Change("patients", 0, "what identifies a patient: the whole Patient ID, and its issuer", "true")

_REFUSED_BEFORE_2 = (
    "NOT_DICOM",
    "NO_PIXELS",
    "TRUNCATED",
    "MALFORMED",
    "NO_UID",
    "UNSUPPORTED",
    "UNDECODABLE",
    "CRASHED",
)

CHANGES = (
    Change(
        "codestreams",
        2,
        "compressed frames have to match their header; sign, planes and exchanged sides are the codestream's",
        f"{cols.TRANSFER_SYNTAX} NOT IN {_in(NATIVE)}",
    ),
    Change(
        "units",
        2,
        "a rescale with one half or a decimal comma counts, so does the padding of floats; captures of CT with 8 bits "
        "have no Hounsfield units",
        f"{cols.PHOTOMETRIC} LIKE 'MONOCHROME%' "
        f"AND (NOT {_FIXED} OR {cols.BITS_STORED} <= 8 OR {cols.BITS_STORED} >= 32)",
    ),
    Change(
        "colors",
        2,
        "palettes of bytes, and YBR_FULL_422 stored at full length",
        f"{cols.PHOTOMETRIC} IN ('PALETTE COLOR', 'YBR_FULL_422')",
    ),
    Change(
        "tags",
        2,
        "decimal commas, elements behind the pixel data, Acquisition DateTime, placeholders of age and birth",
        " OR ".join(
            [
                f"{cols.AGE_YEARS} >= 90",
                f"{cols.MODALITY} = 'UNKNOWN'",
                *(
                    f"{name} IS NULL"
                    for name in (
                        cols.PIXEL_SPACING_ROW,
                        cols.SLICE_THICKNESS,
                        cols.AGE_YEARS,
                        cols.YEAR,
                        cols.SEX,
                        cols.BODY_PART_RAW,
                    )
                ),
            ]
        ),
    ),
    # Objects that this revision may accept, or give another reason.
    Change(
        "refused",
        2,
        "objects that were refused before",
        f"{cols.REASON} IN {_in(_REFUSED_BEFORE_2)}",
        (cols.REJECTED, cols.NOT_AN_IMAGE),
    ),
)


def chosen(skip: Collection[str]) -> tuple[Change, ...]:
    """Select the changes that are not skipped. Raises InputError for a name that no change has."""
    known = (*CHANGES, PATIENTS)
    if unknown := sorted(set(skip) - {change.name for change in known}):
        raise InputError(f"no change is called {', '.join(unknown)}: give {', '.join(change.name for change in known)}")
    return tuple(change for change in known if change.name not in skip)


def fixed_windows(
    places: Iterable[tuple[str, str]], preprocessing: Preprocessing
) -> list[tuple[str, str, float, float]]:
    """Make rows (modality, body_part, low, high) of the fixed windows, except PET's, which depend on the image."""
    found = []
    for modality, body_part in places:
        window = preprocessing.window(modality, body_part)
        if window is not None and modality != "PT":
            found.append((modality, body_part, *window))
    return found


FIXED_WINDOWS_SCHEMA = f"{cols.MODALITY} string, {cols.BODY_PART} string, {' double, '.join(_FIXED_ENDS)} double"


def objects_of(sources: DataFrame, tags: DataFrame, pixels: DataFrame, windows: DataFrame) -> DataFrame:
    """Join what is known of each object: columns of SOURCES and TAGS, and whether its pixels have the fixed window.

    They have it if all frames have. `windows` are rows of `fixed_windows`; broadcast. Of PIXELS the columns of the
    window are read.
    """
    ends = (cols.WINDOW_LOW, cols.WINDOW_HIGH)
    seen = pixels.groupBy(cols.IMAGE_ID).agg(
        *[F.min(end).alias(end) for end in ends],
        *[(F.min(end) == F.max(end)).alias(f"one_{end}") for end in ends],
    )
    images = (
        tags.drop(cols.BATCH)
        .join(seen, on=cols.IMAGE_ID, how="left")
        .join(F.broadcast(windows), on=[cols.MODALITY, cols.BODY_PART], how="left")
    )
    # Of an image with several frames each may have a window of its own.
    same = [F.col(f"one_{end}") & (F.col(end) == F.col(fixed)) for end, fixed in zip(ends, _FIXED_ENDS, strict=True)]
    fixed = same[0] & same[1]
    known = sources.select(cols.URI, cols.OUTCOME, cols.REASON, cols.IMAGE_ID, cols.REVISION)
    return known.join(images, on=cols.IMAGE_ID, how="left").withColumn(_FIXED, F.coalesce(fixed, F.lit(False)))


def may_change(objects: DataFrame, changes: Iterable[Change]) -> DataFrame:
    """Select the objects that a change of a later revision than theirs may concern: (uri, may_change)."""
    revision = F.coalesce(F.col(cols.REVISION), F.lit(1))
    names = F.array_compact(F.array(*[F.when(_concerned(each, revision), each.name) for each in changes]))
    return objects.select(cols.URI, names.alias(MAY_CHANGE)).where(F.size(MAY_CHANGE) > 0)


def _concerned(change: Change, revision: Column) -> Column:
    here = F.col(cols.OUTCOME).isin(*change.outcomes) & F.expr(change.where)
    return here if change is PATIENTS else here & (revision < change.revision)
