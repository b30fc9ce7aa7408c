"""Bytes of a DICOM object → its tags and its frames as 256×256 gray pictures; pydicom and numpy, no Spark.

`read_instance` is the whole way, the same for the archive and for a query. Nothing that it raises or returns
carries a tag value outside the fields of `Tags`. Runs per task, inside the process of decoder.py.
"""

import hashlib
import json
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from io import BytesIO
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.filereader import read_dataset

from cbmir_spark import burned_in, pixels
from cbmir_spark.errors import ConfigError
from cbmir_spark.pixels import SIDE, Array, Floats, Stored, functional_group, items, number, value
from cbmir_spark.preflight import PIXEL_DATA_TAGS, SOP_CLASS, Layout, NotAnImage, Reason, Rejected, examine
from cbmir_spark.vocabulary import BODY_PARTS, MODALITIES, UNKNOWN, Vocabulary

__all__ = [
    "SIDE",
    "Frame",
    "Instance",
    "NotAnImage",
    "Preprocessing",
    "Reason",
    "Rejected",
    "Tags",
    "decode_frames",
    "picture",
    "read_instance",
]

# Bump with any change of the code that changes a pixel: index, training and queries must agree on it.
PIXELS_REVISION = 1

# pydicom's log quotes the values it complains about; nobody's handler may see them.
logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)

Kind = Literal["image", "localizer", "screen", "whole_slide"]

_STORAGE = "1.2.840.10008.5.1.4.1.1."
_DICOMDIR = "1.2.840.10008.1.3.10"
# First components below the storage root (PS3.4 table B.5-1): waveforms, presentation states, raw data and
# registrations and segmentations, value maps, surfaces, eye measurements, reports, assessments, annotations,
# documents, displays, protocols, radiotherapy.
_NOT_IMAGES = frozenset(
    {"9", "11", "66", "67", "68", "78", "79", "80", "88", "90", "91", "104", "131", "200", "201", "481"}
)
_SPECTROSCOPY = _STORAGE + "4.2"
# Hanging protocols, palettes, implants (PS3.4 annexes U, X, BB).
_NOT_STORAGE = ("1.2.840.10008.5.1.4.38.", "1.2.840.10008.5.1.4.39.", "1.2.840.10008.5.1.4.43.")
_ENHANCED = frozenset(_STORAGE + end for end in ("2.1", "2.2", "4.1", "4.3", "4.4", "128.1", "130"))
_WHOLE_SLIDE = frozenset(_STORAGE + end for end in ("77.1.6", "77.1.8", "77.1.9"))
_SECONDARY_CAPTURE = _STORAGE + "7"
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
class Preprocessing:
    """Everything that decides what the network sees of a frame; `version` names it, and travels with models.

    `windows` gives [low, high] by modality and body part, "*" for the rest of a modality: CT in Hounsfield units,
    PT in SUV by body weight. Everything else takes `percentiles` of what is not padding. `frames` is the policy
    of multi-frame objects: `auto` is all of enhanced CT, MR and PT and the middle one of everything else; all
    means at most `max_frames`, evenly spaced. A number is that many of any object, evenly spaced.
    """

    aspect: Literal["keep", "stretch"]
    windows: Mapping[str, Mapping[str, tuple[float, float]]]
    percentiles: tuple[float, float]
    max_frames: int
    frames: Literal["auto", "all", "middle"] | int = "auto"

    def __post_init__(self) -> None:
        """Raises ConfigError for a window that no image could ever take: a slip there would pass unseen."""
        for modality, parts in self.windows.items():
            if modality not in MODALITIES:
                raise ConfigError(f"pixels.windows: {modality!r} is no modality of the vocabulary")
            if unknown := [part for part in parts if part != "*" and part not in BODY_PARTS]:
                raise ConfigError(f"pixels.windows.{modality}: {unknown[0]!r} is no body part of the vocabulary")

    @cached_property
    def version(self) -> str:
        """A short name that changes with every value, or line of code, that changes a pixel."""
        text = json.dumps(
            [
                {
                    m: {p: [float(x) for x in window] for p, window in parts.items()}
                    for m, parts in self.windows.items()
                },
                [float(x) for x in self.percentiles],
                self.max_frames,
                self.frames,
            ],
            sort_keys=True,
        )
        digest = hashlib.sha256(f"{PIXELS_REVISION} {self.aspect} {text}".encode()).hexdigest()
        return f"px{PIXELS_REVISION}-{self.aspect}-{digest[:8]}"

    def window(self, modality: str, body_part: str) -> tuple[float, float] | None:
        """The fixed window of a modality and body part, None where percentiles decide."""
        parts = self.windows.get(modality, {})
        return parts.get(body_part) or parts.get("*")

    def chosen(self, frames: int, enhanced: bool) -> list[int]:
        """Numbers (from 0) of the frames to read of an object that has `frames` of them."""
        if self.frames == "middle" or (self.frames == "auto" and not enhanced):
            return [frames // 2]
        wanted = min(frames, self.frames if isinstance(self.frames, int) else self.max_frames)
        return [(2 * i + 1) * frames // (2 * wanted) for i in range(wanted)]


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


@dataclass(frozen=True)
class Frame:
    """One frame as the network sees it, and the window used, in output units of the Modality LUT."""

    number: int
    pixels: NDArray[np.uint8]
    low: float
    high: float


@dataclass(frozen=True)
class Instance:
    """One SOP instance: its tags and those of its frames that the policy chose."""

    tags: Tags
    frames: tuple[Frame, ...]


def read_instance(content: bytes | bytearray, preprocessing: Preprocessing, vocabulary: Vocabulary) -> Instance:
    """Tags and frames of one object.

    Raises NotAnImage or Rejected with their reason. Whatever else it raises is an error of ours, but for
    MemoryError; decoder.py turns both into a rejection of this one file.
    """
    with _quiet():
        ds, layout, sop_class = _open(content)
        _check_class(sop_class)
        stored = _stored(ds, layout, sop_class)
        tags = _tags(ds, stored, sop_class, vocabulary)
        wanted = preprocessing.chosen(stored.frames, sop_class in _ENHANCED)
        return Instance(tags, tuple(_frames(ds, layout, stored, tags, preprocessing, wanted)))


def decode_frames(content: bytes | bytearray) -> Iterator[Array]:
    """Gray stored values (rows, columns) of every frame of anything with pixel data, whatever its class or UID."""
    with _quiet():
        ds, layout, sop_class = _open(content)
        stored = _stored(ds, layout, sop_class)
        decoded = pixels.decode(ds, layout, stored, range(stored.frames))
    while True:
        with _quiet():
            try:
                _, array, photometric = next(decoded)
            except StopIteration:
                return
            gray = pixels.luminance(array, photometric, ds, layout.little_endian)
        yield gray


def picture(content: bytes | bytearray, frame: int) -> NDArray[np.uint8]:
    """(256, 256) uint8 of one frame with the header's own contrast, aspect kept: for people, never for the network.

    Ultrasound is cropped to its regions here too: text burned in around them names patients.
    Raises NotAnImage or Rejected; IndexError where the object has no such frame.
    """
    with _quiet():
        ds, layout, sop_class = _open(content)
        _check_class(sop_class)
        stored = _stored(ds, layout, sop_class)
        if not 0 <= frame < stored.frames:
            raise IndexError(f"frame {frame} of {stored.frames}")
        _, array, photometric = next(pixels.decode(ds, layout, stored, [frame]))
        gray = pixels.luminance(array, photometric, ds, layout.little_endian)
        mask = None
        if photometric in _GRAY:
            mask = pixels.padding_mask(gray, stored, ds)
            values = pixels.modality_values(gray, ds, frame, layout.little_endian)
            unit = pixels.voi(values, mask, ds, frame, layout.little_endian)
        else:
            unit = pixels.to_unit(gray.astype(np.float32), 0.0, _full_scale(gray))
        box = pixels.crop_box(ds, stored.rows, stored.columns)
        return _finish(unit, mask, ds, stored, frame, "keep", box)


_GRAY = ("MONOCHROME1", "MONOCHROME2")


def _full_scale(gray: Array) -> float:
    """The largest value that luma of this depth can have: 8, 16 or 32 bits, whichever holds what is there."""
    top = float(gray.max())
    return next((full for full in (255.0, 65535.0, 4294967295.0) if top <= full), top)


@contextmanager
def _quiet() -> Iterator[None]:
    """pydicom warns about most real headers, quoting them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _open(content: bytes | bytearray) -> tuple[Dataset, Layout, str]:
    """The header as pydicom reads it (everything before the pixel data), its layout and its SOP class."""
    layout = examine(content)
    end = min((layout.elements[t].header for t in PIXEL_DATA_TAGS if t in layout.elements), default=len(layout.data))
    header = BytesIO(layout.data[layout.start : end])
    try:
        ds = read_dataset(header, layout.implicit, layout.little_endian)
    except RecursionError:
        raise Rejected(Reason.TOO_LARGE) from None
    except Exception:
        raise Rejected(Reason.MALFORMED) from None
    return ds, layout, layout.text(SOP_CLASS) or layout.media_class


def _check_class(sop_class: str) -> None:
    if sop_class == _DICOMDIR:
        raise NotAnImage(Reason.DICOMDIR)
    family = sop_class.removeprefix(_STORAGE).split(".")[0] if sop_class.startswith(_STORAGE) else ""
    if family in _NOT_IMAGES or sop_class == _SPECTROSCOPY or sop_class.startswith(_NOT_STORAGE):
        raise NotAnImage(Reason.NOT_IMAGE_CLASS)


def _stored(ds: Dataset, layout: Layout, sop_class: str) -> Stored:
    """How the pixels lie in the file. Without any, an object of an image storage class is one that lost them.

    Every class below the storage root that `_check_class` lets pass has pixels by definition (PS3.4 table B.5-1):
    a header alone, or a file cut between two elements before the pixel data, is rejected. An object of a private
    class, or of none, never was an image.
    """
    if not any(layout.elements[tag].length for tag in PIXEL_DATA_TAGS if tag in layout.elements):
        raise Rejected(Reason.NO_PIXELS) if sop_class.startswith(_STORAGE) else NotAnImage(Reason.NO_PIXELS)
    return pixels.describe(ds, layout)


def _frames(
    ds: Dataset, layout: Layout, stored: Stored, tags: Tags, preprocessing: Preprocessing, wanted: list[int]
) -> Iterator[Frame]:
    factor = pixels.suv_factor(ds) if tags.modality == "PT" else None
    box = pixels.crop_box(ds, stored.rows, stored.columns)
    for frame, array, photometric in pixels.decode(ds, layout, stored, wanted):
        gray = pixels.luminance(array, photometric, ds, layout.little_endian)
        mask = None
        values: Floats
        if photometric in _GRAY:
            mask = pixels.padding_mask(gray, stored, ds)
            values = pixels.modality_values(gray, ds, frame, layout.little_endian)
            window = _fixed_window(ds, frame, tags, preprocessing, factor)
        else:
            values, window = gray.astype(np.float32, copy=False), None
        inside = _inside(box)
        if window is None:
            window = pixels.percentile_window(
                values[inside], None if mask is None else mask[inside], *preprocessing.percentiles
            )
        unit = pixels.to_unit(values, *window)
        yield Frame(frame, _finish(unit, mask, ds, stored, frame, preprocessing.aspect, box), *window)


def _fixed_window(
    ds: Dataset, frame: int, tags: Tags, preprocessing: Preprocessing, factor: float | None
) -> tuple[float, float] | None:
    """The configured window in the units of this frame's values; None where those units are not known."""
    window = preprocessing.window(tags.modality, tags.body_part)
    if window is None:
        return None
    if tags.modality == "PT":
        return None if factor is None else (window[0] / factor, window[1] / factor)
    if tags.modality == "CT":
        transform = pixels.rescale(ds, frame)
        return window if transform is not None and transform[2] in ("", "HU", "HU_MOD") else None
    return window


def _inside(box: tuple[int, int, int, int] | None) -> tuple[slice, slice]:
    return (slice(None), slice(None)) if box is None else (slice(box[0], box[2]), slice(box[1], box[3]))


def _finish(
    unit: Floats,
    mask: NDArray[np.bool_] | None,
    ds: Dataset,
    stored: Stored,
    frame: int,
    aspect: str,
    box: tuple[int, int, int, int] | None = None,
) -> NDArray[np.uint8]:
    """0 to 1 (rows, columns) → (256, 256) uint8: inversion, padding to background, crop, resize, quantise."""
    if stored.photometric == "MONOCHROME1":
        unit = np.float32(1.0) - unit
    if mask is not None:
        unit = np.where(mask, np.float32(0.0), unit)
    return pixels.quantise(pixels.resize(unit[_inside(box)], pixels.pixel_ratio(ds, frame), aspect))


def _tags(ds: Dataset, stored: Stored, sop_class: str, vocabulary: Vocabulary) -> Tags:
    uid = _uid(ds, "SOPInstanceUID")
    if uid is None:
        raise Rejected(Reason.NO_UID)
    raw_modality = _text(ds, "Modality")
    raw_body_part = _text(ds, "BodyPartExamined")
    if raw_body_part is None:
        region = vocabulary.region(_region_codes(ds))
        raw_body_part = None if region == UNKNOWN else region
    body_part = vocabulary.body_part(raw_body_part)
    spacing = pixels.pixel_spacing(ds, 0)
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
    box = pixels.crop_box(ds, stored.rows, stored.columns)
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
