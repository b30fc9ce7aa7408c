"""Small DICOM files that ask for too much, or whose headers and codestreams lie about themselves."""

import io
import struct
import zipfile
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence as Items
from pydicom.uid import UID

from cbmir_spark.dicom import preflight
from tests.support.damaged import pixel_end
from tests.support.dicom_files import TINY, ULTRASOUND, header, header_offset, item, made, real, written

_RLE = "MR_small_RLE.dcm"
_ROWS, _SAMPLES_PER_PIXEL = 0x00280010, 0x00280002

# The start of a sequence, and of an item, of undefined length.
SEQUENCE = struct.pack("<HH2sxxL", 0x0008, 0x1140, b"SQ", 0xFFFFFFFF)
ITEM = struct.pack("<HHL", 0xFFFE, 0xE000, 0xFFFFFFFF)
_END_OF_ITEM = struct.pack("<HHL", 0xFFFE, 0xE00D, 0)
_END_OF_SEQUENCE = struct.pack("<HHL", 0xFFFE, 0xE0DD, 0)


# --- headers ---


def nameless(pixel_values: NDArray[Any]) -> bytes:
    """Make an object whose SOP Instance UID is empty, and no UID in the file meta information either."""
    content = made(pixel_values, SOPInstanceUID="")
    uid = str(header(content).file_meta.MediaStorageSOPInstanceUID).encode()
    return content.replace(uid, b"A" * len(uid))


def patched(keyword: str, value: object, **elements: object) -> bytes:
    """A sound file whose header then lies about its pixels."""
    ds = header(made(TINY, **elements))
    setattr(ds, keyword, value)
    return written(ds)


def encapsulated(frames: int, **elements: object) -> bytes:
    """A compressed file with another number of frames, or other elements, in its header."""
    ds = header(real(_RLE))
    ds.NumberOfFrames = frames
    for keyword, value in elements.items():
        setattr(ds, keyword, value)
    return written(ds)


def with_bytes(content: bytes, tag: int, raw: bytes) -> bytes:
    """The file with other raw bytes as the value of an element that has a 16-bit length."""
    element = preflight.examine(content).elements[tag]
    before, after = content[: element.offset - 2], content[element.offset + element.length :]
    return before + struct.pack("<H", len(raw)) + raw + after


def with_regions(*edges: int) -> bytes:
    """An ultrasound with one region, from (MinX0, MinY0) to (MaxX1, MaxY1)."""
    names = ("MinX0", "MinY0", "MaxX1", "MaxY1")
    region = item(RegionSpatialFormat=1, **{f"RegionLocation{n}": e for n, e in zip(names, edges, strict=True)})
    values = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    return made(values, SOPClassUID=ULTRASOUND, Modality="US", SequenceOfUltrasoundRegions=Items([region]))


def with_modality_lut(**elements: object) -> bytes:
    lut = item(ModalityLUTType="US", **elements)
    for keyword in elements:
        lut[keyword].VR = "US"
    ds = header(made(TINY, Modality="MR"))
    ds.ModalityLUTSequence = Items([lut])
    return written(ds)


def directory() -> bytes:
    """A media directory whose records point out of its folder (CVE-2026-32711)."""
    ds = header(real("DICOMDIR"))
    for record in ds.DirectoryRecordSequence:
        if "ReferencedFileID" in record:
            record.ReferencedFileID = ["..", "..", "..", "ETC", "PASSWD"]
    return written(ds)


# --- structure ---


def _inserted(content: bytes, tag: int, between: bytes) -> bytes:
    """The file with more bytes before one of its elements."""
    at = preflight.examine(content).elements[tag].header
    return content[:at] + between + content[at:]


def deep(levels: int) -> bytes:
    """Sequences of undefined length, one within the other."""
    return _inserted(
        made(TINY), _SAMPLES_PER_PIXEL, (SEQUENCE + ITEM) * levels + (_END_OF_ITEM + _END_OF_SEQUENCE) * levels
    )


def deep_by_length(levels: int) -> bytes:
    """Functional groups, one within the other, all of defined length."""
    inner = b""
    for _ in range(levels):
        inner = struct.pack("<HHL", 0xFFFE, 0xE000, len(inner)) + inner
        inner = struct.pack("<HH2sxxL", 0x5200, 0x9229, b"SQ", len(inner)) + inner
    return _inserted(made(TINY), preflight.PIXEL_DATA, inner)


def unclosed(*opening: bytes) -> bytes:
    """A sound file into which an undefined length was opened, before its rows, and never closed."""
    return _inserted(made(TINY), _ROWS, b"".join(opening))


def huge_length() -> bytes:
    """Pixel data that declares 4 GB."""
    content = made(TINY)
    at = preflight.examine(content).elements[preflight.PIXEL_DATA].offset
    return content[: at - 4] + struct.pack("<L", 0xFFFFFFFE) + content[at:]


def private_block(size: int) -> bytes:
    """A private element of so many zeros, all there."""
    return _inserted(made(TINY), _ROWS, struct.pack("<HH2sxxL", 0x0009, 0x1001, b"OB", size) + bytes(size))


def many_elements(count: int) -> bytes:
    private = b"".join(struct.pack("<HH2sH", 0x0009, number % 65536, b"LO", 0) for number in range(count))
    return _inserted(made(TINY), _ROWS, private)


# --- palettes ---


def palette(descriptor: Sequence[int], data: bytes | None, segmented: bytes | None = None) -> bytes:
    elements: dict[str, object] = {}
    for color in ("Red", "Green", "Blue"):
        elements[f"{color}PaletteColorLookupTableDescriptor"] = list(descriptor)
        elements[f"{color}PaletteColorLookupTableData"] = data
        elements[f"Segmented{color}PaletteColorLookupTableData"] = segmented
    values = np.arange(64, dtype=np.uint8).reshape(8, 8)
    return made(values, Modality="US", PhotometricInterpretation="PALETTE COLOR", **elements)


def palette_bomb() -> bytes:
    """A first value, then linear segments that one indirect segment repeats: 20,000 times 65,535 entries."""
    count = 20_000
    words = [0, 1, 7, 2, count, 14, 0, *([1, 65535, 9] * count)]
    return palette([0, 0, 16], None, struct.pack(f"<{len(words)}H", *words))


# --- compressed data ---


def deflated(body: bytes) -> bytes:
    """File meta information of the deflated transfer syntax, and any bytes behind it."""
    ds = header(made(TINY))
    ds.file_meta.TransferSyntaxUID = UID(preflight.DEFLATED)
    content = written(ds)
    start = 132 + 12 + header(content).file_meta.FileMetaInformationGroupLength
    return content[:start] + body


def deflate_bomb() -> bytes:
    """A megabyte that inflates to a gigabyte of zeros."""
    squeeze = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    opening = squeeze.compress(struct.pack("<HH2sxxL", 0x0009, 0x1001, b"OB", 2**30)) + squeeze.flush(zlib.Z_FULL_FLUSH)
    # After a full flush a block stands alone, so one of 16 MiB can be repeated 64 times.
    zeros = squeeze.compress(bytes(2**24)) + squeeze.flush(zlib.Z_FULL_FLUSH)
    return deflated(opening + zeros * 64 + squeeze.flush())


def with_stream_size(name: str, find: bytes, skip: int, form: str, *lie: int) -> bytes:
    """A compressed file whose codestream gives another size: `lie` is packed `skip` bytes behind a marker."""
    content = bytearray(real(name))
    struct.pack_into(form, content, content.index(find) + skip, *lie)
    return bytes(content)


def rle_offsets(*offsets: int) -> bytes:
    """An RLE frame whose header (PS3.5 section G.5) gives the count of its segments, then their offsets."""
    ds = header(real(_RLE))
    ds.PixelData = encapsulate([struct.pack("<16L", *offsets, *[0] * (16 - len(offsets))) + bytes(256)])
    return written(ds)


def offset_table(lie: int) -> bytes:
    """Two frames, the second one at any offset."""
    ds = header(real(_RLE))
    ds.NumberOfFrames = 2
    fragment = next(pydicom.encaps.generate_fragments(ds.PixelData[header_offset(real(_RLE)) :]))
    data = bytearray(encapsulate([fragment, fragment]))
    struct.pack_into("<LL", data, 8, 0, lie)
    ds.PixelData = bytes(data)
    ds.SOPInstanceUID = UID(f"1.2.3.{lie}")
    return written(ds)


def many_fragments(count: int) -> bytes:
    ds = header(real(_RLE))
    ds.PixelData = ds.PixelData + struct.pack("<HHL", 0xFFFE, 0xE000, 0) * count
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = UID(f"1.2.3.{count}")
    return written(ds)


def without_delimiter(content: bytes) -> bytes:
    """Encapsulated pixel data without its delimiter, and nothing behind it."""
    return content[: pixel_end(content) - 8]


def zipped(content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("one.dcm", content)
    return buffer.getvalue()
