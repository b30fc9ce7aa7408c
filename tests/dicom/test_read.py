"""Real and made files through the whole chain: windows, frames, and the outcome of each object."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from cbmir_spark.dicom.read import NotAnImage, Reason, Rejected, decode_frames, picture
from tests.support import dicom_index
from tests.support.dicom_files import (
    CT,
    ENHANCED_CT,
    PREPROCESSING,
    SECONDARY_CAPTURE,
    TINY,
    ULTRASOUND,
    header,
    item,
    made,
    read,
    real,
    written,
)
from tests.support.pixel_oracle import equals_rounded, resized, windowed

# --- windows ---


def test_the_header_window_never_reaches_the_network() -> None:
    values = np.arange(-1000, 24, dtype=np.int16).reshape(32, 32)
    hounsfield = {"RescaleSlope": 1, "RescaleIntercept": 0}
    plain = made(values, **hounsfield)
    narrow = made(values, WindowCenter=-900, WindowWidth=10, **hounsfield)
    assert np.array_equal(read(plain).frames[0].pixels, read(narrow).frames[0].pixels)
    assert not np.array_equal(picture(plain, 0), picture(narrow, 0))


def test_windows_by_body_part_and_only_on_hounsfield_units() -> None:
    values = np.arange(1024, dtype=np.int16).reshape(32, 32)
    hounsfield = {"RescaleSlope": 1, "RescaleIntercept": -1024}
    window = {part: read(made(values, BodyPartExamined=part, **hounsfield)).frames[0] for part in ("HEAD", "KNEE")}
    assert (window["HEAD"].low, window["HEAD"].high) == (-20.0, 100.0)
    assert (window["KNEE"].low, window["KNEE"].high) == (-160.0, 240.0)
    for other in ({}, {**hounsfield, "RescaleType": "US"}):
        frame = read(made(values, **other)).frames[0]
        assert (frame.high - frame.low) == pytest.approx(0.98 * 1023, rel=0.01)


def test_a_file_s_own_voi_lut_and_sigmoid_are_what_people_see() -> None:
    values = np.tile(np.arange(256, dtype=np.uint16), (256, 1))
    table = [min(4095, 20 * n) for n in range(240)]
    lut = item(LUTDescriptor=[240, 8, 12], LUTData=table)
    lut["LUTDescriptor"].VR, lut["LUTData"].VR = "US", "US"
    ds = header(made(values, Modality="MR"))
    ds.VOILUTSequence = Sequence([lut])
    entry = np.clip(values.astype(int) - 8, 0, 239)
    assert equals_rounded(picture(written(ds), 0), np.array(table)[entry] / 4095 * 255)
    content = made(values, Modality="MR", WindowCenter=100, WindowWidth=64, VOILUTFunction="SIGMOID")
    assert equals_rounded(picture(content, 0), 255 / (1 + np.exp(-4 * (values - 100.0) / 64)))


# --- frames ---


def test_middle_frame_of_a_cine_and_every_frame_of_an_enhanced_object() -> None:
    values = np.stack([np.full((8, 8), 100 * n, dtype=np.uint16) + np.eye(8, dtype=np.uint16) for n in range(5)])
    cine = read(made(values, SOPClassUID=ULTRASOUND, Modality="US"))
    assert [frame.number for frame in cine.frames] == [2]
    assert cine.tags.frames == 5
    assert cine.frames[0].low == pytest.approx(200)
    assert equals_rounded(cine.frames[0].pixels, resized(np.eye(8), 256, 256))
    enhanced = read(made(values, SOPClassUID=ENHANCED_CT))
    assert [frame.number for frame in enhanced.frames] == [0, 1, 2, 3, 4]
    spaced = read(made(values, SOPClassUID=ENHANCED_CT), replace(PREPROCESSING, max_frames=2))
    assert [frame.number for frame in spaced.frames] == [1, 3]
    every = read(made(values, SOPClassUID=ULTRASOUND, Modality="US"), replace(PREPROCESSING, frames="all"))
    assert len(every.frames) == 5
    three = replace(PREPROCESSING, frames=3)
    assert [frame.number for frame in read(made(values, SOPClassUID=ULTRASOUND, Modality="US"), three).frames] == [
        0,
        2,
        4,
    ]
    assert len(read(made(values, SOPClassUID=ENHANCED_CT), three).frames) == 3
    assert three.chosen(2, enhanced=False) == [0, 1]


def test_functional_groups_decide_for_each_frame() -> None:
    def group(slope: float, intercept: float) -> Dataset:
        transform = item(RescaleSlope=slope, RescaleIntercept=intercept, RescaleType="HU")
        return item(PixelValueTransformationSequence=Sequence([transform]))

    shared = item(PixelMeasuresSequence=Sequence([item(PixelSpacing=[0.5, 0.5], SliceThickness=2.5)]))
    values = np.tile(np.arange(0, 256, dtype=np.int16), (2, 256, 1))
    content = made(
        values,
        SOPClassUID=ENHANCED_CT,
        SharedFunctionalGroupsSequence=Sequence([shared]),
        PerFrameFunctionalGroupsSequence=Sequence([group(1, -160), group(2, -400)]),
    )
    instance = read(content)
    for frame, (slope, intercept) in zip(instance.frames, ((1, -160), (2, -400)), strict=True):
        unit = windowed(np.tile(np.arange(256.0) * slope + intercept, (256, 1)), -160, 240)
        assert equals_rounded(frame.pixels, unit * 255)
    tags = instance.tags
    assert (tags.pixel_spacing_row, tags.pixel_spacing_column, tags.slice_thickness) == (0.5, 0.5, 2.5)


def test_reading_twice_gives_the_same_bytes() -> None:
    for name in ("CT_small.dcm", "examples_ybr_color.dcm", "examples_rgb_color.dcm", "JPEG2000.dcm"):
        first, second = (read(real(name)).frames[0].pixels.tobytes() for _ in range(2))
        assert first == second


# --- images and other objects ---


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("rtdose.dcm", Reason.NOT_IMAGE_CLASS),
        ("rtplan.dcm", Reason.NOT_IMAGE_CLASS),
        ("rtstruct.dcm", Reason.NOT_IMAGE_CLASS),
        ("test-SR.dcm", Reason.NOT_IMAGE_CLASS),
        ("reportsi.dcm", Reason.NOT_IMAGE_CLASS),
        ("liver_1frame.dcm", Reason.NOT_IMAGE_CLASS),
        ("waveform_ecg.dcm", Reason.NOT_IMAGE_CLASS),
        ("DICOMDIR", Reason.DICOMDIR),
        ("README.txt", Reason.NOT_DICOM),
        ("zipMR.gz", Reason.NOT_DICOM),
        ("crayons.icc", Reason.NOT_DICOM),
    ],
)
def test_objects_that_are_no_images(name: str, reason: Reason) -> None:
    with pytest.raises(NotAnImage) as error:
        read(real(name))
    assert error.value.reason == reason


def test_a_header_alone_is_an_image_that_lost_its_pixels() -> None:
    """Only its class can tell it from an object that never had any."""
    for sop_class in (CT, ULTRASOUND, SECONDARY_CAPTURE):
        ds = header(made(TINY, SOPClassUID=sop_class))
        del ds.PixelData
        with pytest.raises(Rejected) as lost:
            read(written(ds))
        assert lost.value.reason == Reason.NO_PIXELS
    for sop_class in ("1.3.46.670589.5.0.1.1", "1.2.840.10008.1.1"):
        ds = header(made(TINY, SOPClassUID=sop_class))
        del ds.PixelData
        with pytest.raises(NotAnImage) as never:
            read(written(ds))
        assert never.value.reason == Reason.NO_PIXELS


# --- real files ---


BUNDLED: dict[tuple[str, str | None], str] = {
    ("not_an_image", Reason.NOT_IMAGE_CLASS): "ExplVR_BigEndNoMeta.dcm ExplVR_LitEndNoMeta.dcm badVR.dcm "
    "liver_1frame.dcm liver_expb_1frame.dcm no_meta_group_length.dcm reportsi.dcm reportsi_with_empty_number_tags.dcm "
    "rtdose.dcm rtdose_1frame.dcm rtdose_expb.dcm rtdose_expb_1frame.dcm rtdose_rle.dcm rtdose_rle_1frame.dcm "
    "rtplan.dcm rtstruct.dcm test-SR.dcm waveform_ecg.dcm",
    (
        "not_an_image",
        Reason.NOT_DICOM,
    ): "README README.txt crayons.icc no_meta.dcm rtplan.dump rtstruct.dump test1.json test_PN.json zipMR.gz",
    ("not_an_image", Reason.DICOMDIR): "DICOMDIR DICOMDIR-bigEnd DICOMDIR-empty.dcm DICOMDIR-implicit "
    "DICOMDIR-nooffset DICOMDIR-nopatient DICOMDIR-reordered",
    ("not_an_image", Reason.NO_PIXELS): "empty_charset_LEI.dcm",
    ("rejected", Reason.NO_PIXELS): "UN_sequence.dcm priv_SQ.dcm",
    ("rejected", Reason.TRUNCATED): "MR_truncated.dcm rtplan_truncated.dcm",
    ("rejected", Reason.MALFORMED): "meta_missing_tsyntax.dcm nested_priv_SQ.dcm",
    ("rejected", Reason.UNDECODABLE): "JPEG2000-embedded-sequence-delimiter.dcm",
}


def outcome_of(content: bytes) -> tuple[str, str | None]:
    try:
        assert read(content).frames
    except NotAnImage as error:
        return "not_an_image", error.reason
    except Rejected as error:
        return "rejected", error.reason
    return "ingested", None


def test_each_file_that_pydicom_carries_has_its_outcome_and_reason() -> None:
    wanted = {name: result for result, names in BUNDLED.items() for name in names.split()}
    folder = Path(str(get_testdata_file("CT_small.dcm"))).parent
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 150
    for path in files:
        # TINY_ALPHA is a directory of headers without their pixels, but for its DICOMDIR and readme.
        headers = "TINY_ALPHA" in path.parts and path.name.startswith("IM")
        result = ("rejected", Reason.NO_PIXELS) if headers else wanted.get(path.name, ("ingested", None))
        assert outcome_of(path.read_bytes()) == result, path.name


def test_each_file_of_the_index_has_the_outcome_and_reason_that_it_predicts(shared_data: Path) -> None:
    rows = dicom_index.rows(shared_data)
    assert len(rows) > 300
    found = {
        row["file"]: (dicom_index.predicted(row), outcome_of((shared_data / row["file"]).read_bytes())) for row in rows
    }
    assert {file: both for file, both in found.items() if both[0] != both[1]} == {}


def test_every_file_that_the_index_says_decodes_is_decoded(shared_data: Path) -> None:
    """Pixels alone: neither the class of an object nor its UID matters here."""
    rows = [row for row in dicom_index.rows(shared_data) if row["decode"] == "ok"]
    assert len(rows) > 300
    for row in rows:
        frames = 0
        for frame in decode_frames((shared_data / row["file"]).read_bytes()):
            assert frame.shape == (int(row["rows"]), int(row["cols"])), row["file"]
            frames += 1
            if row["spp"] == "1" and row["photometric"] != "PALETTE COLOR" and row["minmax"] and row["frames"] == "1":
                low, high = (float(end) for end in row["minmax"].split(".."))
                assert (frame.min(), frame.max()) == (low, high), row["file"]
        assert frames == int(row["frames"] or 1), row["file"]
