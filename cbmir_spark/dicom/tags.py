"""Read the allow-listed tags of a data set, normalized; no other value of a header is stored."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any, Literal

from pydicom.dataset import Dataset

from cbmir_spark.dicom import burned_in, gray
from cbmir_spark.dicom.elements import functional_group, identifier, items, number, value
from cbmir_spark.dicom.reasons import Reason, Rejected
from cbmir_spark.dicom.sop_classes import SECONDARY_CAPTURE, WHOLE_SLIDE
from cbmir_spark.dicom.stored import Stored
from cbmir_spark.dicom.vocabulary import Vocabulary
from cbmir_spark.dicom.vocabulary_tables import UNKNOWN

__all__ = ["Kind", "Tags", "read_tags"]

Kind = Literal["image", "localizer", "screen", "whole_slide"]


@dataclass(frozen=True)
class Tags:
    """The allow-list: the only tags that are stored, the UIDs, the Patient ID and its issuer as pseudonyms."""

    sop_instance_uid: str
    series_instance_uid: str | None
    study_instance_uid: str | None
    patient_id_raw: str | None  # whole
    patient_id_first: str | None  # up to the first backslash, undecodable bytes replaced: what lakes before had
    patient_issuer: str | None
    modality: str
    body_part: str
    modality_raw: str | None
    # BodyPartExamined where it is a code string; else the term of it, or of the coded region where it is empty.
    body_part_raw: str | None
    kind: Kind
    sex: str | None
    age_years: float | None
    year: int | None
    laterality: str | None
    view_position: str | None
    rows: int
    columns: int
    frames: int
    pixel_spacing_row: float | None  # millimetres
    pixel_spacing_column: float | None
    slice_thickness: float | None
    photometric: str
    bits_stored: int
    signed: bool
    samples_per_pixel: int
    transfer_syntax: str
    sop_class: str  # UNKNOWN where the object names no valid one
    burned_in: str
    text_risk: bool  # the pixels may show burned-in text: burned_in.py


def _terms(text: str) -> frozenset[str]:
    return frozenset(text.split("|"))


# Overlays in unused bits of the pixels are described in these groups too (PS3.5 section 7.6).
_OVERLAY_GROUPS = frozenset(range(0x6000, 0x6100, 2))
# Defined terms of View Position (PS3.3 section C.8.11.5, CID 4014 and 4010); any other value is dropped.
_VIEWS = _terms("AP|PA|LL|RL|RLD|LLD|RLO|LLO|LAT|OBL|CC|MLO|ML|LM|LMO|SIO|XCC|XCCL|XCCM|FB|ISO|AT|CV|SPECIMEN")


def read_tags(ds: Dataset, stored: Stored, sop_class: str, media_uid: str, vocabulary: Vocabulary) -> Tags:
    """Read and normalize the tags of a data set whose Image Pixel module is `stored`.

    `media_uid` of the file meta information names an instance whose data set does not.

    Raises Rejected (NO_UID) without a valid SOP Instance UID. Every other tag that is absent or invalid is None, or
    UNKNOWN where the table requires a value.
    """
    uid = _uid(ds, "SOPInstanceUID")
    if uid is None and _is_uid(media_uid) and not _text(ds, "SOPInstanceUID"):
        uid = media_uid
    if uid is None:
        raise Rejected(Reason.NO_UID, "not a UID" if _text(ds, "SOPInstanceUID") else "absent or empty")
    raw_modality = _text(ds, "Modality")
    raw_body_part = _text(ds, "BodyPartExamined")
    if raw_body_part is None:
        region = vocabulary.region(_region_codes(ds))
        raw_body_part = None if region == UNKNOWN else region
    body_part = vocabulary.body_part(raw_body_part)
    spacing = gray.pixel_spacing(ds, 0)
    measures = functional_group(ds, 0, "PixelMeasuresSequence")
    thickness = number(measures, "SliceThickness") if measures is not None else number(ds, "SliceThickness")
    declared = _one_of(_text(ds, "BurnedInAnnotation"), ("YES", "NO")) or "UNKNOWN"
    modality = vocabulary.modality(raw_modality)
    kind = _kind(ds, stored, sop_class, modality)
    return Tags(
        sop_instance_uid=uid,
        series_instance_uid=_uid(ds, "SeriesInstanceUID"),
        study_instance_uid=_uid(ds, "StudyInstanceUID"),
        patient_id_raw=identifier(ds, "PatientID"),
        patient_id_first=_text(ds, "PatientID"),
        patient_issuer=identifier(ds, "IssuerOfPatientID"),
        modality=modality,
        body_part=body_part,
        modality_raw=_code_string(raw_modality),
        body_part_raw=_code_string(raw_body_part) or (None if body_part == UNKNOWN else body_part),
        kind=kind,
        sex=_one_of(_text(ds, "PatientSex"), ("M", "F", "O")),
        age_years=_age_years(ds),
        year=_year(ds),
        laterality=_laterality(ds),
        view_position=_one_of(_text(ds, "ViewPosition"), _VIEWS),
        rows=stored.rows,
        columns=stored.columns,
        frames=stored.frames,
        pixel_spacing_row=spacing[0] if spacing else None,
        pixel_spacing_column=spacing[1] if spacing else None,
        slice_thickness=thickness if thickness is not None and thickness > 0 else None,
        photometric=stored.photometric,
        bits_stored=stored.bits_stored,
        signed=stored.signed,
        samples_per_pixel=stored.samples,
        transfer_syntax=stored.transfer_syntax,
        sop_class=sop_class if _is_uid(sop_class) else UNKNOWN,
        burned_in=declared,
        text_risk=burned_in.expected(
            burned_in=declared,
            kind=kind,
            modality=modality,
            sop_class=sop_class,
            cropped=_is_cropped(ds, stored),
            converted=_text(ds, "ConversionType") is not None,
            overlays=any(tag.group in _OVERLAY_GROUPS for tag in list(ds.keys())),
        ),
    )


def _is_cropped(ds: Dataset, stored: Stored) -> bool:
    """Tell whether the crop to the regions of an ultrasound removes anything."""
    box = gray.crop_box(ds, stored.rows, stored.columns)
    return box is not None and box != (0, 0, stored.rows, stored.columns)


def _text(ds: Dataset, keyword: str) -> str | None:
    """Return the first value of a text element, trimmed; None where it is absent or empty."""
    found = value(ds, keyword)
    if found is not None and not isinstance(found, str) and hasattr(found, "__getitem__"):
        found = found[0] if len(found) else None
    text = str(found).strip(" \0") if found is not None else ""
    return text or None


def _one_of(text: str | None, known: Any) -> str | None:
    upper = (text or "").upper()
    return upper if upper in known else None


# A Code String (PS3.5 section 6.2): free text, which may name a patient, does not match.
_CODE_STRING = re.compile(r"[A-Z0-9 _]{1,16}")


def _code_string(text: str | None) -> str | None:
    upper = (text or "").upper()
    return upper if _CODE_STRING.fullmatch(upper) else None


_UID = re.compile(r"[0-9]+(\.[0-9]+)*")


def _is_uid(text: str | None) -> bool:
    """Check a UID (PS3.5 section 9.1): at most 64 digits and single dots, with a digit at each end."""
    return text is not None and len(text) <= 64 and _UID.fullmatch(text) is not None


def _uid(ds: Dataset, keyword: str) -> str | None:
    text = _text(ds, keyword)
    return text if _is_uid(text) else None


def _region_codes(ds: Dataset) -> list[str]:
    """Return the codes of the Anatomic Region Sequence, of the object and of its first frame's anatomy macro."""
    anatomy = functional_group(ds, 0, "FrameAnatomySequence")
    sources = [ds] + ([anatomy] if anatomy is not None else [])
    regions = [item for source in sources for item in items(source, "AnatomicRegionSequence")]
    return [code for item in regions if (code := _text(item, "CodeValue") or _text(item, "LongCodeValue"))]


def _laterality(ds: Dataset) -> str | None:
    anatomy = functional_group(ds, 0, "FrameAnatomySequence")
    found = _text(ds, "ImageLaterality") or _text(ds, "Laterality")
    if found is None and anatomy is not None:
        found = _text(anatomy, "FrameLaterality")
    return _one_of(found, ("L", "R", "B", "U"))


_AGE = re.compile(r"(\d{1,3})\s*([DWMY])")
_DAYS_PER_YEAR = 365.25
_PER_YEAR = {"D": _DAYS_PER_YEAR, "W": _DAYS_PER_YEAR / 7, "M": 12.0, "Y": 1.0}
# Writers put such ages for an unknown one.
_IMPOSSIBLE = 130
# An age above 89 identifies by itself (45 CFR 164.514(b)(2)(i)(C)).
_OLDEST = 90.0
# Dates of birth that stand for an unknown one.
_PLACEHOLDERS = (date(1900, 1, 1),)


def _age_years(ds: Dataset) -> float | None:
    """Convert Patient's Age (0010,1010) to years, else count from birth to study; every age above 89 becomes 90."""
    match = _AGE.fullmatch((_text(ds, "PatientAge") or "").upper())
    years = int(match[1]) / _PER_YEAR[match[2]] if match else _IMPOSSIBLE
    if years >= _IMPOSSIBLE:
        birth = _date(ds, "PatientBirthDate")
        dates = (_date(ds, keyword) for keyword in ("StudyDate", "AcquisitionDate", "AcquisitionDateTime"))
        study = next((day for day in dates if day is not None), None)
        if birth is None or study is None or birth > study or birth in _PLACEHOLDERS:
            return None
        years = (study - birth).days / _DAYS_PER_YEAR
        # By the calendar too: on a 90th birthday the days alone may add up to less than 90 years.
        if study.year - birth.year - ((study.month, study.day) < (birth.month, birth.day)) >= _OLDEST:
            years = _OLDEST
    return _OLDEST if years >= _OLDEST else years


def _year(ds: Dataset) -> int | None:
    dates = (
        _date(ds, keyword)
        for keyword in ("StudyDate", "AcquisitionDate", "AcquisitionDateTime", "SeriesDate", "ContentDate")
    )
    return next((day.year for day in dates if day is not None), None)


_DATE = re.compile(r"(\d{4})[.\-/]?(\d{2})[.\-/]?(\d{2})")


def _date(ds: Dataset, keyword: str) -> date | None:
    """Parse a DA or DT value, in the dotted form of ACR-NEMA too; None where it is invalid or outside 1850 to 2200."""
    text = _text(ds, keyword) or ""
    # Some writers put a time behind the date of any element.
    match = _DATE.fullmatch(text[:8] if keyword.endswith("DateTime") or text[:12].isdigit() else text)
    try:
        day = date(int(match[1]), int(match[2]), int(match[3])) if match else None
    except ValueError:
        return None
    return day if day is not None and 1850 <= day.year <= 2200 else None


_SCREEN_TYPES = _terms(
    "SCREEN SAVE|SCREENSAVE|SCREEN_SAVE|DOSE|DOSE_INFO|DOSEINFO|DOSE REPORT|PATIENT_INFO|REF_SURVIEW|RESULTS|REPORT|"
    "PROTOCOL|SUMMARY|CT_SOM5 PROT|CSA REPORT"
)
_SCREEN_SERIES = re.compile(r"dose (report|info|record)|patient protocol|exam (summary|protocol)|screen ?sav|^report")


def _kind(ds: Dataset, stored: Stored, sop_class: str, modality: str) -> Kind:
    """Classify the picture; training and index take `image` alone."""
    if sop_class in WHOLE_SLIDE or modality == "SM":
        return "whole_slide"
    found = value(ds, "ImageType")
    parts = found if isinstance(found, Sequence) and not isinstance(found, str) else [found]
    types = {str(part).strip().upper() for part in parts}
    if "LOCALIZER" in types or "SCOUT" in types:
        return "localizer"
    series = (_text(ds, "SeriesDescription") or "").lower()
    # A color capture from a scanner is a report, a plan or a rendering, not a slice.
    rendered = sop_class == SECONDARY_CAPTURE and stored.samples == 3 and modality in ("CT", "MR", "PT", "NM")
    if types & _SCREEN_TYPES or _SCREEN_SERIES.search(series) or rendered:
        return "screen"
    return "image"
