"""The policy on burned-in text: which objects are at risk, and what their pictures may be used for."""

import io
from typing import Any

import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from cbmir_spark.dicom import burned_in
from cbmir_spark.dicom.vocabulary_tables import UNKNOWN
from tests.support.dicom_files import CT, SECONDARY_CAPTURE, TINY, item, made, read, written

_STORAGE = "1.2.840.10008.5.1.4.1.1."
US = _STORAGE + "6.1"
PLAIN: dict[str, Any] = {
    "burned_in": "UNKNOWN",
    "kind": "image",
    "modality": "CT",
    "sop_class": CT,
    "cropped": False,
    "converted": False,
    "overlays": False,
}


@pytest.mark.parametrize(
    ("facts", "risk"),
    [
        ({}, False),
        ({"kind": "localizer"}, False),
        ({"burned_in": "YES"}, True),
        ({"kind": "screen", "burned_in": "NO"}, True),
        ({"modality": "US"}, True),
        ({"modality": "US", "burned_in": "NO"}, False),
        ({"modality": "US", "cropped": True}, False),
        ({"modality": "US", "cropped": True, "burned_in": "YES"}, True),
        ({"modality": "US", "cropped": True, "sop_class": US}, False),
        ({"sop_class": US}, True),
        ({"sop_class": _STORAGE + "3.1"}, True),
        # Regions do not clear a capture; BurnedInAnnotation NO does.
        ({"sop_class": SECONDARY_CAPTURE, "cropped": True}, True),
        ({"sop_class": SECONDARY_CAPTURE + ".4"}, True),
        ({"sop_class": SECONDARY_CAPTURE, "burned_in": "NO"}, False),
        ({"sop_class": _STORAGE + "77.1.4"}, True),
        ({"sop_class": _STORAGE + "66.1"}, False),
        ({"sop_class": None}, False),
        ({"modality": "OT"}, True),
        ({"modality": UNKNOWN}, True),
        ({"converted": True}, True),
        ({"overlays": True}, True),
        ({"overlays": True, "modality": "US", "cropped": True}, True),
        ({"overlays": True, "burned_in": "NO"}, False),
    ],
)
def test_which_objects_may_show_text(facts: dict[str, Any], risk: bool) -> None:
    assert burned_in.expected(**{**PLAIN, **facts}) is risk


@pytest.mark.parametrize(("risk", "is_allowed"), [(True, False), (False, True), (None, False)])
def test_only_a_picture_without_risk_is_allowed_unless_the_site_includes_all(
    risk: bool | None, is_allowed: bool
) -> None:
    assert burned_in.allowed(risk, "exclude") is is_allowed
    assert burned_in.allowed(risk, "include")


def _region(top: int, left: int, bottom: int, right: int) -> Dataset:
    return item(
        RegionSpatialFormat=1,
        RegionLocationMinY0=top,
        RegionLocationMinX0=left,
        RegionLocationMaxY1=bottom,
        RegionLocationMaxX1=right,
    )


LARGE = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64)


def _risk(pixels: NDArray[np.uint16] = TINY, **elements: object) -> bool:
    return bool(read(made(pixels, **elements)).tags.text_risk)


@pytest.mark.filterwarnings("ignore:.*Invalid value.*")
def test_the_risk_follows_from_the_header() -> None:
    assert not _risk()
    assert _risk(BurnedInAnnotation="YES")
    assert _risk(BurnedInAnnotation="perhaps", ConversionType="WSD")
    assert not _risk(BurnedInAnnotation="NO", ConversionType="WSD")
    assert _risk(Modality="US") and not _risk(Modality="US", BurnedInAnnotation="NO")
    assert not _risk(LARGE, Modality="US", SOPClassUID=US, SequenceOfUltrasoundRegions=[_region(8, 0, 63, 63)])
    # A region as large as the picture crops nothing.
    assert _risk(LARGE, Modality="US", SOPClassUID=US, SequenceOfUltrasoundRegions=[_region(0, 0, 63, 63)])


@pytest.mark.parametrize(("group", "bit"), [(0x6000, 0), (0x601E, 0), (0x6002, 12)])
def test_overlays_are_a_risk_in_separate_planes_and_in_unused_bits(group: int, bit: int) -> None:
    for claim, risk in (("UNKNOWN", True), ("NO", False)):
        ds = pydicom.dcmread(io.BytesIO(made(TINY, BurnedInAnnotation=None if risk else claim)))
        for element, value in [(0x10, 8), (0x11, 8), (0x100, 16 if bit else 1), (0x102, bit)]:
            ds.add_new((group, element), "US", value)
        if not bit:
            ds.add_new((group, 0x3000), "OW", bytes(8))
        assert read(written(ds)).tags.text_risk is risk
