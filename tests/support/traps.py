"""Files that are built to do harm, each with the outcome that ingest must give it."""

import gzip
import random
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from cbmir_spark.dicom.read import Reason
from cbmir_spark.lake import columns as cols
from tests.support import bombs
from tests.support.bombs import encapsulated, patched
from tests.support.codec_plugin import faulty
from tests.support.dicom_files import TINY, made, real


@dataclass(frozen=True)
class Trap:
    """A file, its outcome, and the reasons that are right: codecs notice a lie in different ways."""

    content: Callable[[], bytes]
    outcome: str
    reasons: frozenset[str | None]


def _rejected(content: Callable[[], bytes], *reasons: Reason) -> Trap:
    return Trap(content, cols.REJECTED, frozenset(str(reason) for reason in reasons))


def _no_image(content: Callable[[], bytes], reason: Reason) -> Trap:
    return Trap(content, cols.NOT_AN_IMAGE, frozenset({str(reason)}))


def _harmless(content: Callable[[], bytes]) -> Trap:
    return Trap(content, cols.INGESTED, frozenset({None}))


def traps() -> dict[str, Trap]:
    """All bombs and lies by name, but for those that need the codec of codec_plugin.py: `deaths`."""
    whole = made(TINY)
    small = real("MR_small_RLE.dcm")
    return {
        # Bombs: few bytes that ask for many.
        "deflate bomb": _rejected(bombs.deflate_bomb, Reason.TOO_LARGE),
        "65535 squared": _rejected(lambda: encapsulated(1, Rows=65535, Columns=65535), Reason.TOO_LARGE),
        "65535 squared by 1000": _rejected(lambda: encapsulated(1000, Rows=65535, Columns=65535), Reason.TOO_LARGE),
        "65535 squared, native": _rejected(
            lambda: patched("Rows", 65535, Columns=65535), Reason.TRUNCATED, Reason.TOO_LARGE
        ),
        "2000 deep": _rejected(lambda: bombs.deep(2000), Reason.TOO_LARGE),
        "2000 deep, cut": _rejected(lambda: bombs.deep(2000)[:-300], Reason.TOO_LARGE),
        "2000 deep by length": _harmless(lambda: bombs.deep_by_length(2000)),
        "half a million elements": _rejected(lambda: bombs.many_elements(500_001), Reason.TOO_LARGE),
        "a hundred thousand fragments": _harmless(lambda: bombs.many_fragments(100_000)),
        "palette bomb": _harmless(bombs.palette_bomb),
        "private block of 64 MB": _harmless(lambda: bombs.private_block(64 * 2**20)),
        "object over the limit": _rejected(lambda: bombs.private_block(101 * 2**20), Reason.TOO_LARGE),
        # Lengths that lie.
        "huge length": _rejected(bombs.huge_length, Reason.TRUNCATED),
        "private length of 4 GB": _rejected(
            lambda: bombs.unclosed(struct.pack("<HH2sxxL", 0x0009, 0x1001, b"OB", 0xFFFFFFF0)), Reason.TRUNCATED
        ),
        "sequence never closed": _rejected(
            lambda: bombs.unclosed(bombs.SEQUENCE, bombs.ITEM), Reason.TRUNCATED, Reason.MALFORMED
        ),
        "sequence without items": _rejected(lambda: bombs.unclosed(bombs.SEQUENCE), Reason.TRUNCATED, Reason.MALFORMED),
        "pixels never closed": _rejected(lambda: bombs.without_delimiter(small), Reason.TRUNCATED),
        # Pixel modules that lie.
        "1000 frames": _rejected(lambda: patched("NumberOfFrames", 1000), Reason.TRUNCATED),
        "2 thousand million frames": _rejected(lambda: encapsulated(2**31 - 1), Reason.TRUNCATED),
        "minus one frame": _rejected(lambda: patched("NumberOfFrames", -1), Reason.MALFORMED),
        "frames as text": _rejected(
            lambda: bombs.with_bytes(made(np.stack([TINY, TINY])), 0x00280008, b"manyfrms"), Reason.MALFORMED
        ),
        "zero rows": _rejected(lambda: patched("Rows", 0), Reason.MALFORMED),
        "zero columns": _rejected(lambda: patched("Columns", 0), Reason.MALFORMED),
        "rows of two values": _rejected(
            lambda: bombs.with_bytes(whole, 0x00280010, struct.pack("<HH", 60000, 8)),
            Reason.TRUNCATED,
            Reason.MALFORMED,
        ),
        "seven bits": _rejected(lambda: patched("BitsAllocated", 7), Reason.UNSUPPORTED_FORMAT),
        "64 bits": _rejected(lambda: patched("BitsAllocated", 64), Reason.TRUNCATED),
        "four samples": _rejected(lambda: patched("SamplesPerPixel", 4), Reason.UNSUPPORTED_FORMAT),
        "CMYK": _rejected(lambda: patched("PhotometricInterpretation", "CMYK"), Reason.UNSUPPORTED_FORMAT),
        "no pixels": _rejected(lambda: made(np.zeros((0, 0), np.uint16)), Reason.NO_PIXELS),
        "no uid": _rejected(lambda: bombs.nameless(TINY), Reason.NO_UID),
        # Tables that lie (Orthanc's CVE-2026-5437 to 5445 are of this kind).
        "palette shorter than declared": _harmless(lambda: bombs.palette([65535, 0, 16], bytes(range(16)))),
        "palette that starts past its indices": _harmless(lambda: bombs.palette([8, 60000, 16], bytes(range(16)))),
        "palette without entries": _rejected(lambda: bombs.palette([256, 0, 16], b""), Reason.MALFORMED),
        "palette without tables": _rejected(lambda: bombs.palette([256, 0, 16], None), Reason.MALFORMED),
        "palette that points behind itself": _rejected(
            lambda: bombs.palette([256, 0, 16], None, struct.pack("<7H", 0, 1, 5, 2, 9, 60000, 0)), Reason.MALFORMED
        ),
        "LUT without data": _rejected(lambda: bombs.with_modality_lut(LUTDescriptor=[256, 0, 16]), Reason.MALFORMED),
        "regions outside the picture": _harmless(lambda: bombs.with_regions(0, 0, 2**32 - 1, 2**32 - 1)),
        # Codestreams that lie.
        "RLE of another size": _rejected(lambda: encapsulated(1, Rows=128), Reason.UNDECODABLE),
        "RLE of no segments": _rejected(lambda: bombs.rle_offsets(0), Reason.UNDECODABLE),
        "RLE segments outside": _rejected(lambda: bombs.rle_offsets(2, 2**31, 2**32 - 1), Reason.UNDECODABLE),
        "offset table outside": _harmless(lambda: bombs.offset_table(2**31)),
        "JPEG of 65535 squared": _rejected(
            lambda: bombs.with_stream_size("SC_rgb_dcmtk_+eb+cy+np.dcm", b"\xff\xc0", 5, ">HH", 65535, 65535),
            Reason.UNDECODABLE,
            Reason.TOO_LARGE,
            Reason.TIMEOUT,
        ),
        "JPEG 2000 of 4 thousand million": _rejected(
            lambda: bombs.with_stream_size("MR_small_jp2klossless.dcm", b"\xff\x51", 6, ">LL", 2**31, 2**31),
            Reason.UNDECODABLE,
            Reason.TOO_LARGE,
        ),
        "JPEG-LS of 65535 squared": _rejected(
            # CharLS cannot say that memory was refused; it ends its process.
            lambda: bombs.with_stream_size("MR_small_jpeg_ls_lossless.dcm", b"\xff\xf7", 5, ">HH", 65535, 65535),
            Reason.UNDECODABLE,
            Reason.TOO_LARGE,
            Reason.CRASHED,
        ),
        # Something else than they claim to be.
        "deflate, cut": _rejected(
            lambda: bombs.deflated(zlib.compress(whole, wbits=-15)[:-9]), Reason.TRUNCATED, Reason.MALFORMED
        ),
        "deflate of noise": _rejected(
            lambda: bombs.deflated(random.Random(4).randbytes(4000)), Reason.BAD_DEFLATE, Reason.TRUNCATED
        ),
        "gzip behind the prefix": _rejected(
            lambda: bytes(128) + b"DICM" + gzip.compress(whole, mtime=0), Reason.MALFORMED, Reason.TRUNCATED
        ),
        "gzip": _no_image(lambda: gzip.compress(whole, mtime=0), Reason.NOT_DICOM),
        "zip": _no_image(lambda: bombs.zipped(whole), Reason.NOT_DICOM),
        "executable": _no_image(lambda: b"MZ\x90\0" + bytes(60) + b"PE\0\0" + bytes(900), Reason.NOT_DICOM),
        "executable in the preamble": _harmless(lambda: b"MZ" + b"\x90" * 126 + made(TINY)[128:]),
        "DICOMDIR to elsewhere": _no_image(bombs.directory, Reason.DICOMDIR),
        "nothing": _rejected(lambda: b"", Reason.EMPTY),
        "the prefix alone": _rejected(lambda: bytes(128) + b"DICM", Reason.TRUNCATED),
    }


def deaths() -> dict[str, Trap]:
    """Files on which the codec of codec_plugin.py dies, each in another way."""
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
