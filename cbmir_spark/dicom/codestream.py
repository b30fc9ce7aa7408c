"""Read what a compressed frame says of itself, before any codec sees it: JPEG, JPEG-LS, JPEG 2000 and HTJ2K.

Sources: ITU-T T.81 annex B (JPEG), T.87 annex C (JPEG-LS), T.800 annex A (JPEG 2000), T.814 annex A (HTJ2K). RLE of
PS3.5 annex G says nothing but the number of its segments.
"""

import struct
from dataclasses import dataclass
from enum import StrEnum

__all__ = ["MAGIC_BYTES", "Codestream", "Kind", "begins", "begins_run_lengths", "read"]

MAGIC_BYTES = 12  # that `begins` looks at
_SOI, _EOI = b"\xff\xd8", b"\xff\xd9"
_SOC_SIZ = b"\xff\x4f\xff\x51"
_SOT = b"\xff\x90"
_JP2 = b"\x00\x00\x00\x0cjP  \r\n\x87\n"
# Frame headers of T.81 table B.1, by the process that they announce.
_BASELINE, _LOSSLESS, _JPEG_LS = (0xC0, 0xC1), 0xC3, 0xF7
_FRAME_HEADERS = (*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0), _JPEG_LS)
_WITHOUT_LENGTH = (0x01, *range(0xD0, 0xD9))
_HIGH_THROUGHPUT = 1 << 14  # in Rsiz


class Kind(StrEnum):
    """Families of codestreams; each has decoders of its own."""

    JPEG = "JPEG"  # sequential, baseline or extended
    JPEG_LOSSLESS = "JPEG lossless"
    JPEG_PROGRESSIVE = "JPEG progressive"  # and hierarchical and arithmetic ones
    JPEG_LS = "JPEG-LS"
    JPEG_2000 = "JPEG 2000"
    HTJ2K = "HTJ2K"


@dataclass(frozen=True)
class Codestream:
    """The header of a codestream."""

    kind: Kind
    rows: int | None  # None where the number of lines follows the first scan
    columns: int
    components: int
    precision: int  # bits of a sample
    signed: bool  # JPEG 2000 alone can be
    subsampled: bool  # the components differ in their sampling: only luma and chroma do
    whole: bool  # nothing is missing up to its end


def begins(data: bytes) -> bool:
    """Tell whether bytes begin a codestream, by its magic number."""
    return data[:3] == b"\xff\xd8\xff" or data[:4] == _SOC_SIZ or data[:12] == _JP2


def begins_run_lengths(data: bytes) -> bool:
    """Tell whether bytes begin as RLE does: up to 15 segments, of which the first follows the header of 64 bytes."""
    return len(data) >= 8 and 0 < data[0] < 16 and data[1:8] == b"\0\0\0\x40\0\0\0"


def read(data: bytes) -> Codestream:
    """Read the header of a codestream. Raises ValueError where there is none."""
    try:
        if data[:2] == _SOI:
            return _read_jpeg(data)
        # DICOM wants the bare codestream; some writers wrap it into a JP2 file.
        start = 0 if data[:4] == _SOC_SIZ else data.find(_SOC_SIZ) if data[:12] == _JP2 else -1
        if start >= 0:
            return _read_jpeg_2000(data, start + 4)
    except (IndexError, struct.error):
        raise ValueError("the codestream ends in its header") from None
    raise ValueError("no codestream")


def _read_jpeg(data: bytes) -> Codestream:
    at = 2
    while True:
        if data[at] != 0xFF:
            raise ValueError("no marker where one has to be")
        while data[at] == 0xFF:
            at += 1
        marker = data[at]
        at += 1
        if marker in _WITHOUT_LENGTH:
            continue
        if marker in (0xD9, 0xDA):
            raise ValueError("no frame header before the first scan")
        (length,) = struct.unpack_from(">H", data, at)
        if marker in _FRAME_HEADERS:
            precision, rows, columns, components = struct.unpack_from(">BHHB", data, at + 2)
            factors = {data[at + 9 + 3 * number] for number in range(components)}
            # Compressed data contains no marker but those of restarts (T.81 section B.1.1.5), so that this one ends it.
            whole = data.find(_EOI, at) >= 0
            return Codestream(
                _jpeg_kind(marker), rows or None, columns, components, precision, False, len(factors) > 1, whole
            )
        at += length


def _jpeg_kind(marker: int) -> Kind:
    if marker in _BASELINE:
        return Kind.JPEG
    return {_LOSSLESS: Kind.JPEG_LOSSLESS, _JPEG_LS: Kind.JPEG_LS}.get(marker, Kind.JPEG_PROGRESSIVE)


def _read_jpeg_2000(data: bytes, at: int) -> Codestream:
    length, profile, right, bottom, left, top = struct.unpack_from(">HHLLLL", data, at)
    (components,) = struct.unpack_from(">H", data, at + 36)
    sizes = [tuple(data[at + 38 + 3 * number : at + 41 + 3 * number]) for number in range(components)]
    if not sizes or len(sizes[-1]) < 3 or len({size[0] for size in sizes}) > 1:
        raise ValueError("components of several precisions, or none")
    depth, across, down = sizes[0]
    if not across or not down:
        raise ValueError("a sampling of 0")
    return Codestream(
        kind=Kind.HTJ2K if profile & _HIGH_THROUGHPUT else Kind.JPEG_2000,
        rows=-(-bottom // down) - -(-top // down),
        columns=-(-right // across) - -(-left // across),
        components=components,
        precision=(depth & 0x7F) + 1,
        signed=bool(depth & 0x80),
        subsampled=len({size[1:] for size in sizes}) > 1,
        whole=_has_tile_parts(data, at + length),
    )


def _has_tile_parts(data: bytes, at: int) -> bool:
    """Tell whether all tile-parts (T.800 section A.4.2) from the segments of the main header on are there."""
    while data[at : at + 2] != _SOT:
        if data[at : at + 1] != b"\xff":
            return False
        at += 2 + int.from_bytes(data[at + 2 : at + 4])
    while data[at : at + 2] == _SOT:
        (length,) = struct.unpack_from(">L", data, at + 6)
        if not length:
            # The last one extends to the end.
            return data.find(_EOI, at) >= 0
        at += length
    return data[at : at + 2] == _EOI
