"""Read the bytes of a DICOM object: its tags, and its frames as 256×256 gray pictures.

`read_instance` does it for the archive and for queries alike. Nothing that it raises, warns of or logs carries a tag
value; it returns none outside the fields of `Tags`. Runs per task, in the process of decoder.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.filereader import read_dataset

from cbmir_spark.dicom import codecs, gray, suv
from cbmir_spark.dicom.elements import Array, Floats
from cbmir_spark.dicom.preflight import PIXEL_DATA_TAGS, SOP_CLASS, Layout, examine
from cbmir_spark.dicom.preprocessing import Preprocessing
from cbmir_spark.dicom.quiet import quiet
from cbmir_spark.dicom.reasons import NotAnImage, Reason, Rejected
from cbmir_spark.dicom.sop_classes import ENHANCED_MULTIFRAME, MEDIA_DIRECTORY, STORAGE_ROOT, is_image
from cbmir_spark.dicom.stored import JPIP, Stored, describe
from cbmir_spark.dicom.tags import Tags, read_tags
from cbmir_spark.dicom.vocabulary import Vocabulary

__all__ = [
    "Frame",
    "Instance",
    "NotAnImage",
    "Preprocessing",
    "Reason",
    "Rejected",
    "Tags",
    "decode_frames",
    "picture",
    "read_instance",
]


@dataclass(frozen=True)
class Frame:
    """One frame as the network sees it, and its window in the output units of the Modality LUT."""

    number: int  # from 0
    pixels: NDArray[np.uint8]  # (256, 256)
    low: float
    high: float


@dataclass(frozen=True)
class Instance:
    """One SOP instance: its tags and the frames that `Preprocessing.chosen` selects."""

    tags: Tags
    frames: tuple[Frame, ...]


def read_instance(content: bytes | bytearray, preprocessing: Preprocessing, vocabulary: Vocabulary) -> Instance:
    """Read the tags and frames of one object.

    Raises NotAnImage or Rejected with a reason. Any other exception except MemoryError is a bug of this package;
    decoder.py turns both into a rejection of this one file.
    """
    with quiet():
        ds, layout, sop_class = _open(content)
        _check_class(sop_class)
        stored = _stored(ds, layout, sop_class)
        tags = read_tags(ds, stored, sop_class, layout.media_uid, vocabulary)
        wanted = preprocessing.chosen(stored.frames, sop_class in ENHANCED_MULTIFRAME)
        return Instance(tags, tuple(_frames(ds, layout, stored, tags, preprocessing, wanted)))


def decode_frames(content: bytes | bytearray) -> Iterator[Array]:
    """Decode every frame to gray stored values (rows, columns), whatever the object's class or UID.

    Raises NotAnImage or Rejected.
    """
    with quiet():
        ds, layout, sop_class = _open(content)
        stored = _stored(ds, layout, sop_class)
        decoded = codecs.decode(ds, layout, stored, range(stored.frames))
    while True:
        with quiet():
            try:
                _, array, photometric = next(decoded)
            except StopIteration:
                return
            values = gray.luminance(array, photometric, ds, layout.little_endian)
        yield values


def picture(content: bytes | bytearray, frame: int) -> NDArray[np.uint8]:
    """Render one frame for people, never for the network: (256, 256) uint8 with the header's contrast and aspect ratio.

    Crops ultrasound to its regions, because text burned in around them names patients. Raises NotAnImage or Rejected;
    IndexError where the object has no such frame.
    """
    with quiet():
        ds, layout, sop_class = _open(content)
        _check_class(sop_class)
        stored = _stored(ds, layout, sop_class)
        if not 0 <= frame < stored.frames:
            raise IndexError(f"frame {frame} of {stored.frames}")
        _, array, photometric = next(codecs.decode(ds, layout, stored, [frame]))
        stored_gray = gray.luminance(array, photometric, ds, layout.little_endian)
        mask = None
        if photometric in _GRAY:
            mask = gray.padding_mask(stored_gray, stored, ds)
            values = gray.modality_values(stored_gray, ds, frame, layout.little_endian)
            unit = gray.voi(values, mask, ds, frame, layout.little_endian)
        else:
            unit = gray.to_unit(stored_gray.astype(np.float32), 0.0, _full_scale(stored_gray))
        box = gray.crop_box(ds, stored.rows, stored.columns)
        return _finish(unit, mask, ds, stored, frame, "keep", box)


_GRAY = ("MONOCHROME1", "MONOCHROME2")


def _full_scale(luma: Array) -> float:
    """Return the maximum of the smallest depth, 8, 16 or 32 bits, that fits the luma."""
    top = float(luma.max())
    return next((full for full in (255.0, 65535.0, 4294967295.0) if top <= full), top)


def _open(content: bytes | bytearray) -> tuple[Dataset, Layout, str]:
    """Parse everything before the pixel data; return it with the object's layout and its SOP class."""
    layout = examine(content)
    end = min((layout.elements[t].header for t in PIXEL_DATA_TAGS if t in layout.elements), default=len(layout.data))
    header = BytesIO(layout.repaired(layout.start, end))
    try:
        ds = read_dataset(header, layout.implicit, layout.little_endian)
    except RecursionError:
        raise Rejected(Reason.TOO_LARGE, "sequences nested too deep") from None
    except Exception:
        raise Rejected(Reason.MALFORMED, "elements that no parser takes") from None
    _add_elements_behind(ds, layout)
    return ds, layout, layout.text(SOP_CLASS) or layout.media_class


def _add_elements_behind(ds: Dataset, layout: Layout) -> None:
    """Add the elements that some writers put behind the pixel data, unless there is one before."""
    pixels = [layout.elements[tag] for tag in PIXEL_DATA_TAGS if tag in layout.elements]
    last = max((element.header for element in pixels), default=len(layout.data))
    behind = [each.header for each in layout.elements.values() if each.header > last and each.tag < PIXEL_DATA_TAGS[0]]
    if not behind:
        return
    data = BytesIO(layout.repaired(min(behind), len(layout.data)))
    try:
        found = read_dataset(data, layout.implicit, layout.little_endian)
    except Exception:
        return
    for tag in list(found.keys()):
        if tag not in ds:
            ds[tag] = found.get_item(tag)


def _check_class(sop_class: str) -> None:
    if sop_class == MEDIA_DIRECTORY:
        raise NotAnImage(Reason.DICOMDIR)
    if not is_image(sop_class):
        raise NotAnImage(Reason.NOT_IMAGE_CLASS)


def _stored(ds: Dataset, layout: Layout, sop_class: str) -> Stored:
    """Describe the pixel data; raise where there is none, for a reason that depends on the class.

    Every class below the storage root that `_check_class` accepts has pixels by definition (PS3.4 table B.5-1): a
    header alone, or a file that was cut between two elements before its pixels, is rejected. An object of a private
    class, or of none, is not an image.
    """
    if layout.transfer_syntax in JPIP:
        raise Rejected(Reason.UNSUPPORTED, "JPIP: the pixels are at a URL, not in the object")
    if not any(layout.elements[tag].length for tag in PIXEL_DATA_TAGS if tag in layout.elements):
        raise Rejected(Reason.NO_PIXELS) if sop_class.startswith(STORAGE_ROOT) else NotAnImage(Reason.NO_PIXELS)
    return describe(ds, layout)


def _frames(
    ds: Dataset, layout: Layout, stored: Stored, tags: Tags, preprocessing: Preprocessing, wanted: list[int]
) -> Iterator[Frame]:
    factor = suv.suv_factor(ds) if tags.modality == "PT" else None
    box = gray.crop_box(ds, stored.rows, stored.columns)
    for frame, array, photometric in codecs.decode(ds, layout, stored, wanted):
        stored_gray = gray.luminance(array, photometric, ds, layout.little_endian)
        mask = None
        values: Floats
        if photometric in _GRAY:
            mask = gray.padding_mask(stored_gray, stored, ds)
            values = gray.modality_values(stored_gray, ds, frame, layout.little_endian)
            window = _fixed_window(ds, stored, frame, tags, preprocessing, factor)
        else:
            values, window = stored_gray.astype(np.float32, copy=False), None
        inside = _inside(box)
        if window is None:
            window = gray.percentile_window(
                values[inside], None if mask is None else mask[inside], *preprocessing.percentiles
            )
        unit = gray.to_unit(values, *window)
        yield Frame(frame, _finish(unit, mask, ds, stored, frame, preprocessing.aspect, box), *window)


def _fixed_window(
    ds: Dataset, stored: Stored, frame: int, tags: Tags, preprocessing: Preprocessing, factor: float | None
) -> tuple[float, float] | None:
    """Convert the configured window to the units of this frame's values; None where those units are unknown."""
    window = preprocessing.window(tags.modality, tags.body_part)
    if window is None:
        return None
    if tags.modality == "PT":
        return None if factor is None else (window[0] / factor, window[1] / factor)
    if tags.modality == "CT":
        transform = gray.rescale(ds, frame)
        if transform is None or transform[2] not in ("", "HU", "HU_MOD"):
            return None
        # A capture of 8 bits may still have the intercept of the slice that it shows.
        return None if stored.bits_stored <= 8 and abs(transform[0]) <= 1 else window
    return window


def _inside(box: tuple[int, int, int, int] | None) -> tuple[slice, slice]:
    return (slice(None), slice(None)) if box is None else (slice(box[0], box[2]), slice(box[1], box[3]))


def _finish(
    unit: Floats,
    mask: NDArray[np.bool_] | None,
    ds: Dataset,
    stored: Stored,
    frame: int,
    aspect: str,
    box: tuple[int, int, int, int] | None = None,
) -> NDArray[np.uint8]:
    """Turn values from 0 to 1 into the (256, 256) picture: invert, blank the padding, crop, resize, quantize."""
    if stored.photometric == "MONOCHROME1":
        unit = np.float32(1.0) - unit
    if mask is not None:
        unit = np.where(mask, np.float32(0.0), unit)
    return gray.quantize(gray.resize(unit[_inside(box)], gray.pixel_ratio(ds, frame), aspect))
