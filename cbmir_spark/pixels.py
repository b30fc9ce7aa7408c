"""Arrays of stored pixel values → gray pictures; small pure functions of numpy arrays and header elements.

The chain is DICOM's own (PS3.4 section N.2, PS3.3 sections C.7.6.3, C.11.1 and C.11.2): stored values, color to
luma, Modality LUT, a window to the range 0 to 1, inversion of MONOCHROME1. Only the decoding of compressed frames
is left to pydicom and its codecs. Arrays are (rows, columns), or (rows, columns, 3) before `luminance`.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.encaps import get_frame
from pydicom.pixels.decoders.base import get_decoder

from cbmir_spark.preflight import (
    DEFLATED,
    EXPLICIT_LITTLE,
    PIXEL_DATA_TAGS,
    Layout,
    Reason,
    Rejected,
)

SIDE = 256
MAX_FRAME_BYTES = 512 * 2**20  # of one decoded frame: frames are decoded one at a time

Array = NDArray[Any]
Floats = NDArray[np.float32]

_KEYWORDS = dict(zip(PIXEL_DATA_TAGS, ("PixelData", "FloatPixelData", "DoubleFloatPixelData"), strict=True))
_NATIVE = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.2")
_RLE = "1.2.840.10008.1.2.5"
_JPEG_EXTENDED = "1.2.840.10008.1.2.4.51"
_PROGRESSIVE_JPEG = ("1.2.840.10008.1.2.4.53", "1.2.840.10008.1.2.4.55")
_PHOTOMETRIC = {
    1: ("MONOCHROME1", "MONOCHROME2", "PALETTE COLOR"),
    3: ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_PARTIAL_422", "YBR_PARTIAL_420", "YBR_ICT", "YBR_RCT"),
}
# ITU-R BT.601, the luma that PS3.3 section C.7.6.3.1.2 uses for YBR_FULL: Y needs no conversion back to RGB.
_LUMA = (np.float32(0.299), np.float32(0.587), np.float32(0.114))


def value(ds: Dataset, keyword: str) -> Any:
    """An element's value, None where it is absent, empty or not of its VR: a header may hold anything."""
    try:
        found = ds.get(keyword)
    except Exception:
        return None
    return None if found is None or (isinstance(found, str) and not found) else found


def number(ds: Dataset, keyword: str) -> float | None:
    """The first value of a numeric element as a finite float, else None."""
    return next(iter(numbers(ds, keyword)), None)


def numbers(ds: Dataset, keyword: str) -> tuple[float, ...]:
    """All values of a numeric element; empty unless every one is a finite number."""
    found = value(ds, keyword)
    if found is None or isinstance(found, bytes):
        return ()
    try:
        many = tuple(
            float(x) for x in (found if isinstance(found, Sequence) and not isinstance(found, str) else [found])
        )
    except (TypeError, ValueError, OverflowError):
        return ()
    return many if all(math.isfinite(x) for x in many) else ()


def items(ds: Dataset, keyword: str) -> list[Dataset]:
    """The items of a sequence element, empty where it is absent or no sequence."""
    found = value(ds, keyword)
    try:
        return [item for item in found if isinstance(item, Dataset)] if found is not None else []
    except TypeError:
        return []


def functional_group(ds: Dataset, frame: int, keyword: str) -> Dataset | None:
    """One functional group of a frame: its own, else the shared one (PS3.3 section C.7.6.16)."""
    per_frame = value(ds, "PerFrameFunctionalGroupsSequence")
    groups = [per_frame[frame]] if per_frame is not None and frame < len(per_frame) else []
    for group in groups + items(ds, "SharedFunctionalGroupsSequence")[:1]:
        if found := items(group, keyword):
            return found[0]
    return None


@dataclass(frozen=True)
class Stored:
    """How the pixel values lie in the file: the Image Pixel module (PS3.3 section C.7.6.3), checked and bounded."""

    transfer_syntax: str
    little_endian: bool
    keyword: str
    vr: str
    rows: int
    columns: int
    samples: int
    frames: int
    bits_allocated: int
    bits_stored: int
    high_bit: int
    signed: bool
    photometric: str
    planar: int

    @property
    def is_native(self) -> bool:
        return self.transfer_syntax in _NATIVE


def describe(ds: Dataset, layout: Layout) -> Stored:
    """Check the Image Pixel module against the bytes, before anything is allocated for it; runs per task.

    Raises Rejected: MALFORMED for values that cannot be, UNSUPPORTED for formats that nothing here decodes,
    TOO_LARGE past MAX_FRAME_BYTES, TRUNCATED where the pixel data is shorter than its own description.
    """
    tags = [tag for tag in PIXEL_DATA_TAGS if tag in layout.elements]
    element = layout.elements[tags[0]]
    keyword = _KEYWORDS[tags[0]]
    rows, columns = _count(ds, "Rows"), _count(ds, "Columns")
    samples, frames = _count(ds, "SamplesPerPixel", 1), _count(ds, "NumberOfFrames", 1) or 1
    allocated = {"FloatPixelData": 32, "DoubleFloatPixelData": 64}.get(keyword) or _count(ds, "BitsAllocated")
    stored = min(_count(ds, "BitsStored", allocated), allocated) if keyword == "PixelData" else allocated
    high_bit = _count(ds, "HighBit", stored - 1)
    photometric = str(value(ds, "PhotometricInterpretation") or ("RGB" if samples == 3 else "MONOCHROME2")).strip()
    if len(tags) != 1 or not (0 < rows < 2**16 and 0 < columns < 2**16 and frames > 0 and stored > 0):
        raise Rejected(Reason.MALFORMED)
    if photometric not in _PHOTOMETRIC.get(samples, ()) or allocated not in (1, 8, 12, 16, 32, 64):
        raise Rejected(Reason.UNSUPPORTED)
    frame_bits = rows * columns * samples * allocated
    if frame_bits > 8 * MAX_FRAME_BYTES:
        raise Rejected(Reason.TOO_LARGE)
    described = Stored(
        transfer_syntax=layout.transfer_syntax,
        little_endian=layout.little_endian,
        keyword=keyword,
        vr=element.vr or "OW",
        rows=rows,
        columns=columns,
        samples=samples,
        frames=frames,
        bits_allocated=allocated,
        bits_stored=stored,
        high_bit=high_bit if stored - 1 <= high_bit < allocated else stored - 1,
        signed=_count(ds, "PixelRepresentation", 0) == 1,
        photometric=photometric,
        planar=_count(ds, "PlanarConfiguration", 0) & 1,
    )
    if described.is_native:
        # PS3.3 section C.7.6.3.1.2: two chrominance samples for two pixels.
        bits = frame_bits * 2 // 3 if photometric == "YBR_FULL_422" else frame_bits
        if element.encapsulated:
            raise Rejected(Reason.MALFORMED)
        if 8 * element.length < bits * frames:
            raise Rejected(Reason.TRUNCATED)
    else:
        if keyword != "PixelData" or not element.encapsulated:
            raise Rejected(Reason.MALFORMED)
        # The first item is the Basic Offset Table (PS3.5 section A.4).
        if element.fragments - 1 < frames:
            raise Rejected(Reason.TRUNCATED)
    return described


def _count(ds: Dataset, keyword: str, absent: int | None = None) -> int:
    found = number(ds, keyword)
    if found is None:
        if absent is None or value(ds, keyword) is not None:
            raise Rejected(Reason.MALFORMED)
        return absent
    return int(found)


def decode(ds: Dataset, layout: Layout, stored: Stored, frames: Iterable[int]) -> Iterator[tuple[int, Array, str]]:
    """(number, stored values, photometric interpretation after decoding) of each wanted frame, one at a time.

    Integers of at least Bits Stored bits, sign extended, unused bits cleared; float for (Double) Float Pixel Data.
    Raises Rejected: UNSUPPORTED without a codec for the transfer syntax, UNDECODABLE where the codec fails.
    """
    element = next(layout.elements[tag] for tag in PIXEL_DATA_TAGS if tag in layout.elements)
    data = layout.data[element.offset : element.offset + element.length]
    if stored.bits_allocated == 12:
        for frame in frames:
            yield frame, _unpack_12_bits(data, stored, frame), stored.photometric
        return
    source = data if stored.is_native else bytes(data)
    codec = _codec(ds, stored)
    for frame in frames:
        try:
            array, photometric = codec(source, frame)
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException:  # a panic in a Rust codec is no Exception
            raise Rejected(Reason.UNDECODABLE) from None
        if (stored.is_native or stored.transfer_syntax == _RLE) and array.dtype.kind in "ui":
            array = _significant_bits(array.astype(array.dtype.newbyteorder("="), copy=False), stored)
        yield frame, array, photometric


Codec = Callable[[Any, int], tuple[Array, str]]


def _codec(ds: Dataset, stored: Stored) -> Codec:
    """What decodes one frame of this transfer syntax: pydicom with its plugins, else libjpeg by itself."""
    if stored.transfer_syntax in _PROGRESSIVE_JPEG and stored.samples == 1:
        return lambda source, frame: (_libjpeg(source, stored, frame), stored.photometric)
    try:
        decoder = get_decoder(EXPLICIT_LITTLE if stored.transfer_syntax == DEFLATED else stored.transfer_syntax)
    except NotImplementedError:
        raise Rejected(Reason.UNSUPPORTED) from None
    if not decoder.is_available:
        raise Rejected(Reason.UNSUPPORTED)
    options: dict[str, Any] = {
        "rows": stored.rows,
        "columns": stored.columns,
        "samples_per_pixel": stored.samples,
        "number_of_frames": stored.frames,
        "bits_allocated": stored.bits_allocated,
        "bits_stored": stored.bits_stored,
        "pixel_representation": int(stored.signed),
        "photometric_interpretation": stored.photometric,
        "planar_configuration": stored.planar,
        "pixel_keyword": stored.keyword,
        "pixel_vr": stored.vr,
    }
    if stored.is_native or stored.transfer_syntax == _RLE:
        options["correct_unused_bits"] = False
    if not stored.is_native and (offsets := _extended_offsets(ds)):
        options["extended_offsets"] = offsets

    def by_pydicom(source: Any, frame: int) -> tuple[Array, str]:
        try:
            array, properties = decoder.as_array(source, index=frame, raw=True, **options)
        except Exception:
            if stored.transfer_syntax != _JPEG_EXTENDED or stored.samples != 1 or stored.bits_allocated != 16:
                raise
            return _gdcm_12_bits(source, stored, frame), stored.photometric
        return array, str(properties["photometric_interpretation"])

    return by_pydicom


def _extended_offsets(ds: Dataset) -> tuple[bytes, bytes] | None:
    table, lengths = value(ds, "ExtendedOffsetTable"), value(ds, "ExtendedOffsetTableLengths")
    return (table, lengths) if table and lengths and len(table) == len(lengths) else None


def _significant_bits(array: Array, stored: Stored) -> Array:
    """Keep the bits from High Bit down, sign extended: the others may hold overlays (PS3.5 section 8.1.1)."""
    size = 8 * array.dtype.itemsize
    if stored.bits_allocated != size or stored.bits_stored == size:
        return array
    shifted: Array = np.right_shift(np.left_shift(array, size - 1 - stored.high_bit), size - stored.bits_stored)
    return shifted


def _unpack_12_bits(data: memoryview, stored: Stored, frame: int) -> Array:
    """Two samples in three bytes, as ACR-NEMA and early DICOM packed them (PS3.5 section D.1, retired)."""
    if not stored.is_native or not stored.little_endian or stored.samples != 1:
        raise Rejected(Reason.UNSUPPORTED)
    pixels = stored.rows * stored.columns
    if pixels % 2 and frame:
        raise Rejected(Reason.UNSUPPORTED)
    start = frame * pixels * 3 // 2
    packed = np.zeros((pixels + 1) // 2 * 3, dtype=np.uint16)
    source = np.frombuffer(data[start : start + (pixels * 3 + 1) // 2], dtype=np.uint8)
    packed[: len(source)] = source
    first, middle, last = packed[0::3], packed[1::3], packed[2::3]
    array = np.stack([first | (middle & 0x0F) << 8, middle >> 4 | last << 4], axis=1).reshape(-1)[:pixels]
    if stored.signed:
        array = np.right_shift(np.left_shift(array, 4).view(np.int16), 4)
    frame_values: Array = array.reshape(stored.rows, stored.columns)
    return frame_values


def _libjpeg(source: bytes, stored: Stored, frame: int) -> Array:
    """The retired progressive processes, which pydicom knows no decoder for; libjpeg reads every JPEG."""
    from libjpeg.utils import decode as decode_jpeg

    array: Array = decode_jpeg(get_frame(source, frame, number_of_frames=stored.frames))
    if array.shape != (stored.rows, stored.columns):
        raise ValueError("the stream's size is not the header's")
    return array


def _gdcm_12_bits(source: bytes, stored: Stored, frame: int) -> Array:
    """12-bit JPEG Extended by GDCM: libjpeg refuses some sound streams, and pydicom's plugin declines them all."""
    import gdcm

    fragment = gdcm.Fragment()
    fragment.SetByteStringValue(get_frame(source, frame, number_of_frames=stored.frames))
    fragments = gdcm.SequenceOfFragments.New()
    fragments.AddFragment(fragment)
    element = gdcm.DataElement(gdcm.Tag(0x7FE0, 0x0010))
    element.SetValue(fragments.__ref__())
    image = gdcm.Image()
    image.SetNumberOfDimensions(2)
    image.SetDimensions((stored.columns, stored.rows, 1))
    image.SetDataElement(element)
    image.SetPhotometricInterpretation(gdcm.PhotometricInterpretation(gdcm.PhotometricInterpretation.MONOCHROME2))
    image.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.JPEGExtendedProcess2_4))
    image.SetPixelFormat(gdcm.PixelFormat(1, 16, 12, 11, int(stored.signed)))
    decoded = image.GetBuffer().encode("utf-8", "surrogateescape")
    array: Array = np.frombuffer(decoded, dtype=np.int16 if stored.signed else np.uint16)
    return array.reshape(stored.rows, stored.columns)


def luminance(array: Array, photometric: str, ds: Dataset, little_endian: bool) -> Array:
    """Gray values of one frame: gray as it is, color as luma (float32, 0 to the largest sample value)."""
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
    """PS3.3 section C.7.6.3.1.5 and .6: indices through three tables, those below and above take the ends."""
    colors = []
    for color in ("Red", "Green", "Blue"):
        descriptor = numbers(ds, f"{color}PaletteColorLookupTableDescriptor")
        if len(descriptor) != 3:
            raise Rejected(Reason.MALFORMED)
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
        raise Rejected(Reason.MALFORMED)
    if array.dtype.kind == "i" and first >= 2**15:
        first -= 2**16
    index = np.clip(array.astype(np.int64) - first, 0, length - 1)
    luma: Floats = _luma(*(table[:length] for table in colors))[index]
    return luma


def _luma(red: Array, green: Array, blue: Array) -> Floats:
    """Element by element: a matrix product would sum in an order that depends on the machine's threads."""
    gray: Floats = red * _LUMA[0] + green * _LUMA[1] + blue * _LUMA[2]
    return gray.astype(np.float32, copy=False)


def _table(raw: Any, entries: int | None, bits: int, little_endian: bool) -> Array:
    """Values of a lookup table, given as bytes (OW) or as numbers (US, SS); unsigned."""
    if raw is None:
        raise Rejected(Reason.MALFORMED)
    if not isinstance(raw, bytes | bytearray | memoryview):
        many = raw if isinstance(raw, Sequence) else [raw]
        return np.array([int(x) for x in many], dtype=np.int64)[:entries] & 0xFFFF
    words = np.dtype("<u2" if little_endian else ">u2")
    if bits <= 8 and (entries is None or len(raw) < 2 * entries):
        # Two entries in each 16-bit word, the first one in its low byte.
        packed = np.frombuffer(bytes(raw), dtype=np.uint8)
        return (packed if little_endian else packed[: len(packed) // 2 * 2].reshape(-1, 2)[:, ::-1].reshape(-1))[
            :entries
        ]
    return np.frombuffer(bytes(raw)[: len(raw) // 2 * 2], dtype=words)[:entries].astype(np.int64)


def _segmented(words: Array, entries: int, wide: bool) -> Array:
    """Expand a segmented palette (PS3.3 section C.7.9.2): discrete, linear and indirect segments."""
    out: list[int] = []
    data = [int(x) for x in words]
    at = 0
    try:
        while at < len(data) and len(out) < entries:
            if data[at] != 2:
                at = _segment(data, at, out)
                continue
            # Indirect: this many segments again, from a byte offset in 32 bits, low word (or byte) first.
            offset = data[at + 2] | data[at + 3] << 16 if wide else sum(data[at + 2 + k] << 8 * k for k in range(4))
            source = offset // 2 if wide else offset
            for _ in range(data[at + 1]):
                # An indirect segment can name thousands that are 65535 long each: no more than the table holds.
                if len(out) >= entries:
                    break
                source = _segment(data, source, out)
            at += 4 if wide else 6
    except IndexError:
        raise Rejected(Reason.MALFORMED) from None
    return np.array(out[:entries], dtype=np.int64)


def _segment(data: list[int], at: int, out: list[int]) -> int:
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


def padding_mask(array: Array, stored: Stored, ds: Dataset) -> NDArray[np.bool_] | None:
    """Where a gray frame holds padding and no image (PS3.3 section C.7.5.1.1.2); None where nothing is declared.

    Pixel Padding Value is a stored value; with a Range Limit everything between the two is padding.
    """
    pad = number(ds, "PixelPaddingValue")
    if pad is None or stored.samples != 1 or stored.photometric == "PALETTE COLOR" or array.dtype.kind not in "ui":
        return None
    limit = number(ds, "PixelPaddingRangeLimit")
    ends = sorted(_as_stored(int(x), stored) for x in (pad, pad if limit is None else limit))
    mask: NDArray[np.bool_] = array == ends[0] if ends[0] == ends[1] else (array >= ends[0]) & (array <= ends[1])
    return mask if mask.any() else None


def _as_stored(padding: int, stored: Stored) -> int:
    """The padding value read as the pixels are: some writers give -2000 as 63536, or the reverse."""
    span = 1 << stored.bits_allocated
    if stored.signed and padding >= span // 2:
        return padding - span
    return padding + span if not stored.signed and padding < 0 else padding


def rescale(ds: Dataset, frame: int) -> tuple[float, float, str] | None:
    """Slope, intercept and Rescale Type ("" where absent) of a frame's Modality LUT; None where there is none.

    Rescale of the Modality LUT module (PS3.3 section C.11.1), or of the Pixel Value Transformation functional
    group of enhanced objects (section C.7.6.16.2.9).
    """
    source = functional_group(ds, frame, "PixelValueTransformationSequence") or ds
    slope, intercept = number(source, "RescaleSlope"), number(source, "RescaleIntercept")
    if slope is None or intercept is None or slope == 0:
        return None
    return slope, intercept, str(value(source, "RescaleType") or "").strip().upper()


def modality_values(array: Array, ds: Dataset, frame: int, little_endian: bool) -> Floats:
    """Modality LUT: stored values → output units, such as Hounsfield units (float32)."""
    if lut := items(ds, "ModalityLUTSequence"):
        return _lut(array, lut[0], little_endian)
    transform = rescale(ds, frame)
    if transform is None:
        return array.astype(np.float32)
    slope, intercept, _ = transform
    # In float64 first: 32-bit stored values do not fit into a float32's 24 bits before the rescale.
    return (array * np.float64(slope) + intercept).astype(np.float32)


def _lut(array: Array, item: Dataset, little_endian: bool) -> Floats:
    """A LUT sequence item (PS3.3 sections C.11.1.1 and C.11.2.1.1): values outside take the first or last entry."""
    descriptor = numbers(item, "LUTDescriptor")
    if len(descriptor) != 3:
        raise Rejected(Reason.MALFORMED)
    entries, first, bits = (int(x) for x in descriptor)
    table = _table(value(item, "LUTData"), entries % 2**16 or 2**16, bits, little_endian)
    if len(table) == 0:
        raise Rejected(Reason.MALFORMED)
    if array.dtype.kind != "u" and first >= 2**15:
        first -= 2**16
    index = np.clip(np.rint(array).astype(np.int64) - first, 0, len(table) - 1)
    mapped: Floats = table.astype(np.float32)[index]
    return mapped


def suv_factor(ds: Dataset) -> float | None:
    """What a PET image's output units are multiplied by to give SUV by body weight (g/ml); None where unknown.

    The vendor-neutral computation of the Quantitative Imaging Biomarkers Alliance: BQML with decay correction to
    the start of the scan or to the injection; GML as it is; Philips' CNTS by its private scale factor.
    """
    units = str(value(ds, "Units") or "").strip().upper()
    if units == "GML":
        return 1.0 if str(value(ds, "SUVType") or "BW").strip().upper() == "BW" else None
    if units == "CNTS":
        factor = ds.get((0x7053, 0x1000))
        try:
            scale = float(factor.value) if factor is not None else 0.0
        except (TypeError, ValueError):
            return None
        return scale if scale > 0 and math.isfinite(scale) else None
    drug = next(iter(items(ds, "RadiopharmaceuticalInformationSequence")), None)
    weight = number(ds, "PatientWeight")
    if units != "BQML" or drug is None or not weight or weight <= 0:
        return None
    corrected = {str(x).strip().upper() for x in value(ds, "CorrectedImage") or ()}
    dose, half_life = number(drug, "RadionuclideTotalDose"), number(drug, "RadionuclideHalfLife")
    if not {"ATTN", "DECY"} <= corrected or not dose or dose <= 0 or not half_life or half_life <= 0:
        return None
    decay_correction = str(value(ds, "DecayCorrection") or "").strip().upper()
    if decay_correction == "ADMIN":
        return weight * 1000.0 / dose
    elapsed = _seconds_since_injection(ds, drug) if decay_correction == "START" else None
    if elapsed is None or not 0 <= elapsed < 20 * half_life:
        return None
    return float(weight * 1000.0 / (dose * 2.0 ** (-elapsed / half_life)))


def _seconds_since_injection(ds: Dataset, drug: Dataset) -> float | None:
    scan = _moment(value(ds, "SeriesDate"), value(ds, "SeriesTime"))
    acquired = _moment(value(ds, "AcquisitionDate"), value(ds, "AcquisitionTime"))
    if scan is None or (acquired is not None and scan > acquired):
        # A series made anew later carries the time of its making; its scan started no later than this frame.
        return None
    full = str(value(drug, "RadiopharmaceuticalStartDateTime") or "")
    injected = _moment(full[:8], full[8:]) if len(full) >= 14 else None
    if injected is None:
        injected = _moment(value(ds, "SeriesDate"), value(drug, "RadiopharmaceuticalStartTime"))
        if injected is not None and injected > scan:
            injected -= timedelta(days=1)
    return None if injected is None else (scan - injected).total_seconds()


def _moment(date: Any, time: Any) -> datetime | None:
    digits = str(time or "").split("+")[0].split("-")[0].split(".")[0].strip()
    try:
        return datetime.strptime(f"{str(date or '').strip()} {digits[:6]:0<6}", "%Y%m%d %H%M%S") if digits else None
    except ValueError:
        return None


def percentile_window(values: Floats, mask: NDArray[np.bool_] | None, low: float, high: float) -> tuple[float, float]:
    """The window between two percentiles of what is not padding, in the values' own units.

    Every n-th row and column is looked at, so that at most about 2**18 values are sorted. Where the percentiles
    coincide (a small bright spot on a flat background) the extremes are taken; a flat frame gives (v, v).
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
    """Values from `low` to `high` → 0 to 1, clipped; a window without width gives 0."""
    if not low < high:
        return np.zeros(values.shape, dtype=np.float32)
    unit = values - np.float32(low)
    unit *= np.float32(1.0 / (high - low))
    np.clip(unit, 0.0, 1.0, out=unit)
    return np.nan_to_num(unit, copy=False, nan=0.0)


def voi(values: Floats, mask: NDArray[np.bool_] | None, ds: Dataset, frame: int, little_endian: bool) -> Floats:
    """The header's own contrast, for pictures that people look at → 0 to 1 (PS3.3 section C.11.2).

    A VOI LUT before a window, of several the first; LINEAR, LINEAR_EXACT or SIGMOID (section C.11.2.1.3). Without
    either the whole range is shown.
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
        return (1.0 / (1.0 + np.exp(np.clip(-4.0 * (values - center) / width, -80.0, 80.0)))).astype(np.float32)
    if function == "LINEAR_EXACT":
        return to_unit(values, center - width / 2, center + width / 2)
    if width <= 1:
        return (values > center - 0.5).astype(np.float32)
    return to_unit(values, center - 0.5 - (width - 1) / 2, center - 0.5 + (width - 1) / 2)


def crop_box(ds: Dataset, rows: int, columns: int) -> tuple[int, int, int, int] | None:
    """(top, left, bottom, right) around an ultrasound's regions (PS3.3 section C.8.5.5), None where there are none.

    Two-dimensional regions where there are some, else all of them; what lies outside, burned-in text above all,
    is left out. Boxes that are too small to be an image are not believed.
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
    kept = boxes[True] or boxes[False]
    if not kept:
        return None
    tops, lefts, bottoms, rights = zip(*kept, strict=True)
    return min(tops), min(lefts), max(bottoms), max(rights)


def pixel_spacing(ds: Dataset, frame: int) -> tuple[float, float] | None:
    """Millimetres between rows and between columns, None where the header gives none that can be."""
    measures = functional_group(ds, frame, "PixelMeasuresSequence")
    for source, keyword in ((measures, "PixelSpacing"), (ds, "PixelSpacing"), (ds, "ImagerPixelSpacing")):
        spacing = numbers(source, keyword) if source is not None else ()
        if len(spacing) == 2 and min(spacing) > 0:
            return spacing[0], spacing[1]
    return None


def pixel_ratio(ds: Dataset, frame: int) -> float:
    """Height of a pixel over its width: by spacing, else by Pixel Aspect Ratio (PS3.3 section C.7.6.3.1.7), else 1."""
    sides = pixel_spacing(ds, frame) or numbers(ds, "PixelAspectRatio")
    if len(sides) != 2 or min(sides) <= 0:
        return 1.0
    ratio = sides[0] / sides[1]
    # Past this the header is wrong about its pixels; the picture would be a line.
    return ratio if 1 / 16 <= ratio <= 16 else 1.0


def resize(unit: Floats, ratio: float, aspect: str) -> Floats:
    """(rows, columns) → (256, 256), antialiased, in float: a triangle filter as wide as the reduction.

    `keep` scales the longer physical side to 256 and centres the other on background 0; `stretch` scales both.
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


def quantise(unit: Floats) -> NDArray[np.uint8]:
    """0 to 1 → 0 to 255, rounded to nearest; the only place where precision is given up."""
    rounded: NDArray[np.uint8] = np.clip(np.rint(unit * np.float32(255.0)), 0, 255).astype(np.uint8)
    return rounded
