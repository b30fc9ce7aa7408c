"""Archives to try the jobs on: phantoms drawn here, and real pictures wrapped as DICOM. pydicom and numpy, no Spark.

Everything runs on the driver and writes local files. A seed gives the same bytes each time: names, UIDs, anatomy and
noise come from hashes and seeded generators, never from the clock.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom.data
from pydicom import uid
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as DicomSequence

from cbmir_spark.errors import InputError
from cbmir_spark.synthetic.encode import as_bytes, gray_pixels, uid_of, write_instance
from cbmir_spark.synthetic.phantoms import CLASSES, Canvas, Plane, Subject, dx_chest

README = "README.txt"

_MANUFACTURER = "cbmir_spark phantom"
# PS3.5 6.2: the longest value of a CS, LO and ST.
CS, LO, ST = 16, 64, 1024


@dataclass(frozen=True)
class Archive:
    """What a folder holds after `write_demo_archive`; `created` is False where it was there before."""

    folder: Path
    created: bool
    files: int
    phantoms: int
    classes: tuple[str, ...]


def write_demo_archive(folder: str | Path, images_per_class: int, seed: int) -> Archive:
    """An archive of phantoms, real test files of pydicom, duplicates, a conflict and broken files below `folder`.

    Phantoms are ellipses and textures, said to be SYNTHETIC in their tags. The folder appears whole or not at all;
    one that is there already with the same figures is left as it is. Raises InputError where the folder holds
    something else.
    """
    target = Path(folder)
    readme = _readme(images_per_class, seed)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        try:
            found = (target / README).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            raise InputError(f"{target} is not a demo archive: choose another folder") from None
        if found != readme:
            raise InputError(f"{target} holds another demo archive: remove it or choose another folder")
        return _archive(target, created=False)

    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        phantoms = list(_write_phantoms(unfinished, images_per_class, seed))
        _write_companions(unfinished, seed)
        _write_troubles(unfinished, phantoms, seed)
        _copy_pydicom_files(unfinished / "pydicom")
        (unfinished / README).write_text(readme, encoding="utf-8")
        unfinished.chmod(0o755)
        if target.exists():
            target.rmdir()
        os.replace(unfinished, target)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return _archive(target, created=True)


# --- phantoms as DICOM ---


def _write_phantoms(folder: Path, images_per_class: int, seed: int) -> Iterator[Path]:
    for position, kind in enumerate(CLASSES):
        patients = max(4, images_per_class // 3)
        for number in range(patients):
            subject = Subject(kind, number, seed)
            # Every patient with its own scanner, and so with its own syntax and pixel format.
            scanner = position + number
            images = range(number, images_per_class, patients)
            for place, image in enumerate(images):
                series = 1 + (place * 2) // max(len(images), 2)
                level = -0.8 + 1.6 * (place + 0.5) / len(images)
                dataset, syntax = _phantom(subject, series, place, level, image, scanner)
                # Archives name their objects as they like; every third scanner leaves the suffix out.
                name = f"IM{place + 1:04d}" + ("" if scanner % 3 == 2 else ".dcm")
                path = folder / "phantoms" / subject.patient_id / f"SE{series:02d}" / name
                _write(path, as_bytes(dataset, syntax))
                yield path


def _phantom(
    subject: Subject, series: int, place: int, level: float, image: int, scanner: int
) -> tuple[Dataset, uid.UID]:
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
        syntaxes = (*_NATIVE, uid.JPEG2000Lossless, uid.JPEGLSLossless, uid.JPEGLosslessSV1, uid.RLELossless)
    elif kind.modality == "MR":
        _mr_pixels(ds, plane, scanner)
        syntaxes = (*_NATIVE, uid.JPEGLosslessSV1, uid.RLELossless, uid.JPEG2000Lossless, uid.JPEGLSLossless)
    elif kind.modality == "US":
        _us_pixels(ds, plane, scanner)
        syntaxes = (uid.JPEGBaseline8Bit, uid.ExplicitVRLittleEndian, uid.RLELossless, uid.JPEG2000Lossless)
    else:
        _dx_pixels(ds, plane, subject, scanner)
        syntaxes = (*_NATIVE, uid.JPEG2000Lossless, uid.JPEGLosslessSV1, uid.RLELossless)
    return ds, syntaxes[scanner % len(syntaxes)]


_NATIVE = (
    uid.ExplicitVRLittleEndian,
    uid.ImplicitVRLittleEndian,
    uid.DeflatedExplicitVRLittleEndian,
    uid.ExplicitVRBigEndian,
)


def _spelling(subject: Subject, series: int) -> str | None:
    """BodyPartExamined as archives have it: mostly plain, some in other words, some missing (of MR the most)."""
    turn = subject.number % 8
    if turn == 6 or (turn == 4 and subject.kind.modality == "MR" and series == 2):
        return None
    if turn in (2, 5):
        return subject.kind.spellings[(turn == 5) % len(subject.kind.spellings)]
    return subject.kind.body_part


def _patient_tags(subject: Subject, series: int, place: int, scanner: int) -> Dataset:
    """The patient, study and series modules (PS3.3 C.7.1 to C.7.3) and what says that nobody was imaged."""
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
    """PatientAge in all four units of AS (PS3.5 6.2): days, weeks, months and years."""
    unit = "DYWYMYYY"[number % 8]
    low, high = {"D": (1, 30), "W": (5, 26), "M": (7, 23), "Y": (2, 90)}[unit]
    return f"{int(rng.integers(low, high)):03d}{unit}"


def _ct_pixels(ds: Dataset, hu: Plane, scanner: int) -> None:
    """CT in Hounsfield units (PS3.3 C.8.2.1): unsigned with an intercept, or signed with padding outside the field."""
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
        # PS3.3 C.7.5.1.1.2: US or SS as the pixels are; the value lies below every real one.
        ds.add_new("PixelPaddingValue", "SS", -2000)
        gray_pixels(ds, np.where(outside, -2000, values).astype("<i2"), stored=16)
    else:
        ds.RescaleIntercept = "-1024"
        gray_pixels(ds, (values + 1024).astype("<u2"), stored=12)


def _mr_pixels(ds: Dataset, signal: Plane, scanner: int) -> None:
    """MR in arbitrary units (PS3.3 C.8.3.1): each scanner with its own gain, 12 bits unsigned or 16 signed."""
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
        gray_pixels(ds, values.astype("<i2"), stored=16)
    else:
        gray_pixels(ds, values.astype("<u2"), stored=12)


def _us_pixels(ds: Dataset, echo: Plane, scanner: int) -> None:
    """Ultrasound, 8 bits gray or RGB, with its region (PS3.3 C.8.5.5) and the console's gray wedge beside it."""
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
        write_instance(ds, np.repeat(values[:, :, None], 3, axis=2), stored=8)
    else:
        gray_pixels(ds, values, stored=8)


def _dx_pixels(ds: Dataset, thickness: Plane, subject: Subject, scanner: int) -> None:
    """Projection radiography for presentation (PS3.3 C.8.11): MONOCHROME1 is film, where much beam is dark."""
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
        gray_pixels(ds, values.astype("<u2"), stored)
    else:
        ds.PixelIntensityRelationshipSign = 1
        ds.PresentationLUTShape = "INVERSE"
        gray_pixels(ds, (top - values).astype("<u2"), stored, photometric="MONOCHROME1")


# --- what an archive also holds ---


def _write_companions(folder: Path, seed: int) -> None:
    """A localizer and a dose screen of the first CT patient: pixels, but not content."""
    subject = Subject(CLASSES[0], 0, seed)
    canvas = Canvas((256, 256), subject, 0.0, 90)
    localizer = _patient_tags(subject, 8, 0, 0)
    localizer.SOPInstanceUID = uid_of(seed, subject.patient_id, "localizer")
    localizer.BodyPartExamined = "CHEST"
    _ct_pixels(localizer, dx_chest(canvas) * 700 - 400, 0)
    localizer.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    localizer.SeriesDescription = "SYNTHETIC LOCALIZER"
    _write(folder / "phantoms" / subject.patient_id / "SE08" / "IM0001.dcm", as_bytes(localizer, _NATIVE[0]))

    screen = _patient_tags(subject, 9, 0, 0)
    screen.SOPInstanceUID = uid_of(seed, subject.patient_id, "dose screen")
    screen.SOPClassUID = uid.SecondaryCaptureImageStorage
    screen.ConversionType = "WSD"
    screen.ImageType = ["DERIVED", "SECONDARY", "SCREEN SAVE"]
    screen.SeriesDescription = "SYNTHETIC DOSE REPORT"
    screen.BurnedInAnnotation = "YES"
    bars = np.zeros((200, 320), "u1")
    # Rows of blocks in the place of lines of text: nothing that could be read as somebody's name.
    for line in range(10, 190, 16):
        widths = subject.rng("screen", line).integers(4, 40, 8)
        bars[line : line + 8, 12 : 12 + int(widths.sum())] = 220
        bars[line : line + 8, 12 + np.cumsum(widths)] = 0
    gray_pixels(screen, bars, stored=8)
    _write(folder / "phantoms" / subject.patient_id / "SE09" / "IM0001.dcm", as_bytes(screen, _NATIVE[0]))


def _write_troubles(folder: Path, phantoms: Sequence[Path], seed: int) -> None:
    """What every archive has: the same file twice, one UID with two contents, and files that are broken."""
    for number, source in enumerate(phantoms[:: max(1, len(phantoms) // 3)][:3]):
        _write(folder / "duplicates" / f"copy{number}.dcm", source.read_bytes())

    subject = Subject(CLASSES[1], 0, seed)
    first, syntax = _phantom(subject, 1, 0, -0.5, 900, scanner=1)
    second, _ = _phantom(subject, 1, 0, 0.5, 901, scanner=1)
    for name, ds in (("first", first), ("second", second)):
        ds.SOPInstanceUID = uid_of(seed, "conflict")
        _write(folder / "conflicts" / f"{name}.dcm", as_bytes(ds, syntax))

    broken, whole = folder / "broken", as_bytes(_phantom(subject, 1, 0, 0.0, 902, scanner=1)[0], _NATIVE[0])
    _write(broken / "truncated.dcm", whole[: len(whole) * 3 // 5])
    _write(broken / "empty.dcm", b"")
    _write(broken / "letter.dcm", b"Dear colleague, please find the images attached.\n")
    _write(broken / "zeros.dcm", b"\0" * 4096)
    liar = _phantom(subject, 1, 0, 0.0, 903, scanner=1)[0]
    liar.SOPInstanceUID = uid_of(seed, "lying dimensions")
    liar.Rows = liar.Columns = 60000
    _write(broken / "lying_dimensions.dcm", as_bytes(liar, _NATIVE[0]))
    nameless = _phantom(subject, 1, 0, 0.0, 904, scanner=1)[0]
    content = as_bytes(nameless, _NATIVE[0])
    # The element itself cannot be left out by a writer that keeps the rules, so its value is made invalid.
    _write(
        broken / "invalid_uid.dcm",
        content.replace(nameless.SOPInstanceUID.encode(), b"x" * len(nameless.SOPInstanceUID)),
    )


def _copy_pydicom_files(folder: Path) -> None:
    """pydicom's own test files, real and broken ones, as far as the installed package carries them."""
    source = Path(pydicom.data.__file__).parent / "test_files"
    for path in sorted(source.rglob("*")):
        if path.is_file() and path.suffix not in (".py", ".pyc"):
            _write(folder / path.relative_to(source), path.read_bytes())


def _readme(images_per_class: int, seed: int) -> str:
    return (
        "SYNTHETIC demo archive of cbmir_spark.\n"
        "phantoms/, duplicates/, conflicts/, broken/: drawn by a program; no patient, no scanner.\n"
        "pydicom/: the test files of the pydicom package, unchanged.\n"
        f"images per class: {images_per_class}\nseed: {seed}\n"
    )


def _archive(folder: Path, created: bool) -> Archive:
    files = sum(path.is_file() for path in folder.rglob("*"))
    phantoms = sum(path.is_file() for path in (folder / "phantoms").rglob("*"))
    return Archive(folder, created, files, phantoms, tuple(kind.label for kind in CLASSES))


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
