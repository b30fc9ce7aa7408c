"""Decode Pixel Data to stored values: native formats here, codestreams in compressed.py (PS3.5 section 8)."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from pydicom.dataset import Dataset
from pydicom.pixels.decoders.base import get_decoder

from cbmir_spark.dicom.compressed import decode_frame
from cbmir_spark.dicom.elements import Array
from cbmir_spark.dicom.preflight import DEFLATED, EXPLICIT_LITTLE, PIXEL_DATA_TAGS, Layout
from cbmir_spark.dicom.reasons import Reason, Rejected
from cbmir_spark.dicom.stored import NATIVE, Stored, fragments, significant_bits

__all__ = ["decode"]


def decode(ds: Dataset, layout: Layout, stored: Stored, frames: Iterable[int]) -> Iterator[tuple[int, Array, str]]:
    """Decode frames one at a time: (number, stored values, photometric interpretation after decoding) of each.

    Values are (rows, columns), or (rows, columns, 3) of color: integers of at least Bits Stored bits, sign extended,
    unused bits cleared; floats for (Double) Float Pixel Data. Raises Rejected: UNSUPPORTED without a codec for the
    transfer syntax, UNSUPPORTED_FORMAT without one for the packing of 12 bits, UNDECODABLE where the codec fails or the
    codestream is of another image than the header describes.
    """
    element = next(layout.elements[tag] for tag in PIXEL_DATA_TAGS if tag in layout.elements)
    data = layout.data[element.offset : element.offset + element.length]
    found = None if stored.is_native else fragments(ds, layout, element, stored.frames)
    for number in frames:
        try:
            if found is not None:
                array, photometric = decode_frame(found.frame(number), stored)
            elif stored.bits_allocated == 12:
                array, photometric = _unpack_12_bits(data, stored, number), stored.photometric
            else:
                array = _native(data, stored, number)
                photometric = "RGB" if stored.may_be_rgb and _is_rgb(array) else stored.photometric
        except (KeyboardInterrupt, SystemExit, MemoryError, Rejected):
            raise
        except BaseException as error:  # a panic of a Rust codec is not an Exception
            raise Rejected(Reason.UNDECODABLE, f"{type(error).__name__} in the codec") from None
        yield number, array, photometric


def _native(data: memoryview, stored: Stored, number: int) -> Array:
    """Read a frame of native pixel data: its samples in the order, byte order and bits that the header names."""
    syntax = stored.transfer_syntax if stored.transfer_syntax in NATIVE else EXPLICIT_LITTLE
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
        "correct_unused_bits": False,
    }
    decoder = get_decoder(EXPLICIT_LITTLE if syntax == DEFLATED else syntax)
    array, _ = decoder.as_array(data, index=number, raw=True, **options)
    if array.dtype.kind not in "ui":
        return array
    return significant_bits(array.astype(array.dtype.newbyteorder("="), copy=False), stored, stored.high_bit)


def _is_rgb(array: Array) -> bool:
    """Tell red, green and blue from luma and chroma (PS3.3 section C.7.6.3.1.2), of which many pixels are no color."""
    if array.dtype != np.uint8:
        return False
    luma, blue, red = (array[..., sample].astype(np.float32) for sample in range(3))
    blue, red = blue - 128, red - 128
    colors = (luma + 1.402 * red, luma - 0.344136 * blue - 0.714136 * red, luma + 1.772 * blue)
    # Some levels beyond the range are rounding.
    outside = np.logical_or.reduce([(color < -4) | (color > 259) for color in colors])
    return bool(outside.mean() > 0.01)


def _unpack_12_bits(data: memoryview, stored: Stored, frame: int) -> Array:
    """Unpack two samples from three bytes, the packing of ACR-NEMA and early DICOM (PS3.5 section D.1, retired)."""
    if not stored.is_native or not stored.little_endian or stored.samples != 1:
        raise Rejected(Reason.UNSUPPORTED_FORMAT, "12 bits allocated, in color or big endian")
    pixels = stored.rows * stored.columns
    if pixels % 2 and frame:
        raise Rejected(Reason.UNSUPPORTED_FORMAT, "12 bits allocated, and frames that end within a byte")
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
