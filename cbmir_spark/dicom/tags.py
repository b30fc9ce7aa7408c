"""Data set → the allow-listed tags, normalised."""

import re
from dataclasses import dataclass
from datetime import date
from typing import Any, Literal

from pydicom.dataset import Dataset

from cbmir_spark.dicom import burned_in
from cbmir_spark.dicom import gray as dicom_gray
from cbmir_spark.dicom.codecs import Stored
from cbmir_spark.dicom.elements import functional_group, items, number, value
from cbmir_spark.dicom.preflight import Reason, Rejected
from cbmir_spark.dicom.sop_classes import STORAGE
from cbmir_spark.dicom.vocabulary import Vocabulary
from cbmir_spark.dicom.vocabulary_tables import UNKNOWN

Kind = Literal["image", "localizer", "screen", "whole_slide"]
_WHOLE_SLIDE = frozenset(STORAGE + end for end in ("77.1.6", "77.1.8", "77.1.9"))
_SECONDARY_CAPTURE = STORAGE + "7"
# Overlays (PS3.5 section 7.6): those in unused bits of the pixels are described in these groups too.
_OVERLAYS = frozenset(range(0x6000, 0x6100, 2))

_UID = re.compile(r"[0-9]+(\.[0-9]+)*")
_CODE_STRING = re.compile(r"[A-Z0-9 _]{1,16}")
_AGE = re.compile(r"(\d{1,3})\s*([DWMY])")
_DATE = re.compile(r"(\d{4})[.\-]?(\d{2})[.\-]?(\d{2})")
_DAYS_PER_YEAR = 365.25
_PER_YEAR = {"D": _DAYS_PER_YEAR, "W": _DAYS_PER_YEAR / 7, "M": 12.0, "Y": 1.0}
# An age above 89 identifies by itself (45 CFR 164.514(b)(2)(i)(C)).
_OLDEST = 90.0


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split("|"))


_SCREEN_TYPES = _names(
    "SCREEN SAVE|SCREENSAVE|SCREEN_SAVE|DOSE|DOSE_INFO|DOSEINFO|DOSE REPORT|PATIENT_INFO|REF_SURVIEW|RESULTS|REPORT|"
    "PROTOCOL|SUMMARY|CT_SOM5 PROT|CSA REPORT"
)
_SCREEN_SERIES = re.compile(r"dose (report|info|record)|patient protocol|exam (summary|protocol)|screen ?sav|^report")
# PS3.3 section C.8.11.5 and CID 4014, 4010: what View Position may say; anything else is dropped.
_VIEWS = _names("AP|PA|LL|RL|RLD|LLD|RLO|LLO|LAT|OBL|CC|MLO|ML|LM|LMO|SIO|XCC|XCCL|XCCM|FB|ISO|AT|CV|SPECIMEN")


@dataclass(frozen=True)
class Tags:
    """The allow-list: all that is ever kept of a header. The four identifiers are for the vault and for pseudonyms."""

    sop_instance_uid: str
    series_instance_uid: str | None
    study_instance_uid: str | None
    patient_id_raw: str | None
    modality: str
    body_part: str
    modality_raw: str | None
    # BodyPartExamined, or a term: of the coded region where that is empty, of itself where it is no code.
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
    sop_class: str  # UNKNOWN where the object names none that can be
    burned_in: str
    text_risk: bool  # burned-in text has to be expected: burned_in.py


def read_tags(ds: Dataset, stored: Stored, sop_class: str, vocabulary: Vocabulary) -> Tags:
    uid = _uid(ds, "SOPInstanceUID")
    if uid is None:
        raise Rejected(Reason.NO_UID)
    raw_modality = _text(ds, "Modality")
    raw_body_part = _text(ds, "BodyPartExamined")
    if raw_body_part is None:
        region = vocabulary.region(_region_codes(ds))
        raw_body_part = None if region == UNKNOWN else region
    body_part = vocabulary.body_part(raw_body_part)
    spacing = dicom_gray.pixel_spacing(ds, 0)
    measures = functional_group(ds, 0, "PixelMeasuresSequence")
    thickness = number(measures, "SliceThickness") if measures is not None else number(ds, "SliceThickness")
    said = _one_of(_text(ds, "BurnedInAnnotation"), ("YES", "NO")) or "UNKNOWN"
    modality = vocabulary.modality(raw_modality)
    kind = _kind(ds, stored, sop_class, modality)
    return Tags(
        sop_instance_uid=uid,
        series_instance_uid=_uid(ds, "SeriesInstanceUID"),
        study_instance_uid=_uid(ds, "StudyInstanceUID"),
        patient_id_raw=_text(ds, "PatientID"),
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
        burned_in=said,
        text_risk=burned_in.expected(
            burned_in=said,
            kind=kind,
            modality=modality,
            sop_class=sop_class,
            cropped=_is_cropped(ds, stored),
            converted=_text(ds, "ConversionType") is not None,
            overlays=any(tag.group in _OVERLAYS for tag in list(ds.keys())),
        ),
    )


def _is_cropped(ds: Dataset, stored: Stored) -> bool:
    """Whether something was left out around the regions of ultrasound; a region as large as the picture keeps all."""
    box = dicom_gray.crop_box(ds, stored.rows, stored.columns)
    return box is not None and box != (0, 0, stored.rows, stored.columns)


def _text(ds: Dataset, keyword: str) -> str | None:
    """The first value of a text element, trimmed; None where there is none."""
    found = value(ds, keyword)
    if found is not None and not isinstance(found, str) and hasattr(found, "__getitem__"):
        found = found[0] if len(found) else None
    text = str(found).strip(" \0") if found is not None else ""
    return text or None


def _one_of(text: str | None, known: Any) -> str | None:
    upper = (text or "").upper()
    return upper if upper in known else None


def _code_string(text: str | None) -> str | None:
    upper = (text or "").upper()
    return upper if _CODE_STRING.fullmatch(upper) else None


def _is_uid(text: str | None) -> bool:
    """PS3.5 section 9.1: digits and single dots, none at either end, 64 at most."""
    return text is not None and len(text) <= 64 and _UID.fullmatch(text) is not None


def _uid(ds: Dataset, keyword: str) -> str | None:
    text = _text(ds, keyword)
    return text if _is_uid(text) else None


def _region_codes(ds: Dataset) -> list[str]:
    """Code values of the Anatomic Region Sequence, of the object or of its first frame's anatomy macro."""
    anatomy = functional_group(ds, 0, "FrameAnatomySequence")
    holders = [ds] + ([anatomy] if anatomy is not None else [])
    regions = [item for holder in holders for item in items(holder, "AnatomicRegionSequence")]
    return [code for item in regions if (code := _text(item, "CodeValue") or _text(item, "LongCodeValue"))]


def _laterality(ds: Dataset) -> str | None:
    anatomy = functional_group(ds, 0, "FrameAnatomySequence")
    found = _text(ds, "ImageLaterality") or _text(ds, "Laterality")
    if found is None and anatomy is not None:
        found = _text(anatomy, "FrameLaterality")
    return _one_of(found, ("L", "R", "B", "U"))


def _age_years(ds: Dataset) -> float | None:
    """Patient's Age (0010,1010) in years, else the years from birth to study; above 89 it is 90."""
    match = _AGE.fullmatch((_text(ds, "PatientAge") or "").upper())
    if match:
        years = int(match[1]) / _PER_YEAR[match[2]]
    else:
        birth, study = _date(ds, "PatientBirthDate"), _date(ds, "StudyDate") or _date(ds, "AcquisitionDate")
        if birth is None or study is None or birth > study:
            return None
        years = (study - birth).days / _DAYS_PER_YEAR
        # By the calendar: on a 90th birthday the days alone may make less than 90 years.
        if study.year - birth.year - ((study.month, study.day) < (birth.month, birth.day)) >= _OLDEST:
            years = _OLDEST
    return _OLDEST if years >= _OLDEST else years


def _year(ds: Dataset) -> int | None:
    dates = (_date(ds, keyword) for keyword in ("StudyDate", "AcquisitionDate", "SeriesDate", "ContentDate"))
    return next((day.year for day in dates if day is not None), None)


def _date(ds: Dataset, keyword: str) -> date | None:
    """A DA value, the dotted form of ACR-NEMA too; None for what is no day since X-rays were found."""
    match = _DATE.fullmatch(_text(ds, keyword) or "")
    try:
        day = date(int(match[1]), int(match[2]), int(match[3])) if match else None
    except ValueError:
        return None
    return day if day is not None and 1850 <= day.year <= 2200 else None


def _kind(ds: Dataset, stored: Stored, sop_class: str, modality: str) -> Kind:
    """What sort of picture it is: training and index take `image` only."""
    if sop_class in _WHOLE_SLIDE or modality == "SM":
        return "whole_slide"
    found = value(ds, "ImageType")
    types = {str(part).strip().upper() for part in ([found] if isinstance(found, str) else found or ())}
    if "LOCALIZER" in types or "SCOUT" in types:
        return "localizer"
    series = (_text(ds, "SeriesDescription") or "").lower()
    # A color capture from a scanner is a report, a plan or a rendering, not a slice.
    rendered = sop_class == _SECONDARY_CAPTURE and stored.samples == 3 and modality in ("CT", "MR", "PT", "NM")
    if types & _SCREEN_TYPES or _SCREEN_SERIES.search(series) or rendered:
        return "screen"
    return "image"
