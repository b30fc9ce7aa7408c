"""Labelled pictures as DICOM Secondary Capture."""

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

from cbmir_spark.dicom import vocabulary, vocabulary_tables
from cbmir_spark.errors import InputError
from cbmir_spark.synthetic.archive import CS, LO, ST
from cbmir_spark.synthetic.encode import as_bytes, gray_pixels, uid_of

LABEL_COLUMNS = ("file", "modality", "body_part", "group", "source_id", "dataset", "licence")


@dataclass(frozen=True)
class Wrapped:
    """What `wrap_pictures` did: files in the folder, how many of them are new, and images by modality/body part."""

    folder: Path
    files: int
    written: int
    classes: Mapping[str, int]


def wrap_pictures(labels_csv: str | Path, images_folder: str | Path, out_folder: str | Path) -> Wrapped:
    """The pictures that a labels.csv names, as Secondary Capture files (PS3.3 A.8.1): real pixels, label-derived tags.

    The columns are LABEL_COLUMNS; `file` lies below `images_folder`. UIDs are version 5 UUIDs (PS3.5 B.2) of its name
    and content, so that they are the same each time and two sets with equal names stay apart. PatientID is `group`,
    or a digest of the picture where that is empty; a patient has one study, and one series for each label. Nothing is
    invented: sex, age, dates and acquisition stay empty. A file that is there with the same content is left alone.
    Raises InputError naming the row before anything is written where a column, a picture or a value is wrong.
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
        with labels_csv.open(newline="", encoding="utf-8") as handle:
            reader = csv.DictReader(handle)
            missing = [column for column in LABEL_COLUMNS if column not in (reader.fieldnames or ())]
            if missing:
                raise InputError(f"{labels_csv} lacks the column {', '.join(missing)}")
            pictures = [_picture(row, images, f"{labels_csv}, line {reader.line_num}") for row in reader]
    except OSError as error:
        raise InputError(f"labels {labels_csv}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise InputError(f"labels {labels_csv}: not UTF-8 text") from None
    twice = [target for target, count in Counter(p.target for p in pictures).items() if count > 1]
    if twice:
        raise InputError(f"{labels_csv} names {twice[0].removesuffix('.dcm')} more than once")
    return pictures


def _picture(row: Mapping[str, str | None], images: Path, place: str) -> _Picture:
    value = {column: (row[column] or "").strip() for column in LABEL_COLUMNS}
    file = PurePosixPath(value["file"])
    if not value["file"] or file.is_absolute() or ".." in file.parts:
        raise InputError(f"{place}: file must be a path below the images folder")
    source = images / file
    if not source.is_file():
        raise InputError(f"{place}: there is no picture {source}")
    modality = vocabulary.Vocabulary().modality(value["modality"])
    if modality == vocabulary_tables.UNKNOWN:
        raise InputError(f"{place}: modality {value['modality']!r} is not one that DICOM knows")
    body_part = value["body_part"].upper()
    if not 0 < len(body_part) <= CS or vocabulary.Vocabulary().body_part(body_part) == vocabulary_tables.UNKNOWN:
        raise InputError(f"{place}: body part {value['body_part']!r} is not in the vocabulary")
    if len(value["group"]) > LO or "\\" in value["group"]:
        raise InputError(f"{place}: group must have at most {LO} characters and no backslash, as a PatientID")
    origin = (f"{name} {value[name]}" for name in ("dataset", "source_id", "licence") if value[name])
    derivation = f"Secondary capture of a published picture; tags derived from its label; {'; '.join(origin)}; {file}"
    return _Picture(
        source=source,
        file=str(file),
        target=f"{file}.dcm",
        modality=modality,
        body_part=body_part,
        group=value["group"],
        derivation=derivation[:ST],
    )


def _secondary_capture(picture: _Picture) -> Dataset:
    """The Secondary Capture IOD (PS3.3 A.8.1); type 2 attributes that nobody knows stay empty."""
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
        raise InputError(f"{picture.source} cannot be read as a picture") from None
    if lossy:
        ds.LossyImageCompression = "01"
        ds.LossyImageCompressionMethod = "ISO_10918_1"
    gray_pixels(ds, values.astype("<u2" if deep else "u1"), stored=16 if deep else 8)
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
