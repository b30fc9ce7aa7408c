"""The allow-listed tags of real and of malformed headers."""

from dataclasses import asdict, fields

import numpy as np
import pytest
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian

from cbmir_spark.dicom.read import Reason, Rejected
from cbmir_spark.dicom.tags import Tags
from cbmir_spark.dicom.vocabulary_tables import UNKNOWN
from tests.support.dicom_files import CT, ENHANCED_CT, SECONDARY_CAPTURE, TINY, header, item, made, read, real, written


@pytest.mark.parametrize(
    ("elements", "years"),
    [
        ({"PatientAge": "045Y"}, 45.0),
        ({"PatientAge": "018M"}, 1.5),
        ({"PatientAge": "026W"}, 26 * 7 / 365.25),
        ({"PatientAge": "003D"}, 3 / 365.25),
        ({"PatientAge": "000Y"}, 0.0),
        ({"PatientAge": "089Y"}, 89.0),
        ({"PatientAge": "090Y"}, 90.0),
        ({"PatientAge": "104Y"}, 90.0),
        ({"PatientAge": "45"}, None),
        ({"PatientAge": "SMITH"}, None),
        ({"PatientAge": "", "PatientBirthDate": "19800301", "StudyDate": "20200301"}, 40.0),
        ({"PatientAge": "999M"}, 83.25),
        ({"PatientAge": "999D"}, 999 / 365.25),
        ({"PatientBirthDate": "19000301", "StudyDate": "20200301"}, 90.0),
        ({"PatientBirthDate": "19300302", "StudyDate": "20200301"}, 89.9986),
        ({"PatientBirthDate": "1930.03.01", "AcquisitionDate": "20200301"}, 90.0),
        ({"PatientBirthDate": "20210301", "StudyDate": "20200301"}, None),
        ({"PatientBirthDate": "19801399", "StudyDate": "20200301"}, None),
        ({}, None),
    ],
)
@pytest.mark.filterwarnings("ignore:.*Invalid value.*")
def test_age_in_years(elements: dict[str, str], years: float | None) -> None:
    age = read(made(TINY, **elements)).tags.age_years
    assert age == (None if years is None else pytest.approx(years, abs=2e-3))
    # All ages above 89 are the same.
    assert (age == 90.0) is (years == 90.0)


def test_tags_of_a_real_file() -> None:
    instance = read(real("CT_small.dcm"))
    ds = header(real("CT_small.dcm"))
    tags = instance.tags
    assert tags.sop_instance_uid == ds.SOPInstanceUID
    assert (tags.study_instance_uid, tags.series_instance_uid) == (ds.StudyInstanceUID, ds.SeriesInstanceUID)
    assert tags.patient_id_raw == ds.PatientID
    assert (tags.modality, tags.modality_raw, tags.body_part, tags.body_part_raw) == ("CT", "CT", UNKNOWN, None)
    assert (tags.rows, tags.columns, tags.frames, tags.samples_per_pixel) == (128, 128, 1, 1)
    assert (tags.sex, tags.age_years, tags.year, tags.kind) == ("O", 0.0, 2004, "image")
    assert (tags.bits_stored, tags.signed, tags.photometric) == (16, True, "MONOCHROME2")
    assert (tags.pixel_spacing_row, tags.slice_thickness) == (pytest.approx(0.661468), 5.0)
    assert (tags.transfer_syntax, tags.sop_class, tags.burned_in) == (str(ExplicitVRLittleEndian), CT, "UNKNOWN")


def test_the_coded_region_stands_in_for_an_empty_body_part() -> None:
    region = Sequence([item(CodeValue="64033007", CodingSchemeDesignator="SCT", CodeMeaning="Kidney")])
    tags = read(made(TINY, BodyPartExamined="", AnatomicRegionSequence=region)).tags
    assert (tags.body_part, tags.body_part_raw) == ("KIDNEY", "KIDNEY")
    tags = read(made(TINY, BodyPartExamined="CHEST", AnatomicRegionSequence=region)).tags
    assert tags.body_part == "CHEST"
    anatomy = item(FrameAnatomySequence=Sequence([item(AnatomicRegionSequence=region, FrameLaterality="L")]))
    tags = read(made(TINY, SOPClassUID=ENHANCED_CT, SharedFunctionalGroupsSequence=Sequence([anatomy]))).tags
    assert (tags.body_part, tags.laterality) == ("KIDNEY", "L")
    frames = np.stack([TINY, TINY])
    per_frame = Sequence([anatomy, anatomy])
    tags = read(made(frames, SOPClassUID=ENHANCED_CT, PerFrameFunctionalGroupsSequence=per_frame)).tags
    assert (tags.body_part, tags.body_part_raw, tags.laterality) == ("KIDNEY", "KIDNEY", "L")


@pytest.mark.filterwarnings("ignore:.*Invalid value.*")
@pytest.mark.filterwarnings("ignore:.*value length.*")
def test_a_body_part_that_is_free_text_is_stored_as_its_term() -> None:
    """The free text is not stored, but a changed vocabulary needs a value to map."""
    tags = read(made(TINY, BodyPartExamined="Chest/Abdomen of Mr Miller")).tags
    assert (tags.body_part, tags.body_part_raw) == ("CHESTABDOMEN", "CHESTABDOMEN")


@pytest.mark.filterwarnings("ignore:.*Invalid value.*")
@pytest.mark.filterwarnings("ignore:.*value length.*")
def test_free_text_stays_out_of_the_coded_tags() -> None:
    tags = read(
        made(
            TINY,
            Modality="Müller^Hans",
            BodyPartExamined="Hans Müller, born 3.4.1950",
            PatientSex="Hans",
            ViewPosition="HANS MULLER",
            ImageLaterality="MULLER",
            BurnedInAnnotation="MULLER",
            SpecificCharacterSet="ISO_IR 100",
        )
    ).tags
    assert (tags.modality, tags.modality_raw, tags.body_part, tags.body_part_raw) == (UNKNOWN, None, UNKNOWN, None)
    assert (tags.sex, tags.view_position, tags.laterality, tags.burned_in) == (None, None, None, "UNKNOWN")


@pytest.mark.parametrize(
    ("elements", "kind"),
    [
        ({"ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"]}, "image"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, "localizer"),
        ({"ImageType": ["DERIVED", "SECONDARY", "SCREEN SAVE"]}, "screen"),
        ({"SeriesDescription": "Dose Report"}, "screen"),
        ({"SeriesDescription": "Patient Protocol"}, "screen"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.77.1.6", "Modality": "SM"}, "whole_slide"),
        # Gray pictures wrapped as secondary capture are content.
        ({"SOPClassUID": SECONDARY_CAPTURE, "ImageType": ["DERIVED", "SECONDARY"], "ConversionType": "WSD"}, "image"),
    ],
)
def test_kinds(elements: dict[str, object], kind: str) -> None:
    assert read(made(TINY, **elements)).tags.kind == kind


@pytest.mark.filterwarnings("ignore:.*Invalid value.*")
@pytest.mark.filterwarnings("ignore:.*value length.*")
@pytest.mark.parametrize("uid", [".1.2", "1.2.", "1..2", "1.2.x", "1." * 32 + "1", "1.2/../../x"])
def test_an_instance_needs_a_valid_uid(uid: str | None) -> None:
    with pytest.raises(Rejected) as error:
        read(made(TINY, SOPInstanceUID=uid))
    assert error.value.reason == Reason.NO_UID


@pytest.mark.parametrize("uid", [None, ""])
def test_the_meta_information_names_an_instance_whose_data_set_does_not(uid: str | None) -> None:
    content = made(TINY, SOPInstanceUID=uid)
    assert read(content).tags.sop_instance_uid == header(content).file_meta.MediaStorageSOPInstanceUID


@pytest.mark.filterwarnings("ignore:.*Invalid value.*")
@pytest.mark.parametrize("sop_class", ["", "no.uid.at.all", "1..2"])
def test_every_tag_that_the_table_requires_is_there(sop_class: str) -> None:
    """A null in a required column would fail the job, and with it every other file."""
    named = made(TINY).replace(CT.encode(), sop_class.encode().ljust(len(CT), b"\0"))
    tags = asdict(read(named).tags)
    optional = {field.name for field in fields(Tags) if "None" in str(field.type)}
    assert [name for name, value in tags.items() if value is None and name not in optional] == []
    assert tags["sop_class"] == UNKNOWN


def test_elements_of_another_vr_are_absent_and_no_error() -> None:
    ds = header(made(TINY))
    ds.add_new(0x00080008, "US", 5)
    ds.add_new(0x52009230, "US", 5)
    tags = read(written(ds)).tags
    assert (tags.kind, tags.modality) == ("image", "CT")


@pytest.mark.parametrize("day", ["20200105", "2020.01.05", "2020/01/05", "20200105120000.000"])
def test_dates_in_other_spellings(day: str) -> None:
    ds = header(made(TINY, PatientBirthDate="19800105"))
    ds.add_new(0x00080020, "LO", day)
    tags = read(written(ds)).tags
    assert (tags.year, tags.age_years) == (2020, pytest.approx(40.0, abs=0.01))
