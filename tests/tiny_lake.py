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

from cbmir_spark import tables as t
from cbmir_spark.config import Settings
from cbmir_spark.pseudonyms import Pseudonyms

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
    return np.clip(stripes + noise, 0, 255).astype(np.uint8)


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
        t.OWNERS[kind]: pseudonym(identifier) if names is None else names.of_kind(kind, identifier)
        for kind, identifier in identifiers(image).items()
    }


def publish(
    spark: SparkSession,
    settings: Settings,
    images: Sequence[Drawn],
    batch: int = 1,
    names: Pseudonyms | None = None,
) -> t.Lake:
    """Write TAGS and PIXELS of the images as one batch and publish it, as ingest does."""
    lake = t.Lake.of(settings)
    key_id = names.key_id if names is not None else KEY_ID
    known = t.published(spark, lake) or t.publish_empty(spark, lake, key_id, PREPROCESSING)
    tags, pixels = [], []
    for image in images:
        ids = owners(image, names)
        image_id = ids[t.IMAGE_ID]
        values = {
            **ids,
            t.MODALITY: image.modality,
            t.BODY_PART: image.body_part,
            t.MODALITY_RAW: image.modality_raw,
            t.BODY_PART_RAW: image.body_part_raw,
            t.KIND: image.kind,
            t.SEX: "F",
            t.AGE_YEARS: 40.0,
            t.YEAR: 2020,
            t.ROWS: 256,
            t.COLUMNS: 256,
            t.FRAMES: image.frames,
            t.PHOTOMETRIC: "MONOCHROME2",
            t.BITS_STORED: 8,
            t.SIGNED: False,
            t.SAMPLES_PER_PIXEL: 1,
            t.TRANSFER_SYNTAX: "1.2.840.10008.1.2.1",
            t.SOP_CLASS: "1.2.840.10008.5.1.4.1.1.7",
            t.BURNED_IN: image.burned_in,
            t.TEXT_RISK: image.text_risk,
            t.BATCH: batch,
        }
        tags.append(tuple(values.get(field.name) for field in t.TAGS.schema))
        for frame in range(image.frames):
            content = draw(image, frame).tobytes()
            digest = hashlib.sha256(content).hexdigest()
            pixels.append((image_id, frame, bytearray(content), PREPROCESSING, *image.window, digest, batch))
    for table in (t.TAGS, t.PIXELS):
        DeltaTable.forPath(spark, lake.path(table)).delete(f"{t.BATCH} = {batch}")
    pinned = dataclasses.replace(
        known,
        batch=batch,
        tags=t.append(spark.createDataFrame(tags, t.TAGS.schema), t.TAGS, lake.path(t.TAGS)),
        pixels=t.append(spark.createDataFrame(pixels, t.PIXELS.schema), t.PIXELS, lake.path(t.PIXELS)),
    )
    now = datetime(2026, 1, 1, tzinfo=UTC)
    sources = [
        {
            t.URI: f"file:///archive/{image.name}.dcm",
            t.SIZE: 1,
            t.MODIFIED: now,
            t.DIGEST: pseudonym("content " + image.name),
            t.OUTCOME: t.INGESTED,
            t.IMAGE_ID: owners(image, names)[t.IMAGE_ID],
            t.KEY_ID: key_id,
            t.BATCH: batch,
        }
        for image in images
    ]
    rows = [tuple(source.get(field.name) for field in t.SOURCES.schema) for source in sources]
    t.publish(spark, lake, spark.createDataFrame(rows, t.SOURCES.schema), pinned)
    return lake
