"""Files that were damaged, and files that were built to do harm; pydicom and numpy, no Spark.

Damage is done to real files: those that pydicom's package carries, and the shared ones where they are present. The
same number always gives the same damage. What was built says beside it what has to become of it.
"""

import gzip
import io
import random
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import pydicom
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence as Items
from pydicom.uid import UID

from cbmir_spark.dicom import preflight
from cbmir_spark.dicom.read import NotAnImage, Reason, Rejected, read_instance
from cbmir_spark.lake import columns as cols
from tests.conftest import REPO
from tests.dicom.test_decoder import faulty
from tests.dicom.test_read import (
    PREPROCESSING,
    TINY,
    ULTRASOUND,
    VOCABULARY,
    deep,
    deflate_bomb,
    encapsulated,
    header,
    header_offset,
    huge_length,
    item,
    made,
    patched,
    pixel_end,
    real,
    written,
)

# Small files go through the job fast, and a random place in them is seldom in the middle of their pixels.
MOST_BYTES = 40_000


@cache
def real_files() -> tuple[bytes, ...]:
    """Whole small DICOM files of every kind, images or not, each content once."""
    bundled = Path(str(get_testdata_file("CT_small.dcm"))).parent
    folders = (bundled, REPO.parent / "shared" / "data" / "dicom")
    paths = sorted(path for folder in folders if folder.is_dir() for path in folder.rglob("*"))
    small = [path.read_bytes() for path in paths if path.is_file() and path.stat().st_size <= MOST_BYTES]
    return tuple(dict.fromkeys(content for content in small if content[128:132] == b"DICM"))


@cache
def images() -> tuple[bytes, ...]:
    """Those of `real_files` that give a picture while they are whole."""
    found = []
    for content in real_files():
        with suppress(NotAnImage, Rejected):
            read_instance(content, PREPROCESSING, VOCABULARY)
            found.append(content)
    return tuple(found)


@cache
def _length_fields(content: bytes) -> tuple[tuple[int, str], ...]:
    """(position, struct format) of lengths of elements and items; found by their looks, not by a parser."""
    found = []
    for match in re.finditer(rb"(?:OB|OW|SQ|UN|UT)\0\0", content):
        found.append((match.end(), "<L"))
    for match in re.finditer(rb"(?:AE|AS|CS|DA|DS|IS|LO|PN|SH|UI|US)(?=..)", content, re.DOTALL):
        found.append((match.end(), "<H"))
    for match in re.finditer(rb"\xfe\xff[\x00\x0d\xdd]\xe0(?=....)", content, re.DOTALL):
        found.append((match.end(), "<L"))
    return tuple(place for place in found if place[0] + struct.calcsize(place[1]) <= len(content))


def mutant(number: int) -> bytes:
    """One damaged file: flipped bits, overwritten bytes, a cut, a piece of another file, or a length that lies.

    Every other one is an image, and half of the flips and overwrites of those fall into their pixels, where the codecs
    are: most other damage is noticed before any codec sees it.
    """
    chance = random.Random(f"mutant {number}")
    kind = number % 5
    content = bytearray(chance.choice(images() if number % 2 else real_files()))
    start = 132 if chance.random() < 0.9 else 0
    if number % 2 and kind < 2 and chance.random() < 0.5:
        start = max(start, content.rfind(b"\xe0\x7f\x10\0") + 12)
    start = min(start, len(content) - 1)
    if kind == 0:
        for _ in range(chance.choice((1, 1, 3, 20, 200))):
            content[chance.randrange(start, len(content))] ^= 1 << chance.randrange(8)
    elif kind == 1:
        for _ in range(chance.choice((1, 3, 20))):
            at, length = chance.randrange(start, len(content)), chance.choice((1, 2, 4, 8, 64))
            worst = chance.choice((b"\x00", b"\xff", b"\x7f", b"\x80", bytes([chance.randrange(256)])))
            content[at : at + length] = worst * length
    elif kind == 2:
        at = chance.randrange(start, len(content))
        end = len(content) if chance.random() < 0.5 else min(len(content), at + chance.choice((1, 2, 8, 100, 2000)))
        del content[at:end]
    elif kind == 3:
        other = chance.choice(real_files())
        at, source = chance.randrange(start, len(content)), chance.randrange(len(other))
        if chance.random() < 0.5:
            content[at:] = other[source:]
        else:
            length = chance.choice((4, 16, 200, 5000))
            content[at : at + length] = other[source : source + length]
    elif fields := _length_fields(bytes(content)):
        for _ in range(chance.choice((1, 1, 2))):
            at, form = chance.choice(fields)
            top = 2 ** (8 * struct.calcsize(form)) - 1
            (old,) = struct.unpack_from(form, content, at)
            lie = chance.choice(
                (0, 1, old - 1, old + 1, old + 2, 2 * old, top, top - 1, top // 2, chance.randrange(top))
            )
            struct.pack_into(form, content, at, lie & top)
    return bytes(content)


def cut(number: int) -> tuple[bytes, bytes]:
    """A real image, and what is left of it when it is cut somewhere from byte 140 on."""
    chance = random.Random(f"cut {number}")
    content = chance.choice(images())
    return content, content[: chance.randrange(140, len(content))]


def lost_only_padding(content: bytes, left: int) -> bool:
    """Whether nothing but padding followed the first `left` bytes.

    Padding is what PS3.10 section 7.2 allows behind the data set: the element Data Set Trailing Padding (FFFC,FFFC),
    or zeros; and what follows a deflated stream, which belongs to no data set.
    """
    end = pixel_end(content)
    behind = content[end:]
    deflated = header(content).file_meta.TransferSyntaxUID == preflight.DEFLATED
    is_padding = deflated or not any(behind) or behind[:4] in (b"\xfc\xff\xfc\xff", b"\xff\xfc\xff\xfc")
    return left >= end and is_padding


# --- bombs and lies --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trap:
    """A file, and what may become of it. Codecs may see through a lie in one way or another, so reasons are a set."""

    content: Callable[[], bytes]
    outcome: str
    reasons: frozenset[str | None]


def _rejected(content: Callable[[], bytes], *reasons: Reason) -> Trap:
    return Trap(content, cols.REJECTED, frozenset(str(reason) for reason in reasons))


def _no_image(content: Callable[[], bytes], reason: Reason) -> Trap:
    return Trap(content, cols.NOT_AN_IMAGE, frozenset({str(reason)}))


def _harmless(content: Callable[[], bytes]) -> Trap:
    return Trap(content, cols.INGESTED, frozenset({None}))


def _with_bytes(content: bytes, tag: int, raw: bytes) -> bytes:
    """The file with other raw bytes as the value of an element that has a 16-bit length."""
    element = preflight.examine(content).elements[tag]
    before, after = content[: element.offset - 2], content[element.offset + element.length :]
    return before + struct.pack("<H", len(raw)) + raw + after


def _opened(*opening: bytes) -> bytes:
    """A sound file into which an undefined length was opened, before its rows, and never closed."""
    content = made(TINY)
    at = preflight.examine(content).elements[0x00280010].header
    return content[:at] + b"".join(opening) + content[at:]


_SEQUENCE = struct.pack("<HH2sxxL", 0x0008, 0x1140, b"SQ", 0xFFFFFFFF)
_ITEM = struct.pack("<HHL", 0xFFFE, 0xE000, 0xFFFFFFFF)


def _nested_by_length(levels: int) -> bytes:
    """Functional groups within functional groups, all of defined length."""
    inner = b""
    for _ in range(levels):
        inner = struct.pack("<HHL", 0xFFFE, 0xE000, len(inner)) + inner
        inner = struct.pack("<HH2sxxL", 0x5200, 0x9229, b"SQ", len(inner)) + inner
    content = made(TINY)
    at = preflight.examine(content).elements[preflight.PIXEL_DATA].header
    return content[:at] + inner + content[at:]


def _palette(descriptor: Sequence[int], data: bytes | None, segmented: bytes | None = None) -> bytes:
    elements: dict[str, object] = {}
    for color in ("Red", "Green", "Blue"):
        elements[f"{color}PaletteColorLookupTableDescriptor"] = list(descriptor)
        elements[f"{color}PaletteColorLookupTableData"] = data
        elements[f"Segmented{color}PaletteColorLookupTableData"] = segmented
    values = np.arange(64, dtype=np.uint8).reshape(8, 8)
    return made(values, Modality="US", PhotometricInterpretation="PALETTE COLOR", **elements)


def _palette_bomb() -> bytes:
    """A first value, then linear segments that one indirect segment asks for: a thousand million entries of 65536."""
    count = 20_000
    words = [0, 1, 7, 2, count, 14, 0, *([1, 65535, 9] * count)]
    return _palette([0, 0, 16], None, struct.pack(f"<{len(words)}H", *words))


def _deflated(body: bytes) -> bytes:
    ds = header(made(TINY))
    ds.file_meta.TransferSyntaxUID = UID(preflight.DEFLATED)
    content = written(ds)
    start = 132 + 12 + header(content).file_meta.FileMetaInformationGroupLength
    return content[:start] + body


def _stream(name: str, find: bytes, skip: int, form: str, *lie: int) -> bytes:
    """A compressed file whose codestream gives another size: `lie` is packed `skip` bytes behind a marker."""
    content = bytearray(real(name))
    at = content.index(find) + skip
    struct.pack_into(form, content, at, *lie)
    return bytes(content)


def _rle_offsets(*offsets: int) -> bytes:
    ds = pydicom.dcmread(io.BytesIO(real("MR_small_RLE.dcm")))
    ds.PixelData = encapsulate([struct.pack("<16L", *offsets, *[0] * (16 - len(offsets))) + bytes(256)])
    return written(ds)


def _many_elements(count: int) -> bytes:
    content = made(TINY)
    at = preflight.examine(content).elements[0x00280010].header
    private = b"".join(struct.pack("<HH2sH", 0x0009, number % 65536, b"LO", 0) for number in range(count))
    return content[:at] + private + content[at:]


def _many_fragments(count: int) -> bytes:
    ds = pydicom.dcmread(io.BytesIO(real("MR_small_RLE.dcm")))
    ds.PixelData = ds.PixelData + struct.pack("<HHL", 0xFFFE, 0xE000, 0) * count
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = UID(f"1.2.3.{count}")
    return written(ds)


def _not_closed(content: bytes) -> bytes:
    """Encapsulated pixel data without its delimiter, and nothing behind it."""
    return content[: pixel_end(content) - 8]


def _directory() -> bytes:
    """A media directory whose records point out of its folder (CVE-2026-32711)."""
    ds = header(real("DICOMDIR"))
    for record in ds.DirectoryRecordSequence:
        if "ReferencedFileID" in record:
            record.ReferencedFileID = ["..", "..", "..", "ETC", "PASSWD"]
    return written(ds)


def _offset_table(lie: int) -> bytes:
    ds = pydicom.dcmread(io.BytesIO(real("MR_small_RLE.dcm")))
    ds.NumberOfFrames = 2
    fragment = next(pydicom.encaps.generate_fragments(ds.PixelData[header_offset(real("MR_small_RLE.dcm")) :]))
    ds.PixelData = encapsulate([fragment, fragment])
    data = bytearray(ds.PixelData)
    struct.pack_into("<LL", data, 8, 0, lie)
    ds.PixelData = bytes(data)
    ds.SOPInstanceUID = f"1.2.3.{lie}"
    return written(ds)


def _zipped(content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("one.dcm", content)
    return buffer.getvalue()


def _regions(*edges: int) -> bytes:
    names = ("MinX0", "MinY0", "MaxX1", "MaxY1")
    region = item(RegionSpatialFormat=1, **{f"RegionLocation{n}": e for n, e in zip(names, edges, strict=True)})
    values = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    return made(values, SOPClassUID=ULTRASOUND, Modality="US", SequenceOfUltrasoundRegions=Items([region]))


def _lut(**elements: object) -> bytes:
    lut = item(ModalityLUTType="US", **elements)
    for keyword in elements:
        lut[keyword].VR = "US"
    ds: Dataset = header(made(TINY, Modality="MR"))
    ds.ModalityLUTSequence = Items([lut])
    return written(ds)


def _private_block(size: int) -> bytes:
    content = made(TINY)
    at = preflight.examine(content).elements[0x00280010].header
    return content[:at] + struct.pack("<HH2sxxL", 0x0009, 0x1001, b"OB", size) + bytes(size) + content[at:]


def traps() -> dict[str, Trap]:
    """All bombs and lies by name. Deaths of codecs are `faulty` ones: they need that codec in the child."""
    whole = made(TINY)
    small = real("MR_small_RLE.dcm")
    return {
        # Bombs: little to read, much to hold.
        "deflate bomb": _rejected(deflate_bomb, Reason.TOO_LARGE),
        "65535 squared": _rejected(lambda: encapsulated(1, Rows=65535, Columns=65535), Reason.TOO_LARGE),
        "65535 squared by 1000": _rejected(lambda: encapsulated(1000, Rows=65535, Columns=65535), Reason.TOO_LARGE),
        "65535 squared, native": _rejected(
            lambda: patched("Rows", 65535, Columns=65535), Reason.TRUNCATED, Reason.TOO_LARGE
        ),
        "2000 deep": _rejected(lambda: deep(2000), Reason.TOO_LARGE),
        "2000 deep, cut": _rejected(lambda: deep(2000)[:-300], Reason.TOO_LARGE),
        "2000 deep by length": _harmless(lambda: _nested_by_length(2000)),
        "half a million elements": _rejected(lambda: _many_elements(500_001), Reason.TOO_LARGE),
        "a hundred thousand fragments": _harmless(lambda: _many_fragments(100_000)),
        "palette bomb": _harmless(_palette_bomb),
        "private block of 64 MB": _harmless(lambda: _private_block(64 * 2**20)),
        "object over the limit": _rejected(lambda: _private_block(101 * 2**20), Reason.TOO_LARGE),
        # Lengths that lie.
        "huge length": _rejected(huge_length, Reason.TRUNCATED),
        "private length of 4 GB": _rejected(
            lambda: _opened(struct.pack("<HH2sxxL", 0x0009, 0x1001, b"OB", 0xFFFFFFF0)), Reason.TRUNCATED
        ),
        "sequence never closed": _rejected(lambda: _opened(_SEQUENCE, _ITEM), Reason.TRUNCATED, Reason.MALFORMED),
        "sequence without items": _rejected(lambda: _opened(_SEQUENCE), Reason.TRUNCATED, Reason.MALFORMED),
        "pixels never closed": _rejected(lambda: _not_closed(small), Reason.TRUNCATED),
        # Pixel modules that lie.
        "1000 frames": _rejected(lambda: patched("NumberOfFrames", 1000), Reason.TRUNCATED),
        "2 thousand million frames": _rejected(lambda: encapsulated(2**31 - 1), Reason.TRUNCATED),
        "minus one frame": _rejected(lambda: patched("NumberOfFrames", -1), Reason.MALFORMED),
        "frames as text": _rejected(
            lambda: _with_bytes(made(np.stack([TINY, TINY])), 0x00280008, b"manyfrms"), Reason.MALFORMED
        ),
        "zero rows": _rejected(lambda: patched("Rows", 0), Reason.MALFORMED),
        "zero columns": _rejected(lambda: patched("Columns", 0), Reason.MALFORMED),
        "rows of two values": _rejected(
            lambda: _with_bytes(whole, 0x00280010, struct.pack("<HH", 60000, 8)), Reason.TRUNCATED, Reason.MALFORMED
        ),
        "seven bits": _rejected(lambda: patched("BitsAllocated", 7), Reason.UNSUPPORTED),
        "64 bits": _rejected(lambda: patched("BitsAllocated", 64), Reason.TRUNCATED),
        "four samples": _rejected(lambda: patched("SamplesPerPixel", 4), Reason.UNSUPPORTED),
        "CMYK": _rejected(lambda: patched("PhotometricInterpretation", "CMYK"), Reason.UNSUPPORTED),
        "no pixels": _rejected(lambda: made(np.zeros((0, 0), np.uint16)), Reason.NO_PIXELS),
        "no uid": _rejected(lambda: made(TINY, SOPInstanceUID=""), Reason.NO_UID),
        # Tables that lie (Orthanc's CVE-2026-5437 to 5445 are of this kind).
        "palette shorter than said": _harmless(lambda: _palette([65535, 0, 16], bytes(range(16)))),
        "palette that starts past its indices": _harmless(lambda: _palette([8, 60000, 16], bytes(range(16)))),
        "palette without entries": _rejected(lambda: _palette([256, 0, 16], b""), Reason.MALFORMED),
        "palette without tables": _rejected(lambda: _palette([256, 0, 16], None), Reason.MALFORMED),
        "palette that points behind itself": _rejected(
            lambda: _palette([256, 0, 16], None, struct.pack("<7H", 0, 1, 5, 2, 9, 60000, 0)), Reason.MALFORMED
        ),
        "LUT without data": _rejected(lambda: _lut(LUTDescriptor=[256, 0, 16]), Reason.MALFORMED),
        "regions outside the picture": _harmless(lambda: _regions(0, 0, 2**32 - 1, 2**32 - 1)),
        # Codestreams that lie.
        "RLE of another size": _rejected(lambda: encapsulated(1, Rows=128), Reason.UNDECODABLE),
        "RLE of no segments": _rejected(lambda: _rle_offsets(0), Reason.UNDECODABLE),
        "RLE segments outside": _rejected(lambda: _rle_offsets(2, 2**31, 2**32 - 1), Reason.UNDECODABLE),
        "offset table outside": _rejected(lambda: _offset_table(2**31), Reason.UNDECODABLE),
        "JPEG of 65535 squared": _rejected(
            lambda: _stream("SC_rgb_dcmtk_+eb+cy+np.dcm", b"\xff\xc0", 5, ">HH", 65535, 65535),
            Reason.UNDECODABLE,
            Reason.TOO_LARGE,
            Reason.TIMEOUT,
        ),
        "JPEG 2000 of 4 thousand million": _rejected(
            lambda: _stream("MR_small_jp2klossless.dcm", b"\xff\x51", 6, ">LL", 2**31, 2**31),
            Reason.UNDECODABLE,
            Reason.TOO_LARGE,
        ),
        "JPEG-LS of 65535 squared": _rejected(
            # CharLS cannot say that memory was refused; it ends its process.
            lambda: _stream("MR_small_jpeg_ls_lossless.dcm", b"\xff\xf7", 5, ">HH", 65535, 65535),
            Reason.UNDECODABLE,
            Reason.TOO_LARGE,
            Reason.CRASHED,
        ),
        # Other things than they say.
        "deflate, cut": _rejected(
            lambda: _deflated(zlib.compress(whole, wbits=-15)[:-9]), Reason.TRUNCATED, Reason.MALFORMED
        ),
        "deflate of noise": _rejected(
            lambda: _deflated(random.Random(4).randbytes(4000)), Reason.MALFORMED, Reason.TRUNCATED
        ),
        "gzip behind the prefix": _rejected(
            lambda: bytes(128) + b"DICM" + gzip.compress(whole, mtime=0), Reason.MALFORMED, Reason.TRUNCATED
        ),
        "gzip": _no_image(lambda: gzip.compress(whole, mtime=0), Reason.NOT_DICOM),
        "zip": _no_image(lambda: _zipped(whole), Reason.NOT_DICOM),
        "executable": _no_image(lambda: b"MZ\x90\0" + bytes(60) + b"PE\0\0" + bytes(900), Reason.NOT_DICOM),
        "executable in the preamble": _harmless(lambda: b"MZ" + b"\x90" * 126 + made(TINY)[128:]),
        "DICOMDIR to elsewhere": _no_image(_directory, Reason.DICOMDIR),
        "nothing": _rejected(lambda: b"", Reason.EMPTY),
        "the prefix alone": _rejected(lambda: bytes(128) + b"DICM", Reason.TRUNCATED),
    }


def deaths() -> dict[str, Trap]:
    """Files on which the faulty codec of test_decoder dies, each in its own way."""
    ways = {
        "segfault": [Reason.CRASHED],
        "abort": [Reason.CRASHED],
        "exit": [Reason.CRASHED],
        "sys.exit": [Reason.CRASHED],
        "interrupt": [Reason.CRASHED],
        "panic": [Reason.UNDECODABLE],
        "hang": [Reason.TIMEOUT],
        "memory": [Reason.UNDECODABLE, Reason.TOO_LARGE, Reason.TIMEOUT],
        "noise": [Reason.UNDECODABLE],
    }
    return {f"codec: {fault}": _rejected(partial(faulty, fault), *reasons) for fault, reasons in ways.items()}
