"""Phantoms as the instances that several made-up scanners store: headers, pixel formats and transfer syntaxes.

Names, descriptions and comments begin with SYNTHETIC. Everything follows from the subject and the scanner's number.
"""

import numpy as np
from pydicom import uid
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as DicomSequence

from cbmir_spark.synthetic.canvas import Canvas, Plane, Subject
from cbmir_spark.synthetic.encode import set_gray_pixels, set_pixels
from cbmir_spark.synthetic.names import uid_of
from cbmir_spark.synthetic.phantoms import chest_radiograph

__all__ = ["NATIVE", "dose_screen", "localizer", "phantom"]

_MANUFACTURER = "cbmir_spark phantom"

NATIVE = (
    uid.ExplicitVRLittleEndian,
    uid.ImplicitVRLittleEndian,
    uid.DeflatedExplicitVRLittleEndian,
    uid.ExplicitVRBigEndian,
)


def phantom(
    subject: Subject, series: int, place: int, level: float, image: int, scanner: int
) -> tuple[Dataset, uid.UID]:
    """Draw an image and give it the header and pixel format of a scanner, whose transfer syntax comes with it.

    `place` is the image's position within the series, `level` (-1 to 1) in the body; `image` seeds its noise.
    """
    kind = subject.kind
    canvas = Canvas(kind.shape, subject, level, image)
    ds = _patient_tags(subject, series, place, scanner)
    ds.SOPInstanceUID = uid_of(subject.seed, subject.patient_id, series, place)
    spelling = _spelling(subject, series)
    if spelling is not None:
        ds.BodyPartExamined = spelling
    plane = kind.draw(canvas)
    syntaxes: tuple[uid.UID, ...]
    if kind.modality == "CT":
        _ct_pixels(ds, plane, scanner)
        syntaxes = (*NATIVE, uid.JPEG2000Lossless, uid.JPEGLSLossless, uid.JPEGLosslessSV1, uid.RLELossless)
    elif kind.modality == "MR":
        _mr_pixels(ds, plane, scanner)
        syntaxes = (*NATIVE, uid.JPEGLosslessSV1, uid.RLELossless, uid.JPEG2000Lossless, uid.JPEGLSLossless)
    elif kind.modality == "US":
        _us_pixels(ds, plane, scanner)
        syntaxes = (uid.JPEGBaseline8Bit, uid.ExplicitVRLittleEndian, uid.RLELossless, uid.JPEG2000Lossless)
    else:
        _dx_pixels(ds, plane, subject, scanner)
        syntaxes = (*NATIVE, uid.JPEG2000Lossless, uid.JPEGLosslessSV1, uid.RLELossless)
    return ds, syntaxes[scanner % len(syntaxes)]


def _spelling(subject: Subject, series: int) -> str | None:
    """Spell BodyPartExamined as real archives do: mostly as the term, sometimes otherwise or not at all (MR most)."""
    turn = subject.number % 8
    if turn == 6 or (turn == 4 and subject.kind.modality == "MR" and series == 2):
        return None
    if turn in (2, 5):
        return subject.kind.spellings[(turn == 5) % len(subject.kind.spellings)]
    return subject.kind.body_part


def _patient_tags(subject: Subject, series: int, place: int, scanner: int) -> Dataset:
    """Fill the patient, study and series modules (PS3.3 sections C.7.1 to C.7.3), marked as synthetic."""
    kind, rng = subject.kind, subject.rng("tags")
    ds = Dataset()
    ds.SpecificCharacterSet = "ISO_IR 192"
    ds.PatientName = f"SYNTHETIC^{kind.body_part}^{subject.number:03d}"
    ds.PatientID = subject.patient_id
    ds.PatientSex = ("F", "M", "F", "M", "O")[int(rng.integers(0, 5))]
    ds.PatientBirthDate = ""
    ds.PatientAge = _age(subject.number, rng)
    year = int(rng.integers(2012, 2025))
    ds.StudyDate = f"{year}{int(rng.integers(1, 13)):02d}{int(rng.integers(1, 28)):02d}"
    ds.StudyTime = ""
    ds.AccessionNumber = ""
    ds.ReferringPhysicianName = ""
    ds.StudyID = "1"
    ds.StudyInstanceUID = uid_of(subject.seed, subject.patient_id)
    ds.StudyDescription = "SYNTHETIC PHANTOM"
    ds.SeriesInstanceUID = uid_of(subject.seed, subject.patient_id, series)
    ds.FrameOfReferenceUID = uid_of(subject.seed, subject.patient_id, "frame of reference")
    ds.SeriesNumber = str(series)
    ds.SeriesDescription = f"SYNTHETIC {kind.description}"
    ds.InstanceNumber = str(place + 1)
    ds.Modality = kind.modality
    ds.Manufacturer = _MANUFACTURER
    ds.ManufacturerModelName = f"drawing {scanner % 8}"
    ds.ImageComments = "SYNTHETIC: ellipses and textures drawn by a program; no patient, no scanner"
    ds.BurnedInAnnotation = "NO"
    return ds


def _age(number: int, rng: np.random.Generator) -> str:
    """Draw a PatientAge, in all four units of AS (PS3.5 section 6.2): days, weeks, months and years."""
    unit = "DYWYMYYY"[number % 8]
    low, high = {"D": (1, 30), "W": (5, 26), "M": (7, 23), "Y": (2, 90)}[unit]
    return f"{int(rng.integers(low, high)):03d}{unit}"


def _ct_pixels(ds: Dataset, hu: Plane, scanner: int) -> None:
    """Store Hounsfield units (PS3.3 section C.8.2.1): unsigned with an intercept, or signed with padding outside."""
    ds.SOPClassUID = uid.CTImageStorage
    ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    ds.KVP = "120"
    ds.SliceThickness = ("1.25", "2.5", "5")[scanner % 3]
    ds.PixelSpacing = ["1.25", "1.25"]
    ds.RescaleSlope = "1"
    ds.RescaleType = "HU"
    ds.WindowCenter, ds.WindowWidth = ("-500", "1500") if scanner % 4 == 0 else ("40", "400")
    values = np.clip(np.rint(hu), -1024, 3071)
    if scanner % 2:
        ds.RescaleIntercept = "0"
        rows, columns = values.shape
        y, x = np.ogrid[:rows, :columns]
        outside = np.hypot(y - rows / 2 + 0.5, x - columns / 2 + 0.5) > min(rows, columns) / 2
        # US or SS like the pixels (PS3.3 section C.7.5.1.1.2); the value lies below every real one.
        ds.add_new("PixelPaddingValue", "SS", -2000)
        set_gray_pixels(ds, np.where(outside, -2000, values).astype("<i2"), stored=16)
    else:
        ds.RescaleIntercept = "-1024"
        set_gray_pixels(ds, (values + 1024).astype("<u2"), stored=12)


def _mr_pixels(ds: Dataset, signal: Plane, scanner: int) -> None:
    """Store MR in arbitrary units (PS3.3 section C.8.3.1): each scanner has another gain; 12 bits or signed 16."""
    ds.SOPClassUID = uid.MRImageStorage
    ds.ImageType = ["ORIGINAL", "PRIMARY", "M", "NONE"]
    ds.ScanningSequence = "SE"
    ds.SequenceVariant = "NONE"
    ds.ScanOptions = ""
    ds.MRAcquisitionType = "2D"
    ds.EchoTime = "90" if scanner % 2 else "12"
    ds.RepetitionTime = "4000" if scanner % 2 else "500"
    ds.EchoTrainLength = "1"
    ds.SliceThickness = "4"
    ds.PixelSpacing = ["0.9", "0.9"]
    gain = (900, 2600, 4095, 16000)[scanner % 4]
    values = np.clip(np.rint(signal * gain), 0, gain)
    if gain > 4095:
        set_gray_pixels(ds, values.astype("<i2"), stored=16)
    else:
        set_gray_pixels(ds, values.astype("<u2"), stored=12)


def _us_pixels(ds: Dataset, echo: Plane, scanner: int) -> None:
    """Store ultrasound, 8 bits gray or RGB, with its region (PS3.3 section C.8.5.5) beside the console's gray wedge."""
    ds.SOPClassUID = uid.UltrasoundImageStorage
    ds.ImageType = ["ORIGINAL", "PRIMARY", "ABDOMINAL", "0001"]
    rows, columns = echo.shape
    top, left = 24, 40
    screen = np.zeros((rows + top, columns + left))
    screen[top:, left:] = echo
    screen[top + 20 : top + 120, 8:20] = np.linspace(1, 0, 100)[:, None]
    screen[:6, :] = 0.25
    region = Dataset()
    region.RegionSpatialFormat = 1
    region.RegionDataType = 1
    region.RegionFlags = 0
    region.RegionLocationMinX0 = left
    region.RegionLocationMinY0 = top
    region.RegionLocationMaxX1 = left + columns - 1
    region.RegionLocationMaxY1 = top + rows - 1
    region.PhysicalUnitsXDirection = region.PhysicalUnitsYDirection = 3
    region.PhysicalDeltaX = region.PhysicalDeltaY = 0.04
    ds.SequenceOfUltrasoundRegions = DicomSequence([region])
    values = np.rint(screen * 255).astype("u1")
    if scanner % 4 == 1:
        ds.SamplesPerPixel = 3
        ds.PhotometricInterpretation = "RGB"
        ds.PlanarConfiguration = 0
        set_pixels(ds, np.repeat(values[:, :, None], 3, axis=2), stored=8)
    else:
        set_gray_pixels(ds, values, stored=8)


def _dx_pixels(ds: Dataset, thickness: Plane, subject: Subject, scanner: int) -> None:
    """Store projection radiography for presentation (PS3.3 section C.8.11), some of it as film: MONOCHROME1."""
    ds.SOPClassUID = uid.DigitalXRayImageStorageForPresentation
    ds.ImageType = ["ORIGINAL", "PRIMARY"]
    ds.PresentationIntentType = "FOR PRESENTATION"
    ds.PixelIntensityRelationship = "LOG"
    ds.ViewPosition = "PA"
    ds.ImageLaterality = "U" if subject.kind.body_part == "CHEST" else "LR"[subject.number % 2]
    ds.ImagerPixelSpacing = ["0.8", "0.8"]
    ds.RescaleIntercept = "0"
    ds.RescaleSlope = "1"
    ds.RescaleType = "US"
    stored = (12, 14)[scanner % 2]
    top = 2**stored - 1
    values = np.clip(np.rint(thickness / 2.2 * top), 0, top)
    if scanner % 3 == 0:
        ds.PixelIntensityRelationshipSign = -1
        ds.PresentationLUTShape = "IDENTITY"
        set_gray_pixels(ds, values.astype("<u2"), stored)
    else:
        ds.PixelIntensityRelationshipSign = 1
        ds.PresentationLUTShape = "INVERSE"
        set_gray_pixels(ds, (top - values).astype("<u2"), stored, photometric="MONOCHROME1")


# --- pictures that are not content ---


def localizer(subject: Subject) -> Dataset:
    """Draw the localizer of a CT patient."""
    ds = _patient_tags(subject, 8, 0, 0)
    ds.SOPInstanceUID = uid_of(subject.seed, subject.patient_id, "localizer")
    ds.BodyPartExamined = "CHEST"
    _ct_pixels(ds, chest_radiograph(Canvas((256, 256), subject, 0.0, 90)) * 700 - 400, 0)
    ds.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    ds.SeriesDescription = "SYNTHETIC LOCALIZER"
    return ds


def dose_screen(subject: Subject) -> Dataset:
    """Draw the dose report of a CT patient, a captured screen; blocks stand for its text."""
    ds = _patient_tags(subject, 9, 0, 0)
    ds.SOPInstanceUID = uid_of(subject.seed, subject.patient_id, "dose screen")
    ds.SOPClassUID = uid.SecondaryCaptureImageStorage
    ds.ConversionType = "WSD"
    ds.ImageType = ["DERIVED", "SECONDARY", "SCREEN SAVE"]
    ds.SeriesDescription = "SYNTHETIC DOSE REPORT"
    ds.BurnedInAnnotation = "YES"
    bars = np.zeros((200, 320), "u1")
    for line in range(10, 190, 16):
        widths = subject.rng("screen", line).integers(4, 40, 8)
        bars[line : line + 8, 12 : 12 + int(widths.sum())] = 220
        bars[line : line + 8, 12 + np.cumsum(widths)] = 0
    set_gray_pixels(ds, bars, stored=8)
    return ds
