"""A published lake of a few drawn frames, for tests that begin where ingest ends."""

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
from delta.tables import DeltaTable
from numpy.typing import NDArray
from pyspark.sql import SparkSession

from cbmir_spark.config import Settings
from cbmir_spark.errors import ConfigError
from cbmir_spark.lake import columns as cols
from cbmir_spark.lake import delta, pseudonyms, publication, schemas
from cbmir_spark.lake.delta import TableVersion
from cbmir_spark.lake.paths import LakePaths
from cbmir_spark.lake.pseudonyms import Pseudonyms

PREPROCESSING = "px1-test"
KEY_ID = "test"


@dataclass(frozen=True)
class Drawn:
    """One image to be: its frames come from `draw`."""

    name: str
    patient: str
    modality: str
    body_part: str
    kind: str = "image"
    burned_in: str = "NO"
    frames: int = 1
    modality_raw: str | None = None
    body_part_raw: str | None = None
    window: tuple[float, float] = (0.0, 255.0)
    looks: str | None = None  # what is drawn, where it is not told by modality and body part
    text_risk: bool | None = False


def pseudonym(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def draw(image: Drawn, frame: int) -> NDArray[np.uint8]:
    """(256, 256) uint8: stripes whose direction and width belong to modality and body part, and noise."""
    label = hashlib.sha256((image.looks or f"{image.modality}/{image.body_part}").encode()).digest()
    rows, columns = np.mgrid[0:256, 0:256]
    angle, width = label[0] / 40.0, 6.0 + label[1] % 24
    stripes = 90.0 * np.sin((rows * np.cos(angle) + columns * np.sin(angle)) / width) + 128.0
    own = int.from_bytes(hashlib.sha256(f"{image.name}:{frame}".encode()).digest()[:4], "big")
    noise = np.random.default_rng(own).normal(0.0, 12.0, stripes.shape)
    drawn: NDArray[np.uint8] = np.clip(stripes + noise, 0, 255).astype(np.uint8)
    return drawn


def identifiers(image: Drawn) -> dict[str, str]:
    """What `owners` are the pseudonyms of, by kind."""
    return {
        "image": image.name,
        "series": "series " + image.name,
        "study": "study " + image.patient,
        "patient": image.patient,
    }


def owners(image: Drawn, names: Pseudonyms | None = None) -> dict[str, str]:
    """An image's pseudonyms by column: keyed ones where there is a key."""
    return {
        schemas.OWNERS[kind]: pseudonym(identifier) if names is None else names.of_kind(kind, identifier)
        for kind, identifier in identifiers(image).items()
    }


def key_of(settings: Settings) -> str:
    """The id of the lake's key, which is made where a local vault has none; KEY_ID where no key is at hand."""
    vault = LakePaths.of(settings.lake).vault_folder
    try:
        return pseudonyms.create(settings.privacy, vault).key_id
    except ConfigError:
        return KEY_ID


def live_files(spark: SparkSession, path: str, version: int | None = None) -> list[str]:
    """URIs of the Parquet files that are live in a Delta table, sorted; at the newest version if none is given."""
    return list(TableVersion(spark, path, delta.version(spark, path) if version is None else version).files)


def publish(
    spark: SparkSession,
    settings: Settings,
    images: Sequence[Drawn],
    batch: int = 1,
    names: Pseudonyms | None = None,
) -> LakePaths:
    """Write TAGS and PIXELS of the images as one batch and publish it, as ingest does."""
    lake = LakePaths.of(settings.lake)
    key_id = names.key_id if names is not None else key_of(settings)
    known = publication.published(spark, lake) or publication.publish_empty(spark, lake, key_id, PREPROCESSING)
    tags, pixels = [], []
    for image in images:
        ids = owners(image, names)
        image_id = ids[cols.IMAGE_ID]
        values = {
            **ids,
            cols.MODALITY: image.modality,
            cols.BODY_PART: image.body_part,
            cols.MODALITY_RAW: image.modality_raw,
            cols.BODY_PART_RAW: image.body_part_raw,
            cols.KIND: image.kind,
            cols.SEX: "F",
            cols.AGE_YEARS: 40.0,
            cols.YEAR: 2020,
            cols.ROWS: 256,
            cols.COLUMNS: 256,
            cols.FRAMES: image.frames,
            cols.PHOTOMETRIC: "MONOCHROME2",
            cols.BITS_STORED: 8,
            cols.SIGNED: False,
            cols.SAMPLES_PER_PIXEL: 1,
            cols.TRANSFER_SYNTAX: "1.2.840.10008.1.2.1",
            cols.SOP_CLASS: "1.2.840.10008.5.1.4.1.1.7",
            cols.BURNED_IN: image.burned_in,
            cols.TEXT_RISK: image.text_risk,
            cols.BATCH: batch,
        }
        tags.append(tuple(values.get(field.name) for field in schemas.TAGS.schema))
        for frame in range(image.frames):
            content = draw(image, frame).tobytes()
            digest = hashlib.sha256(content).hexdigest()
            pixels.append((image_id, frame, bytearray(content), PREPROCESSING, *image.window, digest, batch))
    for table in (schemas.TAGS, schemas.PIXELS):
        DeltaTable.forPath(spark, lake.path(table)).delete(f"{cols.BATCH} = {batch}")
    pinned = dataclasses.replace(
        known,
        batch=batch,
        tags=delta.append(spark.createDataFrame(tags, schemas.TAGS.schema), schemas.TAGS, lake.path(schemas.TAGS)),
        pixels=delta.append(
            spark.createDataFrame(pixels, schemas.PIXELS.schema), schemas.PIXELS, lake.path(schemas.PIXELS)
        ),
    )
    now = datetime(2026, 1, 1, tzinfo=UTC)
    sources = [
        {
            cols.URI: f"file:///archive/{image.name}.dcm",
            cols.SIZE: 1,
            cols.MODIFIED: now,
            cols.DIGEST: pseudonym("content " + image.name),
            cols.OUTCOME: cols.INGESTED,
            cols.IMAGE_ID: owners(image, names)[cols.IMAGE_ID],
            cols.KEY_ID: key_id,
            cols.BATCH: batch,
        }
        for image in images
    ]
    rows = [tuple(source.get(field.name) for field in schemas.SOURCES.schema) for source in sources]
    publication.publish(spark, lake, spark.createDataFrame(rows, schemas.SOURCES.schema), pinned)
    return lake
