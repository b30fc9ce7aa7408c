"""Training snapshots: TAGS ⋈ PIXELS at the published versions, labelled, split by patient, and written once.

<lake>/snapshots/<digest>/{train,validation,test}/part-00000.parquet …   shuffled rows, small row groups
<lake>/snapshots/<digest>/manifest.json                                  written last: it makes the rest count
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence

import pandas as pd
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from cbmir_spark import storage
from cbmir_spark.config import Choice, DatasetSettings
from cbmir_spark.errors import TrainingError
from cbmir_spark.lake import columns as cols
from cbmir_spark.lake import schemas
from cbmir_spark.lake.conform import add_missing_columns
from cbmir_spark.lake.open import OpenLake
from cbmir_spark.models.artifact import UNKNOWN, LabelKind
from cbmir_spark.training.manifest import (
    FORMAT,
    IMAGES,
    KEY,
    LABEL,
    MANIFEST,
    OWNERS,
    SPLIT,
    SPLITS,
    TEST,
    VALIDATION,
    Snapshot,
)
from cbmir_spark.training.snapshot_files import write_files
from cbmir_spark.training.split import split_patients


def labelled(tags: DataFrame, label: LabelKind, burned_in: Choice = "exclude") -> Callable[[DataFrame], DataFrame]:
    """PIXELS → the frames that may be learned from, each with its label.

    Only kind `image` (no localizers, screens, whole slides), none with a risk of burned-in text unless the policy
    (dicom/burned_in.py) includes them, and no UNKNOWN in the label: UNKNOWN is never a class.
    """
    known = F.col(cols.BODY_PART) != UNKNOWN
    name: Column = F.col(cols.BODY_PART)
    if label == "modality/body_part":
        known &= F.col(cols.MODALITY) != UNKNOWN
        name = F.concat_ws("/", cols.MODALITY, cols.BODY_PART)
    if burned_in == "exclude":
        known &= F.col(cols.TEXT_RISK).eqNullSafe(F.lit(False))
    usable = (
        add_missing_columns(tags, schemas.TAGS)
        .where((F.col(cols.KIND) == cols.IMAGE_KIND) & known)
        .select(cols.IMAGE_ID, cols.BATCH, *OWNERS, cols.MODALITY, name.alias(LABEL))
    )

    def apply(pixels: DataFrame) -> DataFrame:
        return pixels.join(usable, on=[cols.IMAGE_ID, cols.BATCH], how="inner").select(
            cols.IMAGE_ID,
            cols.FRAME,
            *OWNERS,
            cols.MODALITY,
            LABEL,
            cols.PIXEL_DIGEST,
            cols.PIXELS_COLUMN,
        )

    return apply


def write_snapshot(lake: OpenLake, settings: DatasetSettings, burned_in: Choice = "exclude") -> Snapshot:
    """Write the snapshot of the published versions, or find it where the same rows were written before.

    The driver sees one row for each patient and label; frames are sorted and written by tasks. Raises
    TrainingError where nothing can be learned from, there are fewer than two classes, or a split that was asked
    for stays empty.
    """
    published = lake.versions
    frames = lake.pixels.transform(labelled(lake.tags, settings.label, burned_in))
    counted: pd.DataFrame = (
        frames.groupBy(cols.PATIENT_ID, cols.MODALITY, LABEL).agg(F.count(F.lit(1)).alias(IMAGES)).toPandas()
    )
    if counted.empty:
        raise TrainingError(
            f"lake {lake.paths.uri} has no frame to learn from: every body part is UNKNOWN, or no row is a plain image "
            "without burned-in text; see vocabulary.body_parts and privacy.burned_in in the settings"
        )
    totals = counted.groupby(LABEL)[IMAGES].sum()
    left_out = {str(label): int(n) for label, n in totals.items() if n < settings.min_images}
    used = counted[~counted[LABEL].isin(list(left_out))]
    classes = tuple(sorted(used[LABEL].unique()))
    if len(classes) < 2:
        raise TrainingError(
            f"{len(classes)} class(es) with dataset.min_images={settings.min_images} frames or more"
            f" ({', '.join(classes) or 'none'}); too few: {_listed(left_out)}. Two are needed"
        )
    side = split_patients(used, settings.test_fraction, settings.validation_fraction, settings.seed)
    _check_splits(side, settings)
    used = used.assign(**{SPLIT: used[cols.PATIENT_ID].map(side)})
    rows = {name: int(used.loc[used[SPLIT] == name, IMAGES].sum()) for name in SPLITS}
    sides = lake.spark.createDataFrame(pd.DataFrame(sorted(side.items()), columns=[cols.PATIENT_ID, SPLIT]))
    chosen = (
        frames.where(F.col(LABEL).isin(list(classes)))
        .join(F.broadcast(sides), on=cols.PATIENT_ID, how="inner")
        .withColumn(KEY, F.sha2(F.concat_ws(":", F.lit(settings.seed), cols.IMAGE_ID, cols.FRAME), 256))
    )
    digest = _digest(chosen, settings, classes, published.preprocessing)
    uri = lake.paths.snapshot(digest)
    manifest = storage.join(uri, MANIFEST)
    if lake.store.kind(manifest) == "file":
        return Snapshot.from_json(lake.store.read_bytes(manifest), uri)
    patients_of = used.groupby(LABEL)[cols.PATIENT_ID].nunique()
    written = Snapshot(
        format=FORMAT,
        digest=digest,
        uri=uri,
        label=settings.label,
        classes=classes,
        possible={
            str(modality): tuple(sorted(group[LABEL].unique())) for modality, group in used.groupby(cols.MODALITY)
        },
        preprocessing=published.preprocessing,
        images={
            name: {str(k): int(n) for k, n in used[used[SPLIT] == name].groupby(LABEL)[IMAGES].sum().items()}
            for name in SPLITS
        },
        patients={name: sum(where == name for where in side.values()) for name in SPLITS},
        single_patient_classes=tuple(str(label) for label, n in patients_of.items() if n == 1),
        left_out=left_out,
        versions={"sources": published.sources, "tags": published.tags, "pixels": published.pixels},
        files=write_files(chosen, uri, rows, classes, settings.rows_per_group, lake.store),
    )
    lake.store.write_bytes(manifest, written.to_json().encode())
    return written


def _check_splits(side: Mapping[str, str], settings: DatasetSettings) -> None:
    for name, fraction in ((TEST, settings.test_fraction), (VALIDATION, settings.validation_fraction)):
        if fraction > 0 and name not in side.values():
            raise TrainingError(
                f"the {name} split is empty: no class has enough patients ({len(side)} in all) to hold one out; "
                f"set dataset.{name}_fraction=0 or ingest more patients"
            )


def _digest(chosen: DataFrame, settings: DatasetSettings, classes: Sequence[str], preprocessing: str) -> str:
    """Name the snapshot by its rows, their sides and its layout; reads no pixels.

    Tasks hash the rows, and the hashes are added up, so that their order does not matter.
    """
    row = F.sha2(F.concat_ws("|", SPLIT, LABEL, cols.IMAGE_ID, cols.FRAME, cols.PIXEL_DIGEST), 256)
    words = [
        F.sum(F.conv(F.substring("row", 1 + 15 * word, 15), 16, 10).cast("decimal(20,0)")).alias(f"w{word}")
        for word in range(4)
    ]
    sums = chosen.select(row.alias("row")).agg(F.count(F.lit(1)).alias(IMAGES), *words).collect()[0]
    hashed = {
        "format": FORMAT,
        "label": settings.label,
        "classes": list(classes),
        "preprocessing": preprocessing,
        "seed": settings.seed,
        "rows_per_group": settings.rows_per_group,
        "rows": [str(value) for value in sums],
    }
    return hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()[:32]


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{label} ({n})" for label, n in sorted(counts.items())) or "none"
