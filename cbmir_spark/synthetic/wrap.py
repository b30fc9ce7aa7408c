"""Wrap labelled pictures as DICOM Secondary Capture; runs on the driver and writes local files."""

import csv
import hashlib
import io
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, UnidentifiedImageError
from pydicom import uid
from pydicom.dataset import Dataset

from cbmir_spark.dicom.vocabulary import Vocabulary
from cbmir_spark.dicom.vocabulary_tables import UNKNOWN
from cbmir_spark.errors import InputError
from cbmir_spark.synthetic.encode import as_bytes, set_gray_pixels
from cbmir_spark.synthetic.names import uid_of

__all__ = ["LABEL_COLUMNS", "Wrapped", "wrap_pictures"]

LABEL_COLUMNS = ("file", "modality", "body_part", "group", "source_id", "dataset", "licence")

# The longest values of CS, LO and ST (PS3.5 section 6.2), in characters.
_LONGEST_CODE, _LONGEST_PATIENT_ID, _LONGEST_DERIVATION = 16, 64, 1024


@dataclass(frozen=True)
class Wrapped:
    """The outcome of `wrap_pictures`."""

    folder: Path
    files: int
    written: int  # files that are new or changed
    classes: Mapping[str, int]  # images by modality/body part


def wrap_pictures(labels_csv: str | Path, images_folder: str | Path, out_folder: str | Path) -> Wrapped:
    """Wrap the pictures of a labels.csv as Secondary Capture (PS3.3 section A.8.1): real pixels, tags from labels.

    The CSV has the columns LABEL_COLUMNS; `file` is a path below `images_folder`. UIDs derive from a picture's name and
    content: they are the same each time, and differ between two sets that use the same names. PatientID is `group`, or
    a digest of the picture where that is empty; a patient has one study, and one series for each label. Tags that the
    label does not give stay empty: sex, age, dates, acquisition. Files with the same content are not written again.

    Raises InputError, which names the row, before it writes anything, for a column, a file or a value that is wrong;
    and while it writes, for a file that is not a picture.
    """
    pictures = _read_labels(Path(labels_csv), Path(images_folder))
    out = Path(out_folder)
    written = 0
    for picture in pictures:
        content = as_bytes(_secondary_capture(picture), uid.ExplicitVRLittleEndian)
        written += _write_if_new(out / picture.target, content)
    classes = Counter(f"{p.modality}/{p.body_part}" for p in pictures)
    return Wrapped(out, len(pictures), written, dict(sorted(classes.items())))


@dataclass(frozen=True)
class _Picture:
    source: Path
    file: str
    target: str
    modality: str
    body_part: str
    group: str
    derivation: str


def _read_labels(labels_csv: Path, images: Path) -> list[_Picture]:
    try:
        with labels_csv.open(newline="", encoding="utf-8-sig") as handle:
            reader = csv.DictReader(handle)
            missing = [column for column in LABEL_COLUMNS if column not in (reader.fieldnames or ())]
            if missing:
                raise InputError(f"{labels_csv} has no column {', '.join(missing)}: add it")
            pictures = [_picture(row, images, f"{labels_csv}, line {reader.line_num}") for row in reader]
    except OSError as error:
        raise InputError(f"cannot read {labels_csv}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise InputError(f"{labels_csv} is not UTF-8 text: save it as UTF-8") from None
    except csv.Error as error:
        raise InputError(f"{labels_csv} cannot be read as CSV: {error}") from None
    twice = [target for target, count in Counter(p.target for p in pictures).items() if count > 1]
    if twice:
        raise InputError(f"{labels_csv} lists {twice[0].removesuffix('.dcm')} more than once: remove the other rows")
    return pictures


def _picture(row: Mapping[str, str | None], images: Path, place: str) -> _Picture:
    value = {column: (row[column] or "").strip() for column in LABEL_COLUMNS}
    file = PurePosixPath(value["file"])
    if not value["file"] or file.is_absolute() or ".." in file.parts:
        raise InputError(f"{place}: file must be a path below the images folder")
    source = images / file
    if not source.is_file():
        raise InputError(f"{place}: {source} does not exist")
    vocabulary = Vocabulary()
    modality = vocabulary.modality(value["modality"])
    if modality == UNKNOWN:
        raise InputError(f"{place}: unknown modality {value['modality']!r}: `cbmir vocabulary` lists the known ones")
    body_part = value["body_part"].upper()
    if not 0 < len(body_part) <= _LONGEST_CODE or vocabulary.body_part(body_part) == UNKNOWN:
        raise InputError(f"{place}: unknown body part {value['body_part']!r}: `cbmir vocabulary` lists the known ones")
    if len(value["group"]) > _LONGEST_PATIENT_ID or "\\" in value["group"]:
        raise InputError(
            f"{place}: group becomes the PatientID: use at most {_LONGEST_PATIENT_ID} characters and no backslash"
        )
    origin = (f"{name} {value[name]}" for name in ("dataset", "source_id", "licence") if value[name])
    derivation = f"Secondary capture of a published picture; tags derived from its label; {'; '.join(origin)}; {file}"
    return _Picture(
        source=source,
        file=str(file),
        target=f"{file}.dcm",
        modality=modality,
        body_part=body_part,
        group=value["group"],
        derivation=derivation[:_LONGEST_DERIVATION],
    )


def _secondary_capture(picture: _Picture) -> Dataset:
    """Fill the Secondary Capture IOD (PS3.3 section A.8.1); type 2 attributes without a value stay empty."""
    content = picture.source.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    patient = picture.group or digest[:32]
    ds = Dataset()
    ds.SpecificCharacterSet = "ISO_IR 192"
    ds.SOPClassUID = uid.SecondaryCaptureImageStorage
    ds.SOPInstanceUID = uid_of("picture", picture.file, digest)
    ds.StudyInstanceUID = uid_of("study", patient)
    ds.SeriesInstanceUID = uid_of("series", patient, picture.modality, picture.body_part)
    ds.PatientID = patient
    ds.PatientName = ds.PatientSex = ds.PatientBirthDate = ""
    ds.StudyDate = ds.StudyTime = ds.StudyID = ds.AccessionNumber = ds.ReferringPhysicianName = ""
    ds.SeriesNumber = ds.InstanceNumber = ds.PatientOrientation = None
    ds.Modality = picture.modality
    ds.BodyPartExamined = picture.body_part
    ds.ConversionType = "WSD"
    ds.ImageType = ["DERIVED", "SECONDARY"]
    ds.DerivationDescription = picture.derivation
    ds.BurnedInAnnotation = "NO"
    try:
        with Image.open(io.BytesIO(content)) as image:
            lossy = image.format == "JPEG"
            deep = image.mode.startswith("I;16")
            values = np.asarray(image if deep else image.convert("L"))
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError):
        raise InputError(f"{picture.source} is not a picture that Pillow reads: convert it to PNG or JPEG") from None
    if lossy:
        ds.LossyImageCompression = "01"
        ds.LossyImageCompressionMethod = "ISO_10918_1"
    set_gray_pixels(ds, values.astype("<u2" if deep else "u1"), stored=16 if deep else 8)
    return ds


def _write_if_new(path: Path, content: bytes) -> bool:
    try:
        if path.stat().st_size == len(content) and path.read_bytes() == content:
            return False
    except FileNotFoundError:
        pass
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.tmp")
    unfinished.write_bytes(content)
    os.replace(unfinished, path)
    return True
