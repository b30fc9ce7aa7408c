"""Turn stored pixel values into gray pictures: small pure functions of numpy arrays and header elements.

They follow the Standard's pipeline (PS3.4 section N.2, PS3.3 sections C.7.6.3, C.11.1 and C.11.2): stored values, color
to luma, Modality LUT, a window to the range 0 to 1; read.py applies them in this order and inverts MONOCHROME1. Arrays
are (rows, columns), or (rows, columns, 3) before `luminance`.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydicom.dataset import Dataset

from cbmir_spark.dicom.elements import Array, Floats, functional_group, is_given, items, number, numbers, value
from cbmir_spark.dicom.reasons import Reason, Rejected
from cbmir_spark.dicom.stored import Stored

SIDE = 256  # of a picture, in pixels


# --- color to luma ---


def luminance(array: Array, photometric: str, ds: Dataset, little_endian: bool) -> Array:
    """Convert a decoded frame to (rows, columns): gray unchanged, color as luma (float32, 0 to the largest sample).

    Raises Rejected (MALFORMED) for a palette that cannot be applied.
    """
    if photometric == "PALETTE COLOR":
        return _palette_luma(array, ds, little_endian)
    if array.ndim == 2:
        return array
    if photometric == "RGB":
        return _luma(array[..., 0], array[..., 1], array[..., 2])
    luma: Array = array[..., 0].astype(np.float32)
    if photometric.startswith("YBR_PARTIAL"):
        # PS3.3 section C.7.6.3.1.2 (retired): Y runs from 16 to 235.
        luma = (luma - 16.0) * np.float32(255.0 / 219.0)
    return luma


def _palette_luma(array: Array, ds: Dataset, little_endian: bool) -> Floats:
    """Apply the palette (PS3.3 sections C.7.6.3.1.5 and .6): indices outside it take its first or last entry."""
    colors = []
    for color in ("Red", "Green", "Blue"):
        descriptor = numbers(ds, f"{color}PaletteColorLookupTableDescriptor")
        if len(descriptor) != 3:
            raise Rejected(Reason.MALFORMED, "a palette without a descriptor of three numbers")
        entries, first, bits = (int(x) for x in descriptor)
        entries = entries % 2**16 or 2**16
        plain = value(ds, f"{color}PaletteColorLookupTableData")
        if plain is not None:
            table = _table(plain, entries, bits, little_endian)
        else:
            segments = value(ds, f"Segmented{color}PaletteColorLookupTableData")
            table = _segmented(_table(segments, None, bits, little_endian), entries, wide=bits > 8)
        colors.append(table)
    length = min(map(len, colors))
    if length == 0:
        raise Rejected(Reason.MALFORMED, "an empty palette")
    if array.dtype.kind == "i" and first >= 2**15:
        first -= 2**16
    index = np.clip(array.astype(np.int64) - first, 0, length - 1)
    luma: Floats = _luma(*(table[:length] for table in colors))[index]
    return luma


# ITU-R BT.601, the luma of YBR_FULL (PS3.3 section C.7.6.3.1.2): Y needs no conversion back to RGB.
_RED, _GREEN, _BLUE = np.float32(0.299), np.float32(0.587), np.float32(0.114)


def _luma(red: Array, green: Array, blue: Array) -> Floats:
    # Element by element: the order of sums in a matrix product depends on the machine's threads.
    luma = red * _RED + green * _GREEN + blue * _BLUE
    return luma.astype(np.float32, copy=False)  # type: ignore[no-any-return, unused-ignore]


def _table(raw: Any, entries: int | None, bits: int, little_endian: bool) -> Array:
    """Read the values of a lookup table, from bytes (OW) or numbers (US, SS), as unsigned integers."""
    if raw is None:
        raise Rejected(Reason.MALFORMED, "a lookup table without data")
    if not isinstance(raw, bytes | bytearray | memoryview):
        many = raw if isinstance(raw, Sequence) else [raw]
        return np.array([int(x) for x in many], dtype=np.int64)[:entries] & 0xFFFF
    if bits > 8 and entries is not None and len(raw) in (entries, entries + entries % 2):
        # The length tells that entries are bytes, whatever the descriptor says.
        return np.frombuffer(bytes(raw), dtype=np.uint8)[:entries]
    words = np.dtype("<u2" if little_endian else ">u2")
    if bits <= 8 and (entries is None or len(raw) < 2 * entries):
        # Two entries in each 16-bit word, the first one in its low byte.
        packed = np.frombuffer(bytes(raw), dtype=np.uint8)
        return (packed if little_endian else packed[: len(packed) // 2 * 2].reshape(-1, 2)[:, ::-1].reshape(-1))[
            :entries
        ]
    return np.frombuffer(bytes(raw)[: len(raw) // 2 * 2], dtype=words)[:entries].astype(np.int64)


def _segmented(words: Array, entries: int, wide: bool) -> Array:
    """Expand the discrete, linear and indirect segments of a palette (PS3.3 section C.7.9.2)."""
    out: list[int] = []
    data = [int(x) for x in words]
    at = 0
    try:
        while at < len(data) and len(out) < entries:
            if data[at] != 2:
                at = _segment(data, at, out)
                continue
            # Indirect: repeat so many segments from a byte offset in 32 bits, low word (or byte) first.
            offset = data[at + 2] | data[at + 3] << 16 if wide else sum(data[at + 2 + k] << 8 * k for k in range(4))
            source = offset // 2 if wide else offset
            for _ in range(data[at + 1]):
                # An indirect segment can repeat thousands of 65535 entries each: stop where the table is full.
                if len(out) >= entries:
                    break
                source = _segment(data, source, out)
            at += 4 if wide else 6
    except IndexError:
        raise Rejected(Reason.MALFORMED, "a segmented palette that breaks off") from None
    return np.array(out[:entries], dtype=np.int64)


def _segment(data: list[int], at: int, out: list[int]) -> int:
    """Append a discrete or linear segment to `out`; return where the next one starts, raise IndexError if malformed."""
    opcode, length = data[at], data[at + 1]
    if opcode == 0:
        values = data[at + 2 : at + 2 + length]
        if len(values) < length:
            raise IndexError
        out.extend(values)
        return at + 2 + length
    if opcode != 1 or not out:
        raise IndexError
    last, target = out[-1], data[at + 2]
    out.extend(round(last + (target - last) * (k + 1) / length) for k in range(length))
    return at + 3


# --- stored values to output values ---


def padding_mask(array: Array, stored: Stored, ds: Dataset) -> NDArray[np.bool_] | None:
    """Mark the padding of a gray frame (PS3.3 section C.7.5.1.1.2); None where there is none.

    Pixel Padding Value is a stored value; with a Range Limit all values between the two are padding. Those of floats
    are elements of their own (sections C.7.6.24 to C.7.6.26).
    """
    if array.dtype.kind == "f":
        return _float_padding(array, stored, ds)
    pad = number(ds, "PixelPaddingValue")
    if pad is None or stored.samples != 1 or stored.photometric == "PALETTE COLOR" or array.dtype.kind not in "ui":
        return None
    limit = number(ds, "PixelPaddingRangeLimit")
    ends = sorted(_as_stored(int(x), stored) for x in (pad, pad if limit is None else limit))
    mask: NDArray[np.bool_] = array == ends[0] if ends[0] == ends[1] else (array >= ends[0]) & (array <= ends[1])
    return mask if mask.any() else None


def _float_padding(array: Array, stored: Stored, ds: Dataset) -> NDArray[np.bool_] | None:
    kind = stored.keyword.removesuffix("PixelData")
    pad, limit = number(ds, f"{kind}PixelPaddingValue"), number(ds, f"{kind}PixelPaddingRangeLimit")
    if pad is None:
        return None
    # A value of the header may have more digits than the pixels.
    low, high = (array.dtype.type(end) for end in sorted((pad, pad if limit is None else limit)))
    mask: NDArray[np.bool_] = (array >= low) & (array <= high)
    return mask if mask.any() else None


def _as_stored(padding: int, stored: Stored) -> int:
    """Convert a padding value to the signedness of the pixels: some writers give -2000 as 63536, or the reverse."""
    span = 1 << stored.bits_allocated
    if stored.signed and padding >= span // 2:
        return padding - span
    return padding + span if not stored.signed and padding < 0 else padding


def rescale(ds: Dataset, frame: int) -> tuple[float, float, str] | None:
    """Return slope, intercept and Rescale Type ("" where absent) of a frame; None where it has no rescale.

    Reads the Modality LUT module (PS3.3 section C.11.1), or the Pixel Value Transformation functional group of
    enhanced objects (section C.7.6.16.2.9).
    """
    group = functional_group(ds, frame, "PixelValueTransformationSequence")
    halves = []
    for keyword in ("RescaleSlope", "RescaleIntercept"):
        source = group if group is not None and is_given(group, keyword) else ds
        halves.append(number(source, keyword))
        if halves[-1] is None and is_given(source, keyword):
            # Something that is no number: the units are unknown.
            return None
    slope, intercept = halves
    if (slope is None and intercept is None) or slope == 0:
        return None
    # Of some objects one half is missing or empty, where it changes nothing.
    slope, intercept = 1.0 if slope is None else slope, intercept or 0.0
    return slope, intercept, str(value(ds if group is None else group, "RescaleType") or "").strip().upper()


def modality_values(array: Array, ds: Dataset, frame: int, little_endian: bool) -> Floats:
    """Apply the Modality LUT: stored values to output units such as Hounsfield units (float32)."""
    if lut := items(ds, "ModalityLUTSequence"):
        return _lut(array, lut[0], little_endian)
    transform = rescale(ds, frame)
    if transform is None:
        return array.astype(np.float32)
    slope, intercept, _ = transform
    # In float64: before the rescale, 32-bit stored values do not fit into the 24 bits of a float32.
    return (array * np.float64(slope) + intercept).astype(np.float32)


def _lut(array: Array, item: Dataset, little_endian: bool) -> Floats:
    """Apply a LUT item (PS3.3 sections C.11.1.1, C.11.2.1.1): values outside the table take the first or last entry."""
    descriptor = numbers(item, "LUTDescriptor")
    if len(descriptor) != 3:
        raise Rejected(Reason.MALFORMED, "a Modality LUT or VOI LUT without a descriptor of three numbers")
    entries, first, bits = (int(x) for x in descriptor)
    table = _table(value(item, "LUTData"), entries % 2**16 or 2**16, bits, little_endian)
    if len(table) == 0:
        raise Rejected(Reason.MALFORMED, "an empty Modality LUT or VOI LUT")
    if array.dtype.kind != "u" and first >= 2**15:
        first -= 2**16
    index = np.clip(np.rint(array).astype(np.int64) - first, 0, len(table) - 1)
    mapped: Floats = table.astype(np.float32)[index]
    return mapped


# --- output values to the range 0 to 1 ---


def percentile_window(values: Floats, mask: NDArray[np.bool_] | None, low: float, high: float) -> tuple[float, float]:
    """Return the window between two percentiles of the values outside the mask, in their units.

    Samples every n-th row and column, so that at most about 2**18 values are sorted. Where the percentiles coincide
    (a small bright spot on a flat background) the extremes count; a flat frame gives (v, v).
    """
    step = max(1, math.isqrt(values.size // 2**18))
    sample = values[::step, ::step]
    seen = sample[~mask[::step, ::step]] if mask is not None else sample.reshape(-1)
    seen = seen[np.isfinite(seen)]
    if seen.size == 0:
        return 0.0, 0.0
    bottom, top = (float(x) for x in np.percentile(seen, [low, high]))
    return (bottom, top) if bottom < top else (float(seen.min()), float(seen.max()))


def to_unit(values: Floats, low: float, high: float) -> Floats:
    """Scale values from `low` to `high` to 0 to 1, clipped; a window without width gives 0."""
    if not low < high:
        return np.zeros(values.shape, dtype=np.float32)
    unit = values - np.float32(low)
    unit *= np.float32(1.0 / (high - low))
    np.clip(unit, 0.0, 1.0, out=unit)
    np.nan_to_num(unit, copy=False, nan=0.0)
    return unit


def voi(values: Floats, mask: NDArray[np.bool_] | None, ds: Dataset, frame: int, little_endian: bool) -> Floats:
    """Scale values to 0 to 1 with the header's contrast, for people alone (PS3.3 section C.11.2).

    Prefers a VOI LUT to a window, and the first of several; the window's function is LINEAR, LINEAR_EXACT or SIGMOID
    (section C.11.2.1.3). Without either, scales the whole range.
    """
    source = functional_group(ds, frame, "FrameVOILUTSequence") or ds
    if lut := items(ds, "VOILUTSequence"):
        shown = _lut(values, lut[0], little_endian)
        return to_unit(shown, 0.0, float(shown.max()) or 1.0)
    center, width = number(source, "WindowCenter"), number(source, "WindowWidth")
    if center is None or width is None or width <= 0:
        return to_unit(values, *percentile_window(values, mask, 0.0, 100.0))
    function = str(value(source, "VOILUTFunction") or "LINEAR").strip().upper()
    if function == "SIGMOID":
        curve: Floats = 1.0 / (1.0 + np.exp(np.clip(-4.0 * (values - center) / width, -80.0, 80.0)))
        return curve.astype(np.float32)
    if function == "LINEAR_EXACT":
        return to_unit(values, center - width / 2, center + width / 2)
    if width <= 1:
        return (values > center - 0.5).astype(np.float32)
    return to_unit(values, center - 0.5 - (width - 1) / 2, center - 0.5 + (width - 1) / 2)


# --- geometry ---


def crop_box(ds: Dataset, rows: int, columns: int) -> tuple[int, int, int, int] | None:
    """Return (top, left, bottom, right) around an ultrasound's regions (PS3.3 section C.8.5.5); None without regions.

    Uses the two-dimensional regions, or all of them where none is two-dimensional; ignores those below 16 pixels a
    side. Outside lies burned-in text above all.
    """
    boxes: dict[bool, list[tuple[int, int, int, int]]] = {True: [], False: []}
    for region in items(ds, "SequenceOfUltrasoundRegions"):
        edges = [number(region, f"RegionLocation{edge}") for edge in ("MinY0", "MinX0", "MaxY1", "MaxX1")]
        if None in edges:
            continue
        top, left, bottom, right = (int(edge) for edge in edges if edge is not None)
        top, left, bottom, right = max(0, top), max(0, left), min(rows, bottom + 1), min(columns, right + 1)
        if bottom - top >= 16 and right - left >= 16:
            boxes[number(region, "RegionSpatialFormat") == 1].append((top, left, bottom, right))
    chosen = boxes[True] or boxes[False]
    if not chosen:
        return None
    tops, lefts, bottoms, rights = zip(*chosen, strict=True)
    return min(tops), min(lefts), max(bottoms), max(rights)


def pixel_spacing(ds: Dataset, frame: int) -> tuple[float, float] | None:
    """Return the millimetres between rows and between columns; None where the header gives no valid ones."""
    measures = functional_group(ds, frame, "PixelMeasuresSequence")
    for source, keyword in ((measures, "PixelSpacing"), (ds, "PixelSpacing"), (ds, "ImagerPixelSpacing")):
        spacing = numbers(source, keyword) if source is not None else ()
        if len(spacing) == 2 and min(spacing) > 0:
            return spacing[0], spacing[1]
    return None


def pixel_ratio(ds: Dataset, frame: int) -> float:
    """Return a pixel's height over its width: from spacing, else Pixel Aspect Ratio (PS3.3 C.7.6.3.1.7), else 1."""
    sides = pixel_spacing(ds, frame) or numbers(ds, "PixelAspectRatio")
    if len(sides) != 2 or min(sides) <= 0:
        return 1.0
    ratio = sides[0] / sides[1]
    # Beyond this the header is wrong about its pixels, and the picture would be a line.
    return ratio if 1 / 16 <= ratio <= 16 else 1.0


def resize(unit: Floats, ratio: float, aspect: str) -> Floats:
    """Resize (rows, columns) to (256, 256) in float, antialiased by a triangle filter as wide as the reduction.

    `keep` scales the longer physical side to 256 and centers the other on background 0; `stretch` scales both.
    """
    height, width = unit.shape[0] * ratio, float(unit.shape[1])
    rows = columns = SIDE
    if aspect == "keep":
        scale = SIDE / max(height, width)
        rows, columns = (min(SIDE, max(1, round(side * scale))) for side in (height, width))
    small = Image.fromarray(np.ascontiguousarray(unit, dtype=np.float32)).resize(
        (columns, rows), Image.Resampling.BILINEAR
    )
    if (rows, columns) == (SIDE, SIDE):
        return np.asarray(small, dtype=np.float32)
    square = np.zeros((SIDE, SIDE), dtype=np.float32)
    top, left = (SIDE - rows) // 2, (SIDE - columns) // 2
    square[top : top + rows, left : left + columns] = np.asarray(small, dtype=np.float32)
    return square


def quantize(unit: Floats) -> NDArray[np.uint8]:
    """Round 0 to 1 to the nearest of 0 to 255; no other step loses precision."""
    rounded: NDArray[np.uint8] = np.clip(np.rint(unit * np.float32(255.0)), 0, 255).astype(np.uint8)
    return rounded
