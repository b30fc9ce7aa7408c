"""Decode one compressed frame to stored values, once its codestream matches the header (PS3.5 section 8.2)."""

import struct
from typing import Any

import numpy as np
from pydicom.encaps import encapsulate
from pydicom.pixels.decoders.base import get_decoder

from cbmir_spark.dicom import codestream
from cbmir_spark.dicom.codestream import Codestream, Kind
from cbmir_spark.dicom.elements import Array
from cbmir_spark.dicom.reasons import Reason, Rejected
from cbmir_spark.dicom.stored import RLE, Stored, check_codestream, significant_bits

__all__ = ["decode_frame"]

_ROOT = "1.2.840.10008.1.2.4."
_BASELINE, _EXTENDED = f"{_ROOT}50", f"{_ROOT}51"
# Transfer syntaxes of each family; a stream under another syntax is decoded by the last of its own.
_SYNTAXES = {
    Kind.JPEG: (_BASELINE, _EXTENDED),
    Kind.JPEG_LOSSLESS: (f"{_ROOT}57", f"{_ROOT}70"),
    Kind.JPEG_PROGRESSIVE: (f"{_ROOT}53", f"{_ROOT}55", _BASELINE),
    Kind.JPEG_LS: (f"{_ROOT}80", f"{_ROOT}81"),
    Kind.JPEG_2000: (f"{_ROOT}90", f"{_ROOT}91"),
    Kind.HTJ2K: (f"{_ROOT}201", f"{_ROOT}202", f"{_ROOT}203"),
}
_RLE_PADDING = 3  # zeros that a segment may have beyond its samples


def decode_frame(data: bytes, stored: Stored) -> tuple[Array, str]:
    """Decode a frame: its stored values, sign extended, and its photometric interpretation after decoding.

    Values are (rows, columns), or (rows, columns, 3) of color. Raises Rejected (UNDECODABLE) where the codestream
    differs from the header, UNSUPPORTED without a codec; any error of a codec otherwise.
    """
    if stored.transfer_syntax == RLE and not codestream.begins(data):
        return _run_lengths(data, stored), stored.photometric
    stream = codestream.read(data)
    check_codestream(stored, stream)
    array, photometric = _by_codec(data, stored, stream)
    if array.shape[:2] != (stored.rows, stored.columns):
        raise Rejected(Reason.UNDECODABLE, "the codec returned another shape")
    return _as_declared(array, stored, stream), photometric


def _by_codec(data: bytes, stored: Stored, stream: Codestream) -> tuple[Array, str]:
    """Decode with pydicom's plugins, or with libjpeg or GDCM alone where pydicom has none for the process."""
    syntax = stored.transfer_syntax
    if syntax not in _SYNTAXES[stream.kind]:
        syntax = _SYNTAXES[stream.kind][-1]
    if stream.kind is Kind.JPEG and stream.precision > 8:
        syntax = _EXTENDED
    if stream.kind is Kind.JPEG_PROGRESSIVE:
        if stored.samples == 1 and (syntax != _BASELINE or stream.precision > 8):
            return _libjpeg(data), stored.photometric
        # pydicom has no decoder for the retired syntaxes, but the one for baseline takes such streams.
        syntax = _BASELINE
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        raise Rejected(Reason.UNSUPPORTED, f"no decoder for {stream.kind}") from None
    if not decoder.is_available:
        raise Rejected(Reason.UNSUPPORTED, f"no decoder for {stream.kind} is installed")
    # Only luma and chroma are stored at different resolutions: such a stream is no RGB, whatever the header says.
    photometric = "YBR_FULL_422" if stream.subsampled and stored.photometric == "RGB" else stored.photometric
    # The codecs see the stream's own properties; the header's are applied to what they return.
    options: dict[str, Any] = {
        "rows": stored.rows,
        "columns": stored.columns,
        "samples_per_pixel": stored.samples,
        "number_of_frames": 1,
        "bits_allocated": 8 if stream.precision <= 8 else 16 if stream.precision <= 16 else 32,
        # GDCM aborts the process where samples of JPEG have fewer than 8 bits; the values are the same.
        "bits_stored": max(8, stream.precision) if stream.kind is Kind.JPEG_LOSSLESS else stream.precision,
        "pixel_representation": int(stream.signed),
        "photometric_interpretation": photometric,
        "planar_configuration": 0,
        "pixel_keyword": stored.keyword,
        "pixel_vr": stored.vr,
    }
    try:
        array, properties = decoder.as_array(encapsulate([data], has_bot=False), index=0, raw=True, **options)
    except Exception:
        if syntax != _EXTENDED or stored.samples != 1 or stream.precision <= 8:
            raise
        return _gdcm_12_bits(data, stored), stored.photometric
    return array, str(properties["photometric_interpretation"])


def _as_declared(array: Array, stored: Stored, stream: Codestream) -> Array:
    """Convert values to the signedness of the header: encoders may take either for the bits of the other.

    The sign is extended from Bits Stored; what lies above it means nothing.
    """
    if stored.signed and (not stream.signed or stream.precision > stored.bits_stored):
        size = 8 if stored.bits_allocated <= 8 else 16 if stored.bits_allocated <= 16 else stored.bits_allocated
        unused = size - stored.bits_stored
        extended: Array = np.right_shift(np.left_shift(array.astype(f"i{size // 8}"), unused), unused)
        return extended
    if stream.signed and not stored.signed:
        unsigned: Array = array.view(f"u{array.dtype.itemsize}") & ((1 << stream.precision) - 1)
        return unsigned
    return array


def _run_lengths(data: bytes, stored: Stored) -> Array:
    """Decode RLE (PS3.5 annex G): a segment for each byte of a sample, the most significant first."""
    from rle.rle import decode_segment

    count, *offsets = struct.unpack_from("<16L", data)
    wide, rest = divmod(count, stored.samples)
    # 8-bit samples under 16 allocated bits have one segment.
    if rest or wide not in (1, stored.bits_allocated // 8) or stored.bits_allocated % 8:
        raise Rejected(Reason.UNDECODABLE, f"{count} segments in the codestream")
    ends = [*offsets[1:count], len(data)]
    size = stored.rows * stored.columns
    planes = []
    for start, end in zip(offsets[:count], ends, strict=True):
        if not 64 <= start <= end:
            raise Rejected(Reason.UNDECODABLE, "segments out of order")
        plane = decode_segment(data[start:end])
        if not size <= len(plane) <= size + _RLE_PADDING or any(plane[size:]):
            raise Rejected(Reason.UNDECODABLE, f"{len(plane)} bytes in a segment, {size} pixels in the header")
        planes.append(np.frombuffer(plane, np.uint8, size))
    samples = [
        np.ascontiguousarray(np.stack(planes[first : first + wide][::-1], axis=-1)).view(f"<u{wide}")[..., 0]
        for first in range(0, count, wide)
    ]
    array = samples[0] if stored.samples == 1 else np.stack(samples, axis=-1)
    shape = (stored.rows, stored.columns)
    decoded: Array = array.reshape(shape if stored.samples == 1 else (*shape, stored.samples))
    decoded = decoded.astype(f"{'i' if stored.signed else 'u'}{stored.bits_allocated // 8}", copy=False)
    return significant_bits(decoded, stored, stored.high_bit)


def _libjpeg(data: bytes) -> Array:
    """Decode the retired progressive processes, for which pydicom has no decoder."""
    from libjpeg.utils import decode as decode_jpeg

    array: Array = decode_jpeg(data)
    return array


def _gdcm_12_bits(data: bytes, stored: Stored) -> Array:
    """Decode 12-bit JPEG Extended with GDCM: libjpeg refuses some valid streams, pydicom's GDCM plugin all of them."""
    import gdcm

    fragment = gdcm.Fragment()
    fragment.SetByteStringValue(data)
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
    image.SetPixelFormat(gdcm.PixelFormat(1, 16, 12, 11, 0))
    decoded = image.GetBuffer().encode("utf-8", "surrogateescape")
    return np.frombuffer(decoded, dtype=np.uint16).reshape(stored.rows, stored.columns)
