"""The steps from stored values to a gray picture, against values computed from the files' raw bytes.

The oracles use numpy alone: pixel bytes sliced out of the file, arithmetic in float64, a triangle filter written as a
matrix. They use nothing of pydicom.pixels.
"""

import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pydicom.data import get_testdata_file
from pydicom.sequence import Sequence

from cbmir_spark.dicom import gray
from cbmir_spark.dicom.read import picture
from cbmir_spark.dicom.stored import Stored
from tests.support.dicom_files import (
    PREPROCESSING,
    ULTRASOUND,
    header,
    item,
    made,
    only_frame,
    read,
    real,
    stored_in,
    written,
)
from tests.support.pixel_oracle import equals_rounded, resized, triangle_weights, windowed


def test_the_oracle_itself_on_a_case_worked_by_hand() -> None:
    # Four to two: each output centre lies between two inputs; weights 1-|d|/2 are 1/8, 3/8, 3/8, 1/8 inside.
    assert triangle_weights(6, 3)[1] == pytest.approx([0, 1 / 8, 3 / 8, 3 / 8, 1 / 8, 0])
    assert triangle_weights(3, 3) == pytest.approx(np.eye(3))


# --- color ---


def test_palette_through_its_tables() -> None:
    content = real("examples_palette.dcm")
    ds = header(content)
    assert (ds.PhotometricInterpretation, ds.Rows, ds.Columns) == ("PALETTE COLOR", 350, 800)
    index = stored_in(content, "u1", 350, 800)
    entries, first, bits = ds.RedPaletteColorLookupTableDescriptor
    assert (entries, first, bits) == (256, 0, 16)
    tables = [
        np.frombuffer(ds[f"{color}PaletteColorLookupTableData"].value, "<u2").astype(float)
        for color in ("Red", "Green", "Blue")
    ]
    luma = (0.299 * tables[0] + 0.587 * tables[1] + 0.114 * tables[2])[index]
    assert np.allclose(only_frame(content), luma, rtol=1e-6, atol=1e-2)


def test_palette_of_eight_bit_entries_two_in_a_word() -> None:
    table = bytes(range(0, 200, 2))
    content = made(
        np.array([[0, 9], [10, 109], [60, 255]], dtype=np.uint8),
        Modality="US",
        PhotometricInterpretation="PALETTE COLOR",
        **{
            f"{color}PaletteColorLookupTable{part}": value
            for color in ("Red", "Green", "Blue")
            for part, value in (("Descriptor", [100, 10, 8]), ("Data", table))
        },
    )
    # Values below the first mapped one take the first entry, values past the last one the last.
    assert only_frame(content) == pytest.approx(np.array([[0, 0], [0, 198], [100, 198]]), abs=1e-3)


def test_segmented_palette() -> None:
    # Discrete 5, 7; linear over 4 to 15; then the discrete segment once more, by its byte offset.
    words = [0, 2, 5, 7, 1, 4, 15, 2, 1, 0, 0]
    content = made(
        np.arange(8, dtype=np.uint8).reshape(2, 4),
        Modality="US",
        PhotometricInterpretation="PALETTE COLOR",
        **{
            f"{prefix}{color}PaletteColorLookupTable{part}": value
            for color in ("Red", "Green", "Blue")
            for prefix, part, value in (
                ("", "Descriptor", [8, 0, 16]),
                ("Segmented", "Data", struct.pack("<11H", *words)),
            )
        },
    )
    assert only_frame(content) == pytest.approx(np.array([[5, 7, 9, 11], [13, 15, 5, 7]]), abs=1e-3)


def test_rgb_by_pixel_and_by_plane() -> None:
    content = real("examples_rgb_color.dcm")
    ds = header(content)
    assert (ds.PhotometricInterpretation, ds.PlanarConfiguration, ds.Rows, ds.Columns) == ("RGB", 0, 240, 320)
    rgb = stored_in(content, "u1", 240, 320, 3)
    luma = rgb @ np.array([0.299, 0.587, 0.114])
    assert np.allclose(only_frame(content), luma, atol=1e-3)
    ds.PlanarConfiguration = 1
    ds.PixelData = np.ascontiguousarray(rgb.transpose(2, 0, 1)).tobytes()
    assert np.allclose(only_frame(written(ds)), luma, atol=1e-3)


def test_ybr_full_422_native_takes_y() -> None:
    content = real("SC_ybr_full_422_uncompressed.dcm")
    ds = header(content)
    assert (ds.PhotometricInterpretation, ds.Rows, ds.Columns) == ("YBR_FULL_422", 100, 100)
    quads = np.frombuffer(ds.PixelData, "u1").reshape(-1, 4)
    assert np.array_equal(only_frame(content), quads[:, :2].reshape(100, 100))


# --- values ---


def test_ct_in_hounsfield_units_without_its_padding() -> None:
    """A real file, signed, with a rescale and declared padding, which is planted in its corner as by a scanner."""
    content = real("CT_small.dcm")
    ds = header(content)
    assert (ds.Rows, ds.Columns, ds.PixelRepresentation, ds.BitsStored) == (128, 128, 1, 16)
    assert (ds.RescaleSlope, ds.RescaleIntercept, ds.PixelPaddingValue) == (1, -1024, -2000)
    stored = stored_in(content, "<i2", 128, 128).copy()
    stored[:40, :40] = -2000
    planted = content.replace(ds.PixelData, stored.tobytes())
    assert planted != content
    assert np.array_equal(only_frame(planted), stored)
    (frame,) = read(planted).frames
    unit = windowed(stored.astype(np.float64) - 1024, -160, 240)
    unit[:40, :40] = 0
    assert equals_rounded(frame.pixels, resized(unit))
    assert (frame.number, frame.low, frame.high) == (0, -160.0, 240.0)


def test_padding_is_background_where_it_would_be_bright_and_out_of_the_percentiles() -> None:
    values = np.tile(np.arange(100, 164, dtype=np.uint16), (64, 1))
    values[:, :32] = 4000
    plain = made(values, Modality="MR", PixelPaddingValue=4000)
    (frame,) = read(plain).frames
    assert 132 <= frame.low < frame.high <= 163
    assert frame.pixels[:, :120].max() == 0
    inverted = made(values, Modality="CR", PixelPaddingValue=4000, PhotometricInterpretation="MONOCHROME1")
    (frame,) = read(inverted).frames
    assert frame.pixels[:, :120].max() == 0
    assert frame.pixels[128, 140] > frame.pixels[128, 250]
    (frame,) = read(made(values, Modality="MR", PixelPaddingValue=3990, PixelPaddingRangeLimit=4095)).frames
    assert frame.high <= 163


def test_padding_written_with_the_other_sign_is_recognised() -> None:
    values = np.full((32, 32), 50, dtype=np.int16)
    values[0] = -2000
    ds = header(made(values))
    ds.add_new("PixelPaddingValue", "US", 63536)
    # pydicom writes the VR it is given: the file then has 63536 for a signed picture.
    stored = Stored("", True, "PixelData", "OW", 32, 32, 1, 1, 16, 16, 15, True, "MONOCHROME2", 0, True)
    mask = gray.padding_mask(values, stored, ds)
    assert mask is not None
    assert mask.sum() == 32


def test_monochrome1_is_inverted() -> None:
    content = (
        Path(str(get_testdata_file("CT_small.dcm"))).parent.joinpath("dicomdirtests/77654033/CR1/6154").read_bytes()
    )
    ds = header(content)
    assert (ds.PhotometricInterpretation, ds.Rows, ds.Columns, ds.BitsStored) == ("MONOCHROME1", 16, 16, 12)
    stored = stored_in(content, "<u2", 16, 16) & 0x0FFF
    assert np.array_equal(only_frame(content), stored)
    (frame,) = read(content).frames
    values = stored * float(ds.get("RescaleSlope", 1)) + float(ds.get("RescaleIntercept", 0))
    low, high = np.percentile(values, [1, 99])
    assert (frame.low, frame.high) == pytest.approx((low, high))
    spacing = [float(x) for x in ds.get("PixelSpacing", ds.get("ImagerPixelSpacing", [1, 1]))]
    assert spacing[0] == spacing[1]
    assert equals_rounded(frame.pixels, resized(1 - windowed(values, low, high)))


def test_modality_lut_sequence() -> None:
    values = np.arange(16, dtype=np.uint8).reshape(4, 4)
    lut = item(LUTDescriptor=[4, 6, 16], ModalityLUTType="US", LUTData=[100, 200, 400, 800])
    ds = header(made(values, Modality="MR"))
    ds.ModalityLUTSequence = Sequence([lut])
    ds["ModalityLUTSequence"].value[0]["LUTDescriptor"].VR = "US"
    ds["ModalityLUTSequence"].value[0]["LUTData"].VR = "US"
    shown = gray.modality_values(values, ds, 0, True)
    table = [100] * 7 + [200, 400] + [800] * 7
    assert np.array_equal(shown, np.array(table, dtype=np.float32).reshape(4, 4))
    assert len(read(written(ds)).frames) == 1


# --- windows ---


def test_flat_and_nearly_flat_frames() -> None:
    flat = np.full((20, 20), 7, dtype=np.uint16)
    assert read(made(flat, Modality="MR")).frames[0].pixels.max() == 0
    flat[3, 3] = 900
    spot = read(made(flat, Modality="MR")).frames[0]
    assert (spot.low, spot.high) == (7.0, 900.0)
    assert spot.pixels.max() > 0


@pytest.mark.parametrize(
    ("function", "wanted"),
    [
        # PS3.3 section C.11.2.1.2: c=50, w=21, so the ramp runs over c-0.5 ± 10.
        ("LINEAR", lambda x: np.clip((x - 39.5) / 20, 0, 1)),
        ("LINEAR_EXACT", lambda x: np.clip((x - 39.5) / 21, 0, 1)),
        ("SIGMOID", lambda x: 1 / (1 + np.exp(-4 * (x - 50) / 21))),
    ],
)
def test_voi_functions(function: str, wanted: object) -> None:
    values = np.arange(100, dtype=np.float32).reshape(10, 10)
    ds = item(WindowCenter=[50, 3], WindowWidth=[21, 4], VOILUTFunction=function)
    assert callable(wanted)
    assert gray.voi(values, None, ds, 0, True) == pytest.approx(wanted(values.astype(float)), abs=1e-6)


def test_voi_lut_sequence_comes_before_a_window() -> None:
    lut = item(LUTDescriptor=[3, 10, 8], LUTData=[0, 51, 255])
    lut["LUTDescriptor"].VR, lut["LUTData"].VR = "US", "US"
    ds = item(VOILUTSequence=Sequence([lut]), WindowCenter=50, WindowWidth=20)
    values = np.array([[0, 10, 11, 12, 99]], dtype=np.float32)
    assert gray.voi(values, None, ds, 0, True) == pytest.approx(np.array([[0, 0, 0.2, 1, 1]]))


# --- geometry ---


def test_the_aspect_ratio_is_physical_or_stretched() -> None:
    values = np.full((50, 100), 1000, dtype=np.int16)
    hounsfield = {"RescaleSlope": 1, "RescaleIntercept": 0}
    wide = read(made(values, **hounsfield)).frames[0].pixels
    assert (wide.max(axis=1) > 0).sum() == 128
    assert wide[64:192].min() == 255
    square = read(made(values, PixelSpacing=[2, 1], **hounsfield)).frames[0].pixels
    assert square.min() == 255
    tall = read(made(values, PixelSpacing=[4, 1], **hounsfield)).frames[0].pixels
    assert (tall.max(axis=0) > 0).sum() == 128
    aspect = read(made(values, PixelAspectRatio=["4", "1"], **hounsfield)).frames[0].pixels
    assert np.array_equal(aspect, tall)
    stretched = read(made(values, **hounsfield), replace(PREPROCESSING, aspect="stretch")).frames[0].pixels
    assert stretched.min() == 255
    for lie in ([0, 1], [1e9, 1], [-2, 1]):
        assert np.array_equal(read(made(values, PixelSpacing=lie, **hounsfield)).frames[0].pixels, wide)


def test_reduction_is_antialiased() -> None:
    """Stripes finer than the output's pixels become gray; taking every n-th pixel would show some."""
    values = np.zeros((1024, 1024), dtype=np.int16)
    values[:, ::2] = 80
    frame = read(made(values, RescaleSlope=1, RescaleIntercept=0)).frames[0]
    level = 255 * (160 / 400 + 240 / 400) / 2
    assert np.abs(frame.pixels[:, 2:-2].astype(float) - level).max() <= 1


def test_ultrasound_is_cropped_to_its_regions() -> None:
    values = np.full((100, 200), 255, dtype=np.uint8)
    values[20:60, 50:130] = np.arange(80, dtype=np.uint8)
    region = item(
        RegionSpatialFormat=1,
        RegionLocationMinX0=50,
        RegionLocationMinY0=20,
        RegionLocationMaxX1=129,
        RegionLocationMaxY1=59,
    )
    trace = item(
        RegionSpatialFormat=3,
        RegionLocationMinX0=0,
        RegionLocationMinY0=0,
        RegionLocationMaxX1=199,
        RegionLocationMaxY1=99,
    )
    content = made(values, SOPClassUID=ULTRASOUND, Modality="US", SequenceOfUltrasoundRegions=Sequence([trace, region]))
    (frame,) = read(content).frames
    inner = values[20:60, 50:130]
    low, high = np.percentile(inner, [1, 99])
    assert (frame.low, frame.high) == pytest.approx((low, high))
    assert equals_rounded(frame.pixels, resized(windowed(inner, low, high), 128, 256))
    for_people = picture(content, 0)
    assert for_people.max() < 255 * 80 / 255 * 1.02, "nothing from outside the regions"


@pytest.mark.parametrize("intercept", [b"N/A    ", b"-1 024 ", b"-1024HU", b"-1.024,0"])
def test_a_rescale_that_is_no_number_leaves_the_units_unknown(intercept: bytes) -> None:
    placeholder = "-" + "7" * (len(intercept) - 1)
    content = made(
        np.arange(64, dtype=np.uint16).reshape(8, 8), RescaleSlope=["1"], RescaleIntercept=[placeholder]
    ).replace(placeholder.encode(), intercept)
    (frame,) = read(content).frames
    # The percentiles of stored values, not the fixed window of CT.
    assert (frame.low, frame.high) == pytest.approx((0.63, 62.37))
    (frame,) = read(content.replace(intercept, b"-1024".ljust(len(intercept)))).frames
    assert (frame.low, frame.high) == (-160.0, 240.0)
