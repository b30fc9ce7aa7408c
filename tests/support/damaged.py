"""Real files damaged at random: those of pydicom's package, and the shared ones where they are present.

The same number always gives the same damage.
"""

import random
import re
import struct
import zlib
from contextlib import suppress
from functools import cache
from pathlib import Path

from pydicom.data import get_testdata_file

from cbmir_spark.dicom import preflight
from cbmir_spark.dicom.read import NotAnImage, Rejected
from tests.support.dicom_files import header, read

_SHARED = Path(__file__).parents[3] / "shared" / "data" / "dicom"
# Small files go through the job fast, and a random place in them is seldom in the middle of their pixels.
_MOST_BYTES = 40_000


@cache
def real_files() -> tuple[bytes, ...]:
    """Return whole small DICOM files of every kind, images or not, each content once."""
    bundled = Path(str(get_testdata_file("CT_small.dcm"))).parent
    folders = (bundled, _SHARED)
    paths = sorted(path for folder in folders if folder.is_dir() for path in folder.rglob("*"))
    small = [path.read_bytes() for path in paths if path.is_file() and path.stat().st_size <= _MOST_BYTES]
    return tuple(dict.fromkeys(content for content in small if content[128:132] == b"DICM"))


@cache
def images() -> tuple[bytes, ...]:
    """Return those of `real_files` that are images."""
    found = []
    for content in real_files():
        with suppress(NotAnImage, Rejected):
            read(content)
            found.append(content)
    return tuple(found)


@cache
def _length_fields(content: bytes) -> tuple[tuple[int, str], ...]:
    """Find (position, struct format) of lengths of elements and items by a pattern, not by a parser."""
    found = []
    for match in re.finditer(rb"(?:OB|OW|SQ|UN|UT)\0\0", content):
        found.append((match.end(), "<L"))
    for match in re.finditer(rb"(?:AE|AS|CS|DA|DS|IS|LO|PN|SH|UI|US)(?=..)", content, re.DOTALL):
        found.append((match.end(), "<H"))
    for match in re.finditer(rb"\xfe\xff[\x00\x0d\xdd]\xe0(?=....)", content, re.DOTALL):
        found.append((match.end(), "<L"))
    return tuple(place for place in found if place[0] + struct.calcsize(place[1]) <= len(content))


def mutant(number: int) -> bytes:
    """Damage a file: flip bits, overwrite bytes, cut it, splice another file into it, or falsify a length.

    Every other one is an image, and half of its flips and overwrites hit the pixels, to reach the codecs: most other
    damage is noticed before.
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
    """Return a real image, and the start of it up to some byte from 140 on."""
    chance = random.Random(f"cut {number}")
    content = chance.choice(images())
    return content, content[: chance.randrange(140, len(content))]


def pixel_end(content: bytes) -> int:
    """Return where the pixel data ends, without its delimiter: no picture needs a byte behind it."""
    ds = header(content)
    if ds.file_meta.TransferSyntaxUID == preflight.DEFLATED:
        stream = zlib.decompressobj(-zlib.MAX_WBITS)
        start = 132 + 12 + ds.file_meta.FileMetaInformationGroupLength
        stream.decompress(content[start:])
        return len(content) - len(stream.unused_data)
    data = ds.PixelData
    return content.rindex(data) + len(data)


def has_all_pixels(content: bytes, left: int) -> bool:
    """Tell whether the first `left` bytes of an object contain its whole pixel data."""
    return left >= pixel_end(content)
