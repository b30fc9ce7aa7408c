"""Stored values of DICOM files by decoders that the package does not use: DCMTK's commands, imagecodecs, numpy.

Raises Unreadable where a decoder cannot read a file.
"""

import re
import struct
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from tests.support.tools import require_tool

JPEG = tuple(f"1.2.840.10008.1.2.4.{part}" for part in (50, 51, 53, 55, 57, 70))
JPEG_LS = tuple(f"1.2.840.10008.1.2.4.{part}" for part in (80, 81))
JPEG_2000 = tuple(f"1.2.840.10008.1.2.4.{part}" for part in (90, 91))
HTJ2K = tuple(f"1.2.840.10008.1.2.4.{part}" for part in (201, 202, 203))
RLE = "1.2.840.10008.1.2.5"
# Colors as they are in the stream, by pixel.
_AS_STORED = ("+cn", "+px")


class Unreadable(Exception):
    """A decoder cannot read a file."""


@cache
def tool(name: str) -> Path:
    """Return a command of DCMTK."""
    return require_tool(name)


def decoders_of(syntax: str) -> tuple[str, ...]:
    """Return the decoders of a transfer syntax, by their names in `frames_of`."""
    if syntax in JPEG_2000 + HTJ2K:
        return ("imagecodecs",)
    if syntax in JPEG + JPEG_LS:
        return ("dcmdjpeg" if syntax in JPEG else "dcmdjpls"), "imagecodecs"
    return ("dcmdrle" if syntax == RLE else "dcmconv",)


def frames_of(path: Path, decoder: str, frames: int, scratch: Path) -> Iterator[NDArray[Any]]:
    """Decode the frames of a file: (rows, columns) or (rows, columns, 3) each."""
    if decoder == "imagecodecs":
        yield from _by_imagecodecs(path, frames)
        return
    out = scratch / "decoded.dcm"
    out.unlink(missing_ok=True)
    options = {"dcmdjpeg": _AS_STORED, "dcmdjpls": ("+px",)}.get(decoder, ())
    command = [str(tool(decoder)), "-q", *options, "+te", str(path), str(out)]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode or not out.is_file():
        raise Unreadable(f"{decoder} ends with status {done.returncode}")
    yield from native_frames(pydicom.dcmread(out, force=True), has_unused_bits=decoder in ("dcmconv", "dcmdrle"))


def _by_imagecodecs(path: Path, frames: int) -> Iterator[NDArray[Any]]:
    ds = pydicom.dcmread(path, force=True)
    for data in _codestreams(path.read_bytes(), frames):
        try:
            array = np.asarray(_decoded(data), np.int64)
        except RuntimeError as error:
            raise Unreadable(str(error)) from None
        yield _signed(array, ds.BitsStored) if ds.get("PixelRepresentation", 0) else array


def _codestreams(content: bytes, frames: int) -> list[bytes]:
    """Split the last Pixel Data of a file at its items, each of them a frame, or all of them one."""
    starts = [match.end() for match in re.finditer(rb"\xe0\x7f\x10\0(?:O[BW]\0\0)?\xff{4}(?=\xfe\xff\0\xe0)", content)]
    if not starts:
        raise Unreadable("no fragments")
    at = starts[-1]
    found = []
    while content[at : at + 4] == b"\xfe\xff\x00\xe0":
        (length,) = struct.unpack_from("<L", content, at + 4)
        found.append(content[at + 8 : at + 8 + length])
        at += 8 + length
    if frames == 1:
        return [b"".join(found[1:])]
    if len(found) != frames + 1:
        raise Unreadable("several fragments of a frame")
    return found[1:]


def _decoded(data: bytes) -> NDArray[Any]:
    if data[:2] != b"\xff\xd8":
        (profile,) = struct.unpack_from(">H", data, data.index(b"\xff\x4f\xff\x51") + 6)
        return (imagecodecs.htj2k_decode if profile & 0x4000 else imagecodecs.jpeg2k_decode)(data)
    try:
        return imagecodecs.jpegls_decode(data)
    except imagecodecs.JpeglsError:
        gray = imagecodecs.jpeg8_decode(data)
        # The same color on both sides: as it is in the stream.
        return gray if gray.ndim == 2 else imagecodecs.jpeg8_decode(data, colorspace="RGB", outcolorspace="RGB")


def native_frames(ds: Dataset, has_unused_bits: bool) -> Iterator[NDArray[Any]]:
    """Read native little endian pixel data (PS3.5 section 8.1.1)."""
    rows, columns, samples = ds.Rows, ds.Columns, int(ds.get("SamplesPerPixel", 1))
    shape = (rows, columns) if samples == 1 else (rows, columns, samples)
    size = rows * columns * samples
    for number in range(int(ds.get("NumberOfFrames", 1) or 1)):
        for keyword, kind in (("FloatPixelData", "<f4"), ("DoubleFloatPixelData", "<f8")):
            if keyword in ds:
                yield np.frombuffer(ds[keyword].value, kind)[number * size :][:size].reshape(shape)
                break
        else:
            yield _integers(ds, number, size, samples, shape, has_unused_bits)


def _integers(
    ds: Dataset, number: int, size: int, samples: int, shape: tuple[int, ...], has_unused_bits: bool
) -> NDArray[np.int64]:
    allocated, stored = ds.BitsAllocated, int(ds.get("BitsStored") or ds.BitsAllocated)
    if allocated == 1:
        bits = np.unpackbits(np.frombuffer(ds.PixelData, np.uint8), bitorder="little")
        return bits[number * size :][:size].reshape(shape).astype(np.int64)
    if allocated not in (8, 16, 32):
        raise Unreadable(f"{allocated} bits allocated")
    raw = np.frombuffer(ds.PixelData, f"<u{allocated // 8}").astype(np.int64)
    if ds.PhotometricInterpretation == "YBR_FULL_422" and len(raw) < int(ds.get("NumberOfFrames", 1) or 1) * size:
        raw = _whole_chroma(raw)
    raw = raw[number * size :][:size]
    if samples > 1 and ds.get("PlanarConfiguration", 0):
        raw = np.moveaxis(raw.reshape(samples, *shape[:2]), 0, -1)
    high = int(ds.get("HighBit", stored - 1))
    values = raw.reshape(shape) >> (high + 1 - stored if stored - 1 <= high < allocated else 0)
    if ds.get("PixelRepresentation", 0):
        return _signed(values, stored)
    # What a codec decodes beyond Bits Stored is a value, not an overlay.
    return values & (2**stored - 1) if has_unused_bits else values


def _whole_chroma(raw: NDArray[np.int64]) -> NDArray[np.int64]:
    """Repeat the chroma of two pixels, Y1 Y2 Cb Cr (PS3.3 section C.7.6.3.1.2)."""
    pairs = raw[: len(raw) // 4 * 4].reshape(-1, 4)
    return pairs[:, [0, 2, 3, 1, 2, 3]].reshape(-1)


def _signed(values: NDArray[np.int64], bits: int) -> NDArray[np.int64]:
    low = values & (2**bits - 1)
    extended: NDArray[np.int64] = np.where(low >= 2 ** (bits - 1), low - 2**bits, low)
    return extended
