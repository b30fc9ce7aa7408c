"""Headers around codestreams, what both together mean, and objects of them: agreeing, contradicting, damaged."""

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID

from tests.support.dicom_files import CT, written
from tests.support.streams import ROOT, Stream

NATIVE = "1.2.840.10008.1.2.1"


@dataclass(frozen=True)
class Header:
    """The Image Pixel module and the transfer syntax around codestreams."""

    syntax: str
    rows: int
    columns: int
    samples: int
    allocated: int
    stored: int
    high: int
    signed: bool
    photometric: str
    planar: int = 0
    frames: int = 1


def is_rgb(stream: Stream, declared: str) -> bool:
    """Tell decoded samples of red, green and blue from luma and chroma: what the stream names counts first."""
    if stream.color or stream.subsampled:
        return stream.color == "RGB"
    # JPEG 2000 transforms its colors back.
    transformed = stream.codec.name.startswith(("JPEG 2000", "HTJ2K")) and declared in ("YBR_ICT", "YBR_RCT")
    return declared == "RGB" or transformed


def agreeing(stream: Stream, option: int = 0) -> Header:
    """Return a header that says the same as a stream."""
    color = "YBR_FULL_422" if stream.subsampled else "YBR_FULL" if stream.color == "YCBCR" else "RGB"
    return Header(
        syntax=stream.codec.syntaxes[option % len(stream.codec.syntaxes)],
        rows=stream.values.shape[0],
        columns=stream.values.shape[1],
        samples=stream.samples,
        allocated=8 if stream.depth <= 8 else 16 if stream.depth <= 16 else 32,
        stored=stream.depth,
        high=stream.depth - 1,
        signed=stream.signed,
        photometric="MONOCHROME2" if stream.samples == 1 else color,
    )


def meaning(stream: Stream, header: Header) -> NDArray[np.int64] | None:
    """Return the stored values that a stream has under a header; None where they contradict each other."""
    if stream.codec.name == "RLE":
        return _run_length_meaning(stream, header)
    shape = stream.values.shape[:2]
    if stream.samples != header.samples or shape not in ((header.rows, header.columns), (header.columns, header.rows)):
        return None
    if stream.depth > header.allocated:
        return None
    if header.signed and (not stream.signed or stream.depth > header.stored):
        return signed(stream.values, header.stored)
    return stream.values & (2**stream.depth - 1) if stream.signed and not header.signed else stream.values


def _run_length_meaning(stream: Stream, header: Header) -> NDArray[np.int64] | None:
    """RLE says neither rows nor columns, and PS3.5 section 8.1.1 applies to its bits as to native ones."""
    if stream.samples != header.samples or stream.depth not in (8, header.allocated):
        return None
    pixels = stream.values.reshape(-1, stream.samples)
    size = header.rows * header.columns
    # Zeros behind the samples may be padding.
    if not size <= len(pixels) <= size + 3 or pixels[size:].any():
        return None
    pixels = pixels[:size]
    values = pixels.reshape((header.rows, header.columns) if header.samples == 1 else (header.rows, header.columns, 3))
    shift = max(0, header.high - header.stored + 1) if header.high < header.allocated else 0
    values = values >> shift
    return signed(values, header.stored) if header.signed else values & (2**header.stored - 1)


def signed(values: NDArray[np.int64], bits: int) -> NDArray[np.int64]:
    """Take the lowest bits for two's complement."""
    low = values & (2**bits - 1)
    extended: NDArray[np.int64] = np.where(low >= 2 ** (bits - 1), low - 2**bits, low)
    return extended


def difference(found: NDArray[Any], wanted: NDArray[np.int64], stream: Stream, header: Header) -> int:
    """Return the largest difference of stored values; where a lossy codec rounds, the sign bit may change with it."""
    apart = np.abs(found.astype(np.int64) - wanted)
    if stream.codec.bound and header.signed:
        half = 2 ** (header.stored - 1)
        at_ends = (found >= -half) & (found < half) & (apart >= half)
        apart = np.where(at_ends, 2 * half - apart, apart)
    return int(apart.max())


def item(data: bytes) -> bytes:
    """Return an item of encapsulated pixel data."""
    return b"\xfe\xff\x00\xe0" + struct.pack("<L", len(data)) + data


def padded(fragment: bytes) -> bytes:
    return fragment + b"\0" * (len(fragment) % 2)


def offsets(frames: list[list[bytes]], kind: str) -> list[int]:
    """Return an offset table for frames of fragments: none, a right one, or one wrong in some way."""
    parts = [len(item(padded(fragment))) for frame in frames for fragment in frame]
    places = np.cumsum([0, *parts]).tolist()
    firsts = np.cumsum([0, *map(len, frames[:-1])]).tolist()
    right = [places[first] for first in firsts]
    return {
        "none": [],
        "right": right,
        "shifted": [place + 2 for place in right],
        "next": [0, *(places[min(first + 1, len(parts) - 1)] for first in firsts[1:])],
        "zeros": [0] * len(right),
        "short": right[:-1],
    }[kind]


def encapsulated(frames: list[list[bytes]], table: str = "none") -> bytes:
    """Encapsulate frames of fragments with a Basic Offset Table."""
    listed = offsets(frames, table)
    parts = [item(padded(fragment)) for frame in frames for fragment in frame]
    return item(struct.pack(f"<{len(listed)}L", *listed)) + b"".join(parts)


def object_of(header: Header, frames: list[list[bytes]], table: str = "none", extended: str = "none") -> bytes:
    """Write an object around frames of fragments, with a Basic and an Extended Offset Table."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    # pydicom would not encapsulate under a native syntax.
    written_as = f"{ROOT}50" if header.syntax == NATIVE else header.syntax
    ds.file_meta.TransferSyntaxUID = UID(written_as)
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = UID(CT)
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = UID("1.2.3.4")
    ds.Rows, ds.Columns, ds.SamplesPerPixel = header.rows, header.columns, header.samples
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = header.allocated, header.stored, header.high
    ds.PixelRepresentation = int(header.signed)
    ds.PhotometricInterpretation = header.photometric
    ds.PlanarConfiguration = header.planar
    ds.NumberOfFrames = header.frames
    if extended != "none":
        places = offsets(frames, extended)
        sizes = [sum(map(len, frame)) for frame in frames][: len(places)]
        ds.ExtendedOffsetTable = struct.pack(f"<{len(places)}Q", *places)
        ds.ExtendedOffsetTableLengths = struct.pack(f"<{len(sizes)}Q", *sizes)
    ds.PixelData = encapsulated(frames, table)
    ds["PixelData"].VR = "OB"
    ds["PixelData"].is_undefined_length = True
    return written(ds).replace(written_as.encode(), header.syntax.encode().ljust(len(written_as), b"\0"), 1)
