"""Codestreams of every codec and depth, and what they say by imagecodecs, which the package does not use."""

import io
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import imagecodecs
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tests.support import jpeg_ls

ROOT = "1.2.840.10008.1.2.4."
RLE = "1.2.840.10008.1.2.5"


@dataclass(frozen=True)
class Codec:
    """A codec, its transfer syntaxes, and what its encoder here can encode."""

    name: str
    syntaxes: tuple[str, ...]
    depths: tuple[int, ...]
    signed: bool = False  # streams may be
    lossless: bool = True
    # Levels by which two decoders of one lossy stream may differ: T.81 and T.800 leave the rounding of their transforms
    # open. libjpeg computes 12 bits with as many fractional bits as 8, so that they differ by up to four levels.
    # Decoders of JPEG-LS have to agree even where the encoder lost something.
    bound: int = 0


ANY = tuple(range(2, 17))
CODECS = (
    Codec("JPEG baseline", (f"{ROOT}50", f"{ROOT}51"), (8,), lossless=False, bound=1),
    Codec("JPEG extended", (f"{ROOT}51",), (12,), lossless=False, bound=4),
    Codec("JPEG progressive", (f"{ROOT}55", f"{ROOT}53"), (8,), lossless=False, bound=1),
    Codec("JPEG lossless", (f"{ROOT}57", f"{ROOT}70"), ANY),
    Codec("JPEG-LS", (f"{ROOT}80",), ANY),
    Codec("JPEG-LS near-lossless", (f"{ROOT}81",), (8, 16), lossless=False),
    Codec("JPEG 2000", (f"{ROOT}90", f"{ROOT}91"), ANY, signed=True),
    Codec("JPEG 2000 irreversible", (f"{ROOT}91",), ANY, signed=True, lossless=False, bound=1),
    Codec("HTJ2K", (f"{ROOT}201", f"{ROOT}202", f"{ROOT}203"), ANY, signed=True),
    Codec("RLE", (RLE,), (8, 16, 32)),
)
BY_NAME = {codec.name: codec for codec in CODECS}


@dataclass(frozen=True)
class Stream:
    """A codestream and what it says of itself."""

    codec: Codec
    data: bytes = field(repr=False)
    values: NDArray[np.int64] = field(repr=False)  # (rows, columns) or (rows, columns, 3), by imagecodecs
    depth: int
    signed: bool
    subsampled: bool = False
    color: str = ""  # RGB or YCBCR where the stream names it

    @property
    def samples(self) -> int:
        return 1 if self.values.ndim == 2 else 3


def picture(
    content: str, rows: int, columns: int, samples: int, depth: int, signed: bool, seed: int
) -> NDArray[np.int64]:
    """Draw (rows, columns) or (rows, columns, 3): noise, a slope, steps, or one value."""
    random = np.random.default_rng(seed)
    shape = (rows, columns) if samples == 1 else (rows, columns, samples)
    top = 2**depth - 1
    if content == "noise":
        found = random.integers(0, top, shape, endpoint=True)
    elif content == "slope":
        found = np.indices(shape).sum(axis=0) * max(1, top // (rows + columns)) % (top + 1)
    elif content == "steps":
        found = np.where(random.random(shape) < 0.1, random.integers(0, top, shape, endpoint=True), top)
    else:
        found = np.full(shape, random.integers(0, top, endpoint=True))
    return np.asarray(found, np.int64) - (2 ** (depth - 1) if signed else 0)


def encode(codec: Codec, pixels: NDArray[np.int64], depth: int, signed: bool, option: int = 0) -> Stream:
    """Encode pixels; `option` chooses among a codec's parameters: sampling, predictor, bound, resolutions."""
    if codec.name.startswith(("JPEG 2000", "HTJ2K")):
        data = _jpeg_2000(codec, pixels, depth, signed, option)
        decoded = (imagecodecs.htj2k_decode if codec.name == "HTJ2K" else imagecodecs.jpeg2k_decode)(data)
        return _checked(Stream(codec, data, np.asarray(decoded, np.int64), depth, signed), pixels)
    unsigned = pixels.astype("u1" if depth <= 8 else "u2" if depth <= 16 else "u4")
    return _checked(_ENCODERS[codec.name](codec, unsigned, depth, option), pixels)


def _checked(stream: Stream, pixels: NDArray[np.int64]) -> Stream:
    if stream.codec.lossless and not np.array_equal(stream.values, pixels):
        raise AssertionError(f"{stream.codec.name} of {stream.depth} bits is not without loss")
    return stream


def _of_bytes(
    codec: Codec, data: bytes | bytearray, decoded: NDArray[Any], like: NDArray[Any], depth: int, color: str = ""
) -> Stream:
    return Stream(codec, bytes(data), decoded.astype(np.int64).reshape(like.shape), depth, False, False, color)


def _jpeg(codec: Codec, pixels: NDArray[Any], depth: int, option: int) -> Stream:
    if pixels.ndim == 2:
        data = _progressive(pixels, "444") if codec.name == "JPEG progressive" else _sequential(pixels, depth)
        return _of_bytes(codec, data, imagecodecs.jpeg8_decode(data), pixels, depth)
    sampling = ("444", "444", "422", "420")[option % 4]
    color = "RGB" if option % 8 == 5 and codec.name != "JPEG progressive" else "YCBCR"
    if sampling != "444":
        # Luma alone varies: decoders may interpolate chroma or repeat it.
        pixels = (pixels[..., :1] // 2 + 2 ** (depth - 2) + [[[2, 0, -2]]]).astype(pixels.dtype)
    if codec.name == "JPEG progressive":
        data = _progressive(pixels, sampling)
    else:
        data = _sequential(pixels, depth, colorspace="RGB", outcolorspace=color, subsampling=sampling)
    decoded = imagecodecs.jpeg8_decode(data, colorspace=color, outcolorspace=color)
    return Stream(codec, data, decoded.astype(np.int64), depth, False, sampling != "444", color)


def _sequential(pixels: NDArray[Any], depth: int, **colors: Any) -> bytes:
    return bytes(imagecodecs.jpeg8_encode(pixels, level=95, bitspersample=depth, **colors))


def _progressive(pixels: NDArray[Any], sampling: str) -> bytes:
    out = io.BytesIO()
    factors = {"444": 0, "422": 1, "420": 2}[sampling]
    Image.fromarray(pixels).save(out, "JPEG", quality=95, progressive=True, subsampling=factors)
    return out.getvalue()


def _jpeg_lossless(codec: Codec, pixels: NDArray[Any], depth: int, option: int) -> Stream:
    data = imagecodecs.jpeg8_encode(pixels, lossless=True, predictor=1 + option % 7, bitspersample=depth)
    return _of_bytes(codec, data, imagecodecs.jpeg8_decode(data), pixels, depth, "RGB")


def _jpeg_ls(codec: Codec, pixels: NDArray[Any], depth: int, option: int) -> Stream:
    if codec.lossless and (option % 2 or depth not in (8, 16)):
        data = jpeg_ls.encode(pixels, depth)
    else:
        data = bytes(imagecodecs.jpegls_encode(pixels, level=0 if codec.lossless else 1 + option % 5))
    return _of_bytes(codec, data, imagecodecs.jpegls_decode(data), pixels, depth)


def _run_lengths(codec: Codec, pixels: NDArray[Any], depth: int, option: int) -> Stream:
    """Encode RLE: a segment for each byte of a sample, the most significant first; rows apart (PS3.5 annex G)."""
    planes = pixels.reshape(*pixels.shape[:2], -1)
    rows, columns, count = planes.shape
    segments = []
    for sample in range(count):
        big = np.ascontiguousarray(planes[..., sample].astype(pixels.dtype.newbyteorder(">")))
        parts = big.view(np.uint8).reshape(rows, columns, -1)
        for part in range(parts.shape[2]):
            packed = b"".join(imagecodecs.packbits_encode(row.tobytes()) for row in parts[..., part])
            segments.append(packed + b"\0" * (len(packed) % 2))
    starts = 64 + np.cumsum([0, *map(len, segments[:-1])])
    data = struct.pack("<16L", len(segments), *starts, *[0] * (15 - len(segments))) + b"".join(segments)
    decoded = np.frombuffer(imagecodecs.dicomrle_decode(data, pixels.dtype), pixels.dtype).reshape(count, rows, columns)
    return _of_bytes(codec, data, np.moveaxis(decoded, 0, -1), pixels, depth)


_ENCODERS: dict[str, Callable[[Codec, NDArray[Any], int, int], Stream]] = {
    "JPEG baseline": _jpeg,
    "JPEG extended": _jpeg,
    "JPEG progressive": _jpeg,
    "JPEG lossless": _jpeg_lossless,
    "JPEG-LS": _jpeg_ls,
    "JPEG-LS near-lossless": _jpeg_ls,
    "RLE": _run_lengths,
}


def _jpeg_2000(codec: Codec, pixels: NDArray[np.int64], depth: int, signed: bool, option: int) -> bytes:
    container = "1" if depth <= 8 else "2"
    if codec.name == "JPEG 2000" and depth in (8, 16) and option % 4 == 2:
        # Some writers wrap the codestream into a file.
        as_it_is = pixels.astype(("i" if signed else "u") + container)
        return bytes(imagecodecs.jpeg2k_encode(as_it_is, level=0, codecformat="jp2", reversible=True))
    # Signed values have no level shift (T.800 section G.1), so that the precision can be written afterwards.
    shifted = (pixels if signed else pixels - 2 ** (depth - 1)).astype(f"i{container}")
    if codec.name == "HTJ2K":
        return _with_precision(imagecodecs.htj2k_encode(shifted, resolutions=option % 3), depth, signed)
    data = imagecodecs.jpeg2k_encode(
        shifted,
        level=0 if codec.lossless else 60,
        codecformat="j2k",
        reversible=codec.lossless,
        resolutions=1 + option % 3,
        mct=option % 4 != 3,
    )
    return _with_precision(data, depth, signed)


def _with_precision(data: bytes | bytearray, depth: int, signed: bool) -> bytes:
    """Write Ssiz of each component (T.800 section A.5.1)."""
    out = bytearray(data)
    at = data.index(b"\xff\x51") + 38
    (count,) = struct.unpack_from(">H", data, at)
    for number in range(count):
        out[at + 2 + 3 * number] = depth - 1 | int(signed) << 7
    return bytes(out)
