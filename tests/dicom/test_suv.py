"""Standardised uptake values of PET, and the fixed window that needs them."""

import numpy as np
import pytest
from pydicom.sequence import Sequence

from cbmir_spark.dicom import suv
from tests.support.dicom_files import PET, header, item, made, read
from tests.support.pixel_oracle import equals_rounded, resized, windowed


def pet(**elements: object) -> bytes:
    drug = item(
        RadionuclideTotalDose=3.7e8,
        RadionuclideHalfLife=6586.2,
        RadiopharmaceuticalStartTime="090000.00",
    )
    values = np.tile(np.arange(0, 2560, 10, dtype=np.uint16), (32, 1))
    standard: dict[str, object] = {
        "SOPClassUID": PET,
        "Modality": "PT",
        "Units": "BQML",
        "DecayCorrection": "START",
        "CorrectedImage": ["DECY", "ATTN", "SCAT"],
        "PatientWeight": 70,
        "SeriesDate": "20200102",
        "SeriesTime": "100000",
        "AcquisitionDate": "20200102",
        "AcquisitionTime": "100500",
        "RescaleSlope": 20,
        "RescaleIntercept": 0,
        "RadiopharmaceuticalInformationSequence": Sequence([drug]),
    }
    return made(values, **{**standard, **elements})


def test_pet_in_standardised_uptake_values() -> None:
    (frame,) = read(pet()).frames
    # One hour of F-18: the dose has decayed by 2^(-3600/6586.2); SUV = activity × weight in grams ÷ that dose.
    factor = 70_000 / (3.7e8 * 2 ** (-3600 / 6586.2))
    assert (frame.low, frame.high) == pytest.approx((0.0, 10 / factor))
    assert equals_rounded(
        frame.pixels[112:144],
        resized(windowed(np.tile(np.arange(0, 2560, 10) * 20.0, (32, 1)), 0, 10 / factor), 32, 256)[112:144],
    )


@pytest.mark.parametrize(
    ("elements", "factor"),
    [
        ({"Units": "GML"}, 1.0),
        ({"DecayCorrection": "ADMIN"}, 70_000 / 3.7e8),
        ({"Units": "GML", "SUVType": "LBM"}, None),
        ({"PatientWeight": None}, None),
        ({"PatientWeight": 0}, None),
        ({"CorrectedImage": ["DECY"]}, None),
        ({"DecayCorrection": "NONE"}, None),
        ({"Units": "PROPCPS"}, None),
        ({"RadiopharmaceuticalInformationSequence": Sequence([])}, None),
        # A derived series carries the time of its making, later than the acquisition: its scan start is unknown.
        ({"SeriesTime": "180000"}, None),
    ],
)
def test_pet_units(elements: dict[str, object], factor: float | None) -> None:
    content = pet(**elements)
    assert suv.suv_factor(header(content)) == pytest.approx(factor)
    (frame,) = read(content).frames
    if factor is None:
        assert frame.high == pytest.approx(0.99 * 2550 * 20, rel=0.02)
    else:
        assert frame.high == pytest.approx(10 / factor)


def test_an_injection_before_midnight() -> None:
    drug = item(RadionuclideTotalDose=3.7e8, RadionuclideHalfLife=6586.2, RadiopharmaceuticalStartTime="233000")
    content = pet(
        SeriesTime="003000", AcquisitionTime="003500", RadiopharmaceuticalInformationSequence=Sequence([drug])
    )
    assert suv.suv_factor(header(content)) == pytest.approx(70_000 / (3.7e8 * 2 ** (-3600 / 6586.2)))
