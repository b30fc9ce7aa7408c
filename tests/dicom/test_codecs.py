"""Pixel data in every transfer syntax and pixel format, against values decoded by hand or by another codec."""

import io
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from pydicom.pixels.decoders.base import JPEGExtended12BitDecoder

from cbmir_spark.dicom import preflight, stored
from cbmir_spark.dicom.read import Reason, Rejected
from tests.support.dicom_files import TINY, header, header_offset, made, only_frame, read, real, stored_in, written
from tests.support.pixel_oracle import equals_rounded, resized, windowed


@pytest.mark.parametrize(
    "name",
    [
        "MR_small_bigendian.dcm",
        "MR_small_expb.dcm",
        "MR_small_implicit.dcm",
        "MR_small_RLE.dcm",
        "MR_small_jp2klossless.dcm",
        "MR_small_jpeg_ls_lossless.dcm",
        "MR_small_padded.dcm",
    ],
)
def test_one_picture_in_every_lossless_encoding(name: str) -> None:
    reference = real("MR_small.dcm")
    ds = header(reference)
    assert (ds.Rows, ds.Columns, ds.BitsAllocated, ds.PixelRepresentation) == (64, 64, 16, 1)
    stored = stored_in(reference, "<i2", 64, 64)
    assert np.array_equal(only_frame(real(name)), stored)
    (frame,) = read(real(name)).frames
    low, high = np.percentile(stored, [1, 99])
    assert equals_rounded(frame.pixels, resized(windowed(stored, low, high)))


def test_big_endian_bytes_are_the_values() -> None:
    content = real("MR_small_bigendian.dcm")
    assert header(content).file_meta.TransferSyntaxUID == "1.2.840.10008.1.2.2"
    assert np.array_equal(only_frame(content), stored_in(content, ">i2", 64, 64))


def test_run_length_encoding_of_16_bits_by_hand() -> None:
    """PS3.5 annex G: a header of offsets, then the high bytes and the low bytes as PackBits."""
    content = real("MR_small_RLE.dcm")
    fragment = next(pydicom.encaps.generate_fragments(header(content).PixelData[header_offset(content) :]))
    count, *offsets = struct.unpack("<16L", fragment[:64])
    assert count == 2
    planes = [unpacked(fragment[start:], 64 * 64) for start in offsets[:2]]
    stored = (planes[0].astype(np.uint16) << 8 | planes[1]).view(np.int16).reshape(64, 64)
    assert np.array_equal(only_frame(content), stored)


def test_jpeg_ls_near_lossless_within_its_bound() -> None:
    """ISO/IEC 14495-1: no sample is further than NEAR, in the scan's header, from the original, here the RLE file."""
    data = header(real("SC_rgb_rle.dcm")).PixelData
    fragment = next(pydicom.encaps.generate_fragments(data[header_offset(real("SC_rgb_rle.dcm")) :]))
    count, *offsets = struct.unpack("<16L", fragment[:64])
    assert count == 3
    red, green, blue = (unpacked(fragment[start:], 100 * 100).reshape(100, 100) for start in offsets[:3])
    original = 0.299 * red + 0.587 * green + 0.114 * blue
    for name in ("SC_rgb_jls_lossy_line.dcm", "SC_rgb_jls_lossy_sample.dcm"):
        content = real(name)
        assert header(content).file_meta.TransferSyntaxUID == "1.2.840.10008.1.2.4.81"
        assert near_of(content) == 2
        difference = np.abs(only_frame(content) - original)
        assert 0.1 < difference.max() <= 2.001


def test_near_lossless_files_of_the_index_stay_within_their_bound(shared_data: Path) -> None:
    """NEMA's set includes the originals."""
    folder = shared_data / "dicom" / "robyoung" / "data" / "WG04"
    content, original = (folder / "JLSN/NM1_JLSN").read_bytes(), (folder / "REF/NM1_UNC").read_bytes()
    difference = np.abs(only_frame(content).astype(int) - stored_in(original, "<u2", 1024, 256))
    assert 0 < difference.max() <= near_of(content) == 4


def near_of(content: bytes) -> int:
    """NEAR of the first scan: behind the marker SOS, its length, and two bytes for each component."""
    data = header(content).PixelData
    scan = data.index(b"\xff\xda") + 4
    return data[scan + 1 + 2 * data[scan]]


def unpacked(packed: bytes, wanted: int) -> NDArray[np.uint8]:
    out = bytearray()
    at = 0
    while len(out) < wanted:
        control = packed[at]
        if control < 128:
            out += packed[at + 1 : at + 2 + control]
            at += 2 + control
        else:
            out += bytes([packed[at + 1]]) * (257 - control if control > 128 else 0)
            at += 2
    return np.frombuffer(bytes(out[:wanted]), np.uint8)


def test_jpeg_2000_color_transforms_come_back_as_rgb() -> None:
    content = real("SC_rgb_gdcm_KY.dcm")
    reference = only_frame(real("SC_rgb_rle.dcm"))
    assert np.abs(only_frame(content).astype(float) - reference).max() <= 2


@pytest.fixture
def without_libjpeg() -> Iterator[None]:
    """Leave pydicom no codec that reads 12-bit JPEG, as for a stream that libjpeg refuses."""
    for label in ("pylibjpeg", "pillow"):
        JPEGExtended12BitDecoder.remove_plugin(label)
    yield
    for label in ("pylibjpeg", "pillow"):
        JPEGExtended12BitDecoder.add_plugin(label, (f"pydicom.pixels.decoders.{label}", "_decode_frame"))


def test_twelve_bit_jpeg_by_gdcm_equals_libjpeg(request: pytest.FixtureRequest) -> None:
    """GDCM is the fallback where libjpeg refuses a valid stream: both agree within one level."""
    content = real("JPGExtended.dcm")
    described = stored.describe(header(content), preflight.examine(content))
    assert (described.transfer_syntax, described.bits_stored) == ("1.2.840.10008.1.2.4.51", 12)
    by_libjpeg = only_frame(content)
    request.getfixturevalue("without_libjpeg")
    by_gdcm = only_frame(content)
    assert by_gdcm.max() > 200
    assert not np.array_equal(by_gdcm, by_libjpeg), "both by the same codec"
    assert np.abs(by_gdcm.astype(int) - by_libjpeg).max() <= 1


def test_an_unknown_transfer_syntax_is_unsupported() -> None:
    mpeg = real("MR_small_RLE.dcm").replace(b"1.2.840.10008.1.2.5\0", b"1.2.840.10008.1.2.4.100\0"[:20])
    assert len(mpeg) == len(real("MR_small_RLE.dcm"))
    ds = header(real("MR_small_RLE.dcm"))
    ds.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.100"
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, ds, implicit_vr=False, little_endian=True)
    with pytest.raises(Rejected) as error:
        read(buffer.getvalue())
    assert error.value.reason == Reason.UNSUPPORTED


def test_deflated_data_set() -> None:
    content = real("image_dfl.dcm")
    layout = preflight.examine(content)
    assert layout.transfer_syntax == preflight.DEFLATED
    raw = layout.value(preflight.PIXEL_DATA)
    assert np.array_equal(only_frame(content), np.frombuffer(raw, "u1").reshape(512, 512))


def test_unused_bits_are_cleared_and_signs_extended() -> None:
    values = np.array([[-2048, -1, 0, 2047]], dtype=np.int16).repeat(4, axis=0)
    overlaid = (values.astype(np.uint16) & 0x0FFF) | 0x5000
    content = made(overlaid.view(np.int16), BitsStored=12, HighBit=11)
    assert np.array_equal(only_frame(content), values)
    shifted = made((values << 4).astype(np.int16), BitsStored=12, HighBit=15)
    assert np.array_equal(only_frame(shifted), values)


def test_twelve_bits_packed_in_three_bytes() -> None:
    values = np.array([[0x123, 0xABC, 0x456], [0xFFF, 0x000, 0x800]], dtype=np.uint16)
    flat = values.reshape(-1)
    packed = np.stack([flat[::2] & 0xFF, flat[::2] >> 8 | (flat[1::2] & 0x0F) << 4, flat[1::2] >> 4], axis=1)
    ds = header(made(values, BitsStored=12, HighBit=11))
    ds.BitsAllocated = 12
    ds.PixelData = packed.astype(np.uint8).tobytes() + b"\0"
    assert np.array_equal(only_frame(written(ds)), values)


def test_eight_bits_in_big_endian_words_of_odd_length() -> None:
    little, big = real("SC_rgb_small_odd.dcm"), real("SC_rgb_small_odd_big_endian.dcm")
    assert (header(big).Rows, header(big).Columns, header(big)["PixelData"].VR) == (3, 3, "OW")
    assert np.array_equal(only_frame(big), only_frame(little))
    assert np.allclose(only_frame(little), stored_in(little, "u1", 3, 3, 3) @ np.array([0.299, 0.587, 0.114]))


def test_float_pixel_data() -> None:
    values = np.linspace(-1.5, 3.0, 64, dtype=np.float32).reshape(8, 8)
    ds = header(made(TINY, Modality="MR", SOPClassUID="1.2.840.10008.5.1.4.1.1.30"))
    del ds.PixelData, ds.BitsStored, ds.HighBit, ds.PixelRepresentation
    ds.BitsAllocated = 32
    ds.FloatPixelData = values.tobytes()
    content = written(ds)
    assert np.array_equal(only_frame(content), values)
    low, high = np.percentile(values, [1, 99])
    assert (read(content).frames[0].low, read(content).frames[0].high) == pytest.approx((low, high))
