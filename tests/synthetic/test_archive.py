"""The demo archive: the same each time, readable, honest in its tags, and never half written."""

import hashlib
import resource
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom import uid

from cbmir_spark.config import load
from cbmir_spark.dicom.preprocessing import Preprocessing
from cbmir_spark.dicom.read import NotAnImage, Rejected, read_instance
from cbmir_spark.dicom.vocabulary import Vocabulary
from cbmir_spark.dicom.vocabulary_tables import UNKNOWN
from cbmir_spark.errors import InputError
from cbmir_spark.synthetic import encode, scanners
from cbmir_spark.synthetic.archive import Archive, write_demo_archive
from cbmir_spark.synthetic.canvas import Subject
from cbmir_spark.synthetic.phantoms import CLASSES

IMAGES = 8


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    return write_demo_archive(tmp_path_factory.mktemp("demo") / "archive", IMAGES, seed=1)


@pytest.fixture(scope="module")
def preprocessing() -> Preprocessing:
    pixels = load(environ={}).pixels
    return Preprocessing(pixels.aspect, pixels.windows, pixels.percentiles, pixels.max_frames)


def phantoms(archive: Archive) -> list[Path]:
    found = sorted(path for path in (archive.folder / "phantoms").rglob("*") if path.is_file())
    return [path for path in found if path.parent.name not in ("SE08", "SE09")]


def test_every_phantom_is_read_as_what_it_was_drawn_to_be(archive: Archive, preprocessing: Preprocessing) -> None:
    found: Counter[str] = Counter()
    patients: dict[str, set[str | None]] = {}
    for path in phantoms(archive):
        modality, body_part = path.parts[-3].split("-")[1:3]
        tags = (instance := read_instance(path.read_bytes(), preprocessing, Vocabulary())).tags
        assert (tags.modality, tags.kind, tags.burned_in, tags.text_risk) == (modality, "image", "NO", False), path
        assert tags.body_part in (body_part, UNKNOWN), path
        assert tags.sex is not None and tags.age_years is not None and tags.year is not None, path
        # Structure that survives the fixed window, not a black or a white square.
        assert instance.frames[0].pixels.std() > 20, path
        found[f"{modality}/{body_part}"] += 1
        patients.setdefault(f"{modality}/{body_part}", set()).add(tags.patient_id_raw)
    assert found == dict.fromkeys(archive.classes, IMAGES)
    assert {len(ids) for ids in patients.values()} == {4}


def test_the_archive_has_every_syntax_that_encode_writes(archive: Archive) -> None:
    headers = [pydicom.dcmread(path, stop_before_pixels=True) for path in phantoms(archive)]
    assert {header.file_meta.TransferSyntaxUID for header in headers} == {
        uid.ImplicitVRLittleEndian,
        uid.ExplicitVRLittleEndian,
        uid.ExplicitVRBigEndian,
        uid.DeflatedExplicitVRLittleEndian,
        uid.RLELossless,
        uid.JPEG2000Lossless,
        uid.JPEGLSLossless,
        uid.JPEGLosslessSV1,
        uid.JPEGBaseline8Bit,
    }
    assert {header.PhotometricInterpretation for header in headers} >= {"MONOCHROME1", "MONOCHROME2", "RGB"}
    assert {header.PatientAge[-1] for header in headers} == set("DWY")
    assert {header.PixelRepresentation for header in headers} == {0, 1}
    for header in headers:
        texts = (str(header.PatientName), header.SeriesDescription, header.ImageComments)
        assert all(text.startswith("SYNTHETIC") for text in texts)
        assert ("SequenceOfUltrasoundRegions" in header) == (header.Modality == "US")


def test_patients_studies_and_series_nest(archive: Archive) -> None:
    above: dict[str, tuple[str, ...]] = {}
    uids = Counter()
    for path in phantoms(archive):
        ds = pydicom.dcmread(path, stop_before_pixels=True)
        uids[ds.SOPInstanceUID] += 1
        chain = (ds.SeriesInstanceUID, ds.StudyInstanceUID, ds.PatientID)
        described = (ds.Modality, ds.SeriesNumber, ds.PatientSex, ds.PatientAge, ds.StudyDate)
        assert above.setdefault(ds.SeriesInstanceUID, chain + described) == chain + described
        assert above.setdefault(ds.StudyInstanceUID, chain[1:]) == chain[1:]
    assert set(uids.values()) == {1}
    # Eight images of four patients: each has both a first and a second series.
    assert len({value[0] for value in above.values() if len(value) > 2}) == 2 * 4 * len(archive.classes)


def test_compressed_phantoms_have_the_pixels_that_were_drawn(archive: Archive) -> None:
    """A lossless syntax returns the pixels of the same phantom uncompressed."""
    subject = Subject(CLASSES[0], 0, 1)
    for lossless in (uid.RLELossless, uid.JPEG2000Lossless, uid.JPEGLSLossless, uid.JPEGLosslessSV1):
        for scanner in (0, 1):  # unsigned with an intercept, signed with padding
            plain, packed = (
                pydicom.dcmread(pydicom.filebase.DicomBytesIO(encode.as_bytes(ds, syntax)))
                for syntax in (uid.ImplicitVRLittleEndian, lossless)
                for ds in [scanners.phantom(subject, 1, 0, 0.0, 0, scanner)[0]]
            )
            assert packed.file_meta.TransferSyntaxUID == lossless
            assert len(packed.PixelData) < len(plain.PixelData)
            np.testing.assert_array_equal(packed.pixel_array, plain.pixel_array)


def test_duplicates_conflicts_broken_files_and_other_pictures(archive: Archive, preprocessing: Preprocessing) -> None:
    def outcome(path: Path) -> str:
        try:
            return read_instance(path.read_bytes(), preprocessing, Vocabulary()).tags.kind
        except (NotAnImage, Rejected) as error:
            return type(error).__name__

    folder = archive.folder
    originals = {hashlib.sha256(path.read_bytes()).digest() for path in phantoms(archive)}
    copies = [hashlib.sha256(path.read_bytes()).digest() for path in (folder / "duplicates").iterdir()]
    assert len(copies) == 3 and set(copies) <= originals
    first, second = (pydicom.dcmread(folder / "conflicts" / f"{name}.dcm") for name in ("first", "second"))
    assert first.SOPInstanceUID == second.SOPInstanceUID and first.PixelData != second.PixelData
    assert {path.name: outcome(path) for path in (folder / "broken").iterdir()} == {
        "truncated.dcm": "Rejected",
        "empty.dcm": "Rejected",
        "letter.dcm": "NotAnImage",
        "zeros.dcm": "NotAnImage",
        "lying_dimensions.dcm": "Rejected",
        "invalid_uid.dcm": "Rejected",
    }
    chest = folder / "phantoms" / "SYN-CT-CHEST-000"
    assert outcome(chest / "SE08" / "IM0001.dcm") == "localizer"
    assert outcome(chest / "SE09" / "IM0001.dcm") == "screen"
    bundled = Path(pydicom.data.__file__).parent / "test_files"
    for name in ("CT_small.dcm", "rtplan_truncated.dcm", "DICOMDIR-empty.dcm"):
        copied = next((folder / "pydicom").rglob(name))
        assert copied.read_bytes() == next(bundled.rglob(name)).read_bytes()


# CT chest, CT abdomen and ultrasound of the liver: what is tested with them is the same for all ten.
FEW_CLASSES = (*CLASSES[:2], CLASSES[6])


def test_body_parts_are_written_as_archives_write_them(tmp_path: Path) -> None:
    made = write_demo_archive(tmp_path / "archive", 24, seed=1, classes=FEW_CLASSES)
    spelled: dict[str, set[str | None]] = {}
    for path in phantoms(made):
        label = "/".join(path.parts[-3].split("-")[1:3])
        spelled.setdefault(label, set()).add(pydicom.dcmread(path, stop_before_pixels=True).get("BodyPartExamined"))
    for label, spellings in spelled.items():
        body_part = label.partition("/")[2]
        assert spellings > {None, body_part} and len(spellings) == 4, label
        assert {Vocabulary().body_part(raw) for raw in spellings if raw} == {body_part}, label


def test_a_seed_gives_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    def digests(name: str, seed: int) -> dict[str, str]:
        folder = write_demo_archive(tmp_path / name, 4, seed, FEW_CLASSES).folder
        files = (path for path in folder.rglob("*") if path.is_file() and "pydicom" not in path.parts)
        return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}

    first, again, other = digests("first", 5), digests("again", 5), digests("other", 6)
    assert first == again
    drawn = [name for name in first if name.startswith(("phantoms", "conflicts"))]
    assert drawn and not [name for name in drawn if first[name] == other[name]]


def test_an_archive_that_is_there_is_left_untouched(archive: Archive) -> None:
    before = {path: path.stat().st_mtime_ns for path in archive.folder.rglob("*")}
    again = write_demo_archive(archive.folder, IMAGES, seed=1)
    assert archive.created and not again.created
    assert (again.files, again.phantoms) == (archive.files, archive.phantoms)
    assert {path: path.stat().st_mtime_ns for path in archive.folder.rglob("*")} == before
    with pytest.raises(InputError, match="demo archive of another size or seed"):
        write_demo_archive(archive.folder, IMAGES, seed=2)
    with pytest.raises(InputError, match="demo archive of another size or seed"):
        write_demo_archive(archive.folder, IMAGES, seed=1, classes=FEW_CLASSES)


def test_a_folder_of_other_files_is_refused_and_not_changed(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="not a demo archive"):
        write_demo_archive(tmp_path, 4, seed=1)
    with pytest.raises(InputError, match="not a demo archive"):
        write_demo_archive(tmp_path / "thesis.txt", 4, seed=1)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.fixture
def small_files_only() -> Iterator[None]:
    """A disk that is full in the middle of a large file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (250_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("small_files_only")
def test_nothing_half_written_is_left_behind(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="File too large"):
        write_demo_archive(tmp_path / "archive", 4, seed=1, classes=FEW_CLASSES)
    assert list(tmp_path.iterdir()) == []
