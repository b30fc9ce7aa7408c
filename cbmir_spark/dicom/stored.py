"""Describe the stored pixels of an object: the Image Pixel module, checked against the bytes and codestreams."""

from dataclasses import dataclass, replace

import numpy as np
from pydicom.dataset import Dataset

from cbmir_spark.dicom import codestream
from cbmir_spark.dicom.codestream import Codestream
from cbmir_spark.dicom.elements import Array, number, value
from cbmir_spark.dicom.fragments import ITEM, Fragments
from cbmir_spark.dicom.preflight import (
    DEFLATED,
    EXPLICIT_BIG,
    EXPLICIT_LITTLE,
    IMPLICIT_LITTLE,
    PIXEL_DATA_TAGS,
    Element,
    Layout,
    named,
)
from cbmir_spark.dicom.reasons import Reason, Rejected

__all__ = [
    "JPIP",
    "MAX_FRAME_BYTES",
    "NATIVE",
    "RLE",
    "Stored",
    "check_codestream",
    "describe",
    "fragments",
    "significant_bits",
]

MAX_FRAME_BYTES = 512 * 2**20  # of one decoded frame: frames are decoded one at a time

NATIVE = (IMPLICIT_LITTLE, EXPLICIT_LITTLE, DEFLATED, EXPLICIT_BIG)
RLE = "1.2.840.10008.1.2.5"
JPIP = ("1.2.840.10008.1.2.4.94", "1.2.840.10008.1.2.4.95")  # the pixels are behind a URL
# Of the encapsulated transfer syntaxes, those whose codestreams have a decoder here.
CODECS = (RLE, *(f"1.2.840.10008.1.2.4.{part}" for part in (50, 51, 53, 55, 57, 70, 80, 81, 90, 91, 201, 202, 203)))
_KEYWORDS = dict(zip(PIXEL_DATA_TAGS, ("PixelData", "FloatPixelData", "DoubleFloatPixelData"), strict=True))
_PHOTOMETRIC = {
    1: ("MONOCHROME1", "MONOCHROME2", "PALETTE COLOR"),
    3: ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_PARTIAL_422", "YBR_PARTIAL_420", "YBR_ICT", "YBR_RCT"),
}


@dataclass(frozen=True)
class Stored:
    """The Image Pixel module (PS3.3 section C.7.6.3) and its encoding, checked against the bytes and bounded.

    Rows and columns are those of the codestream where the header exchanges them.
    """

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
    is_native: bool  # by the pixel data itself, which some transfer syntaxes contradict
    may_be_rgb: bool = False  # of YBR_FULL: the header contradicts the pixel data, whose samples may be either


def describe(ds: Dataset, layout: Layout) -> Stored:
    """Check the Image Pixel module against the bytes, before anything is allocated for it; runs per task.

    Raises Rejected: MALFORMED for impossible values, UNSUPPORTED and UNSUPPORTED_FORMAT for transfer syntaxes and pixel
    formats without a decoder, WRONG_SYNTAX where the pixel data is neither what its transfer syntax says nor any other
    encoding, TOO_LARGE past MAX_FRAME_BYTES, TRUNCATED where the pixel data is shorter than the module declares,
    UNDECODABLE where the first frame's codestream differs from the module.
    """
    tags = [tag for tag in PIXEL_DATA_TAGS if tag in layout.elements]
    element = layout.elements[tags[0]]
    keyword = _KEYWORDS[tags[0]]
    rows, columns = _count(ds, "Rows"), _count(ds, "Columns")
    samples, frames = _count(ds, "SamplesPerPixel", 1), _count(ds, "NumberOfFrames", 1) or 1
    allocated = {"FloatPixelData": 32, "DoubleFloatPixelData": 64}.get(keyword) or _count(ds, "BitsAllocated")
    stored = min(_count(ds, "BitsStored", allocated), allocated) if keyword == "PixelData" else allocated
    high_bit = _count(ds, "HighBit", stored - 1)
    photometric = _photometric(ds, samples)
    if len(tags) != 1:
        raise Rejected(Reason.MALFORMED, "pixel data of two kinds")
    if not (0 < rows < 2**16 and 0 < columns < 2**16 and frames > 0 and stored > 0):
        raise Rejected(Reason.MALFORMED, "Rows, Columns, Number of Frames or Bits Stored out of range")
    if samples not in _PHOTOMETRIC:
        raise Rejected(Reason.UNSUPPORTED_FORMAT, "Samples per Pixel")
    if photometric not in _PHOTOMETRIC[samples]:
        raise Rejected(Reason.UNSUPPORTED_FORMAT, "Photometric Interpretation")
    if allocated not in (1, 8, 12, 16, 32, 64):
        raise Rejected(Reason.UNSUPPORTED_FORMAT, "Bits Allocated")
    frame_bits = rows * columns * samples * allocated
    if frame_bits > 8 * MAX_FRAME_BYTES:
        raise Rejected(Reason.TOO_LARGE, f"a frame of more than {MAX_FRAME_BYTES // 2**20} MiB")
    is_native = _is_native(layout, element, keyword, frame_bits * frames)
    # PS3.3 section C.7.6.3.1.2: two chrominance samples for two pixels. Some writers store all three of each pixel.
    whole = is_native and photometric == "YBR_FULL_422" and 8 * element.length >= frame_bits * frames
    if whole:
        photometric = "YBR_FULL"
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
        # In codestreams samples are by pixel, whatever the header says (PS3.5 section 8.2).
        planar=_count(ds, "PlanarConfiguration", 0) & 1 if is_native and photometric != "YBR_FULL_422" else 0,
        is_native=is_native,
        may_be_rgb=whole,
    )
    if is_native:
        bits = frame_bits * 2 // 3 if photometric == "YBR_FULL_422" else frame_bits
        if 8 * element.length < bits * frames:
            raise Rejected(Reason.TRUNCATED, "fewer pixels than the header declares")
        return described
    return _with_codestreams(ds, layout, element, described)


def fragments(ds: Dataset, layout: Layout, element: Element, frames: int) -> Fragments:
    """Find the fragments of encapsulated pixel data."""
    data = layout.data[element.offset : element.offset + element.length]
    table, lengths = value(ds, "ExtendedOffsetTable"), value(ds, "ExtendedOffsetTableLengths")
    extended = (table, lengths) if table and lengths and len(table) == len(lengths) else None
    return Fragments(data, frames, extended, element.encapsulated)


def check_codestream(stored: Stored, stream: Codestream) -> None:
    """Raise Rejected: UNDECODABLE where a codestream is of another image than the header describes, TRUNCATED where its
    end is missing.

    A precision below Bits Stored is no contradiction: the samples just do not use all bits.
    """
    differs = [
        f"{what} {found} in the codestream, {expected} in the header"
        for what, found, expected in (
            ("rows", stream.rows or stored.rows, stored.rows),
            ("columns", stream.columns, stored.columns),
            ("samples", stream.components, stored.samples),
        )
        if found != expected
    ]
    if stream.precision > stored.bits_allocated:
        differs.append(f"precision {stream.precision} in the codestream, {stored.bits_allocated} bits in the header")
    if differs:
        raise Rejected(Reason.UNDECODABLE, "; ".join(differs))
    if not stream.whole:
        raise Rejected(Reason.TRUNCATED, "a codestream has no end")


def _is_native(layout: Layout, element: Element, keyword: str, bits: int) -> bool:
    """Tell native from compressed pixel data by the data itself, where it contradicts the transfer syntax."""
    if element.encapsulated or keyword != "PixelData":
        if element.encapsulated and keyword != "PixelData":
            raise Rejected(Reason.MALFORMED, f"{keyword} in fragments")
        return not element.encapsulated
    if 8 * element.length in range(bits, bits + 16):
        return True
    start = bytes(layout.data[element.offset : element.offset + codestream.MAGIC_BYTES])
    if layout.transfer_syntax in NATIVE and not start.startswith(ITEM):
        return True
    # Fragments of defined length, or bytes that are no codestream.
    if not codestream.begins(start):
        detail = f"{named(layout.transfer_syntax)}, but neither fragments nor a codestream nor native pixels"
        raise Rejected(Reason.WRONG_SYNTAX, detail)
    return False


def _with_codestreams(ds: Dataset, layout: Layout, element: Element, described: Stored) -> Stored:
    """Check the number of frames and the first one's codestream; take its shape where the header exchanges it."""
    found = fragments(ds, layout, element, described.frames)
    if len(found.spans) < described.frames:
        if layout.transfer_syntax not in (*CODECS, *NATIVE):
            raise Rejected(Reason.UNSUPPORTED, named(layout.transfer_syntax))
        raise Rejected(Reason.TRUNCATED, "fewer fragments than frames")
    if found.starts is None:
        raise Rejected(Reason.UNDECODABLE, "fragments cannot be assigned to frames")
    first = found.frame(0)
    if described.transfer_syntax == RLE and not codestream.begins(first):
        return described
    try:
        stream = codestream.read(first)
        # Without a delimiter, more bytes may have followed.
        if not element.closed and not codestream.read(found.frame(described.frames - 1)).whole:
            raise Rejected(Reason.TRUNCATED, "the last frame's codestream has no end")
    except ValueError as error:
        if layout.transfer_syntax in NATIVE:
            detail = f"{named(layout.transfer_syntax)}, but fragments that are no codestreams"
            raise Rejected(Reason.WRONG_SYNTAX, detail) from None
        if layout.transfer_syntax not in CODECS:
            raise Rejected(Reason.UNSUPPORTED, named(layout.transfer_syntax)) from None
        raise Rejected(Reason.UNDECODABLE, str(error)) from None
    if (stream.rows, stream.columns) == (described.columns, described.rows):
        described = replace(described, rows=described.columns, columns=described.rows)
    check_codestream(described, stream)
    return described


def _photometric(ds: Dataset, samples: int) -> str:
    """Return Photometric Interpretation as the standard spells it; some writers put a blank into MONOCHROME2."""
    text = str(value(ds, "PhotometricInterpretation") or ("RGB" if samples == 3 else "MONOCHROME2"))
    text = " ".join(text.upper().split())
    return text.replace(" ", "") if text.startswith("MONOCHROME") else text


def _count(ds: Dataset, keyword: str, absent: int | None = None) -> int:
    """Return an integer of the module, `absent` where the element is; raise Rejected where it has no default."""
    found = number(ds, keyword)
    if found is None:
        if absent is None or value(ds, keyword) is not None:
            raise Rejected(Reason.MALFORMED, f"{keyword} is absent or no number")
        return absent
    return int(found)


def significant_bits(array: Array, stored: Stored, high_bit: int) -> Array:
    """Extract the bits from `high_bit` down, sign extended: the others may be overlays (PS3.5 section 8.1.1)."""
    size = 8 * array.dtype.itemsize
    if stored.bits_allocated != size or stored.bits_stored == size:
        return array
    shifted: Array = np.right_shift(np.left_shift(array, size - 1 - high_bit), size - stored.bits_stored)
    return shifted
