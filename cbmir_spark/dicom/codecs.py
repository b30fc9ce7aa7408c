"""Decode Pixel Data to stored values: transfer syntaxes, codecs and bit depths (PS3.5 section 8 and Annex A)."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydicom.dataset import Dataset
from pydicom.encaps import get_frame
from pydicom.pixels.decoders.base import get_decoder

from cbmir_spark.dicom.elements import Array, number, value
from cbmir_spark.dicom.preflight import (
    DEFLATED,
    EXPLICIT_BIG,
    EXPLICIT_LITTLE,
    IMPLICIT_LITTLE,
    PIXEL_DATA_TAGS,
    Layout,
    Reason,
    Rejected,
)

__all__ = ["MAX_FRAME_BYTES", "Stored", "decode", "describe"]

MAX_FRAME_BYTES = 512 * 2**20  # of one decoded frame: frames are decoded one at a time

_KEYWORDS = dict(zip(PIXEL_DATA_TAGS, ("PixelData", "FloatPixelData", "DoubleFloatPixelData"), strict=True))
_NATIVE = (IMPLICIT_LITTLE, EXPLICIT_LITTLE, DEFLATED, EXPLICIT_BIG)
_RLE = "1.2.840.10008.1.2.5"
_JPEG_EXTENDED = "1.2.840.10008.1.2.4.51"
_PROGRESSIVE_JPEG = ("1.2.840.10008.1.2.4.53", "1.2.840.10008.1.2.4.55")
_PHOTOMETRIC = {
    1: ("MONOCHROME1", "MONOCHROME2", "PALETTE COLOR"),
    3: ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_PARTIAL_422", "YBR_PARTIAL_420", "YBR_ICT", "YBR_RCT"),
}


@dataclass(frozen=True)
class Stored:
    """The Image Pixel module (PS3.3 section C.7.6.3) and its encoding, checked against the bytes and bounded."""

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

    Raises Rejected: MALFORMED for impossible values, UNSUPPORTED for formats without a decoder, TOO_LARGE past
    MAX_FRAME_BYTES, TRUNCATED where the pixel data is shorter than the module declares.
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
    """Return an integer of the module, `absent` where the element is; raise Rejected where it has no default."""
    found = number(ds, keyword)
    if found is None:
        if absent is None or value(ds, keyword) is not None:
            raise Rejected(Reason.MALFORMED)
        return absent
    return int(found)


def decode(ds: Dataset, layout: Layout, stored: Stored, frames: Iterable[int]) -> Iterator[tuple[int, Array, str]]:
    """Decode frames one at a time: (number, stored values, photometric interpretation after decoding) of each.

    Values are (rows, columns), or (rows, columns, 3) of color: integers of at least Bits Stored bits, sign extended,
    unused bits cleared; floats for (Double) Float Pixel Data. Raises Rejected: UNSUPPORTED without a codec for the
    transfer syntax, UNDECODABLE where the codec fails.
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
        except BaseException:  # a panic of a Rust codec is not an Exception
            raise Rejected(Reason.UNDECODABLE) from None
        if (stored.is_native or stored.transfer_syntax == _RLE) and array.dtype.kind in "ui":
            array = _significant_bits(array.astype(array.dtype.newbyteorder("="), copy=False), stored)
        yield frame, array, photometric


_Codec = Callable[[Any, int], tuple[Array, str]]


def _codec(ds: Dataset, stored: Stored) -> _Codec:
    """Choose the decoder of a transfer syntax: pydicom with its plugins, or libjpeg alone where pydicom has none."""
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
    """Extract the bits from High Bit down, sign extended: the others may be overlays (PS3.5 section 8.1.1)."""
    size = 8 * array.dtype.itemsize
    if stored.bits_allocated != size or stored.bits_stored == size:
        return array
    shifted: Array = np.right_shift(np.left_shift(array, size - 1 - stored.high_bit), size - stored.bits_stored)
    return shifted


def _unpack_12_bits(data: memoryview, stored: Stored, frame: int) -> Array:
    """Unpack two samples from three bytes, the packing of ACR-NEMA and early DICOM (PS3.5 section D.1, retired)."""
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
    """Decode the retired progressive processes, for which pydicom has no decoder."""
    from libjpeg.utils import decode as decode_jpeg

    array: Array = decode_jpeg(get_frame(source, frame, number_of_frames=stored.frames))
    if array.shape != (stored.rows, stored.columns):
        raise ValueError("the codestream's size differs from the header's")
    return array


def _gdcm_12_bits(source: bytes, stored: Stored, frame: int) -> Array:
    """Decode 12-bit JPEG Extended with GDCM: libjpeg refuses some valid streams, pydicom's GDCM plugin all of them."""
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
