"""What compressed frames say of themselves, and the fragments and headers around them: one case of each rule.

`test_codestream_properties.py` draws the cases at random.
"""

import struct
from dataclasses import replace

import numpy as np
import pytest

from cbmir_spark.dicom import codestream
from cbmir_spark.dicom.read import Reason, Rejected, decode_frames
from tests.support import encapsulated
from tests.support.dicom_files import header, real, written
from tests.support.encapsulated import Header, agreeing, object_of
from tests.support.streams import BY_NAME, CODECS, Codec, Stream, encode, picture

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
ROWS, COLUMNS = 20, 13


def drawn(name: str, depth: int, signed: bool = False, samples: int = 1, seed: int = 1) -> Stream:
    pixels = picture("noise", ROWS, COLUMNS, samples, depth, signed, seed)
    return encode(BY_NAME[name], pixels, depth, signed)


def decoded(described: Header, *frames: list[bytes], table: str = "none") -> list[np.ndarray]:
    return list(decode_frames(object_of(described, list(frames), table)))


def reason_of(described: Header, *frames: list[bytes], table: str = "none") -> Reason:
    with pytest.raises(Rejected) as error:
        decoded(described, *frames, table=table)
    return error.value.reason


@pytest.mark.parametrize("depth", range(2, 8))
@pytest.mark.parametrize("samples", [1, 3])
def test_lossless_jpeg_of_few_bits_does_not_abort_the_process(depth: int, samples: int) -> None:
    stream = drawn("JPEG lossless", depth, samples=samples)
    described = agreeing(stream)
    (values,) = decoded(described, [stream.data])
    luma = stream.values if samples == 1 else stream.values @ [0.299, 0.587, 0.114]
    assert np.allclose(values, luma, atol=1e-4)


@pytest.mark.parametrize("part", [53, 55])
def test_progressive_jpeg_of_color(part: int) -> None:
    stream = drawn("JPEG progressive", 8, samples=3)
    (luma,) = decoded(replace(agreeing(stream), syntax=f"1.2.840.10008.1.2.4.{part}"), [stream.data])
    assert np.abs(luma - stream.values[..., 0]).max() <= stream.codec.bound


@pytest.mark.parametrize("codec", [codec for codec in CODECS if codec.name != "RLE"], ids=lambda codec: codec.name)
@pytest.mark.parametrize("lost", [2, 20])
def test_a_frame_without_its_end_is_truncated(codec: Codec, lost: int) -> None:
    """The item and its delimiter are whole: only the codestream ends early, in the second of two frames."""
    first, second = (drawn(codec.name, codec.depths[-1], seed=seed) for seed in (1, 2))
    described = replace(agreeing(first), frames=2)
    assert len(decoded(described, [first.data], [second.data])) == 2
    assert reason_of(described, [first.data], [second.data[:-lost]]) == Reason.TRUNCATED


def test_a_tile_part_that_lost_bytes_in_its_middle_is_truncated() -> None:
    data = drawn("JPEG 2000", 12).data
    half = len(data) // 4 * 2
    assert codestream.read(data).whole
    assert not codestream.read(data[:half] + data[half + 10 :]).whole


def test_a_last_tile_part_without_a_length_ends_in_its_marker() -> None:
    """T.800 section A.4.2: Psot of 0."""
    data = bytearray(drawn("JPEG 2000", 12).data)
    struct.pack_into(">L", data, data.index(b"\xff\x90") + 6, 0)
    assert codestream.read(bytes(data)).whole
    assert not codestream.read(bytes(data[:-2])).whole


@pytest.mark.parametrize("name", ["JPEG 2000", "HTJ2K"])
def test_the_sign_is_extended_from_bits_stored_where_a_signed_stream_is_deeper(name: str) -> None:
    """Bits above the 12 stored ones are not the sign's: -1 is written as 4095."""
    pixels = picture("noise", ROWS, COLUMNS, 1, 12, False, 1)
    stream = encode(BY_NAME[name], pixels, 16, True)
    described = replace(agreeing(stream), stored=12, high=11)
    (values,) = decoded(described, [stream.data])
    assert np.array_equal(values, np.where(pixels >= 2048, pixels - 4096, pixels))


def test_the_sign_is_extended_where_twelve_bits_are_allocated() -> None:
    stream = drawn("JPEG-LS", 12)
    (values,) = decoded(replace(agreeing(stream), allocated=12, signed=True), [stream.data])
    assert np.array_equal(values, encapsulated.signed(stream.values, 12))


@pytest.mark.parametrize("table", ["shifted", "next", "zeros", "short"])
@pytest.mark.parametrize("name", ["JPEG-LS", "RLE"])
def test_beginnings_of_codestreams_count_more_than_offset_tables(name: str, table: str) -> None:
    found = [drawn(name, 16, seed=seed) for seed in (1, 2)]
    frames = [[stream.data[:100], stream.data[100:]] for stream in found]
    values = decoded(replace(agreeing(found[0]), frames=2), *frames, table=table)
    assert all(np.array_equal(array, stream.values) for array, stream in zip(values, found, strict=True))


@pytest.mark.parametrize("name", ["JPEG-LS", "RLE"])
def test_a_second_fragment_is_no_frame(name: str) -> None:
    """There are as many fragments as frames, but one of them continues the frame before."""
    found = [drawn(name, 16, seed=seed) for seed in (1, 2)]
    described = replace(agreeing(found[0]), frames=3)
    assert reason_of(described, [found[0].data[:100], found[0].data[100:]], [found[1].data]) == Reason.UNDECODABLE


def test_a_cut_frame_is_not_completed_by_the_next() -> None:
    """The header has one frame, the second codestream ends as the first one should."""
    first, second = (drawn("JPEG lossless", 12, seed=seed) for seed in (1, 2))
    assert reason_of(agreeing(first), [first.data[:-20]], [second.data]) == Reason.TRUNCATED


def test_run_lengths_beyond_the_pixels_are_padding_only_if_they_are_zeros() -> None:
    stream = encode(BY_NAME["RLE"], np.full((1, 10), 7), 8, False)
    (whole,) = decoded(agreeing(stream), [stream.data + b"\0\0\0\0"])
    assert np.array_equal(whole, stream.values)
    assert reason_of(replace(agreeing(stream), columns=9), [stream.data]) == Reason.UNDECODABLE


def test_fragments_are_no_native_pixels() -> None:
    """Pixel data of defined length in a native syntax, whose bytes are items, more than the pixels have."""
    ds = header(real("MR_small.dcm"))
    stream = drawn("JPEG-LS", 16)
    ds.Rows, ds.Columns = 3, 3
    ds.PixelData = encapsulated.encapsulated([[stream.data]])
    with pytest.raises(Rejected) as error:
        list(decode_frames(written(ds)))
    assert error.value.reason == Reason.WRONG_SYNTAX
