"""The demo archive and wrapped pictures: the same each time, readable by our own reader, and honest in their tags."""

import csv
import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom import uid

from cbmir_spark.config import load
from cbmir_spark.dicom.preprocessing import Preprocessing
from cbmir_spark.dicom.read import NotAnImage, Rejected, read_instance
from cbmir_spark.dicom.vocabulary import Vocabulary
from cbmir_spark.dicom.vocabulary_tables import UNKNOWN
from cbmir_spark.errors import InputError
from cbmir_spark.synthetic import archive as synthetic_archive
from cbmir_spark.synthetic import encode, wrap
from cbmir_spark.synthetic import phantoms as synthetic_phantoms

IMAGES = 8


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> synthetic_archive.Archive:
    return synthetic_archive.write_demo_archive(tmp_path_factory.mktemp("demo") / "archive", IMAGES, seed=1)


@pytest.fixture(scope="module")
def preprocessing() -> Preprocessing:
    pixels = load(environ={}).pixels
    return Preprocessing(pixels.aspect, pixels.windows, pixels.percentiles, pixels.max_frames)


def phantoms(archive: synthetic_archive.Archive) -> list[Path]:
    found = sorted(path for path in (archive.folder / "phantoms").rglob("*") if path.is_file())
    return [path for path in found if path.parent.name not in ("SE08", "SE09")]


def test_every_phantom_is_read_as_what_it_was_drawn_to_be(
    archive: synthetic_archive.Archive, preprocessing: Preprocessing
) -> None:
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


def test_the_archive_speaks_every_syntax_that_can_be_written_here(archive: synthetic_archive.Archive) -> None:
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
        said = (str(header.PatientName), header.SeriesDescription, header.ImageComments)
        assert all(text.startswith("SYNTHETIC") for text in said)
        assert ("SequenceOfUltrasoundRegions" in header) == (header.Modality == "US")


def test_patients_studies_and_series_nest(archive: synthetic_archive.Archive) -> None:
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


def test_compressed_phantoms_hold_the_pixels_that_were_drawn(archive: synthetic_archive.Archive) -> None:
    """A lossless syntax gives back what the same phantom holds uncompressed."""
    subject = synthetic_phantoms.Subject(synthetic_phantoms.CLASSES[0], 0, 1)
    for lossless in (uid.RLELossless, uid.JPEG2000Lossless, uid.JPEGLSLossless, uid.JPEGLosslessSV1):
        for scanner in (0, 1):  # unsigned with an intercept, signed with padding
            plain, packed = (
                pydicom.dcmread(pydicom.filebase.DicomBytesIO(encode.as_bytes(ds, syntax)))
                for syntax in (uid.ImplicitVRLittleEndian, lossless)
                for ds in [synthetic_archive._phantom(subject, 1, 0, 0.0, 0, scanner)[0]]
            )
            assert packed.file_meta.TransferSyntaxUID == lossless
            assert len(packed.PixelData) < len(plain.PixelData)
            np.testing.assert_array_equal(packed.pixel_array, plain.pixel_array)


def test_what_an_archive_also_holds(archive: synthetic_archive.Archive, preprocessing: Preprocessing) -> None:
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


@pytest.fixture
def fewer_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    """CT chest, CT abdomen and ultrasound of the liver: what is tested with them is the same for all ten."""
    monkeypatch.setattr(synthetic_phantoms, "CLASSES", (*synthetic_phantoms.CLASSES[:2], synthetic_phantoms.CLASSES[6]))


@pytest.mark.usefixtures("fewer_classes")
def test_body_parts_are_written_as_archives_write_them(tmp_path: Path) -> None:
    made = synthetic_archive.write_demo_archive(tmp_path / "archive", 24, seed=1)
    spelled: dict[str, set[str | None]] = {}
    for path in phantoms(made):
        label = "/".join(path.parts[-3].split("-")[1:3])
        spelled.setdefault(label, set()).add(pydicom.dcmread(path, stop_before_pixels=True).get("BodyPartExamined"))
    for label, spellings in spelled.items():
        body_part = label.partition("/")[2]
        assert spellings > {None, body_part} and len(spellings) == 4, label
        assert {Vocabulary().body_part(raw) for raw in spellings if raw} == {body_part}, label


@pytest.mark.usefixtures("fewer_classes")
def test_a_seed_gives_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    def digests(name: str, seed: int) -> dict[str, str]:
        folder = synthetic_archive.write_demo_archive(tmp_path / name, 4, seed).folder
        files = (path for path in folder.rglob("*") if path.is_file() and "pydicom" not in path.parts)
        return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}

    first, again, other = digests("first", 5), digests("again", 5), digests("other", 6)
    assert first == again
    drawn = [name for name in first if name.startswith(("phantoms", "conflicts"))]
    assert drawn and not [name for name in drawn if first[name] == other[name]]


def test_an_archive_that_is_there_is_left_untouched(archive: synthetic_archive.Archive) -> None:
    before = {path: path.stat().st_mtime_ns for path in archive.folder.rglob("*")}
    again = synthetic_archive.write_demo_archive(archive.folder, IMAGES, seed=1)
    assert archive.created and not again.created
    assert (again.files, again.phantoms) == (archive.files, archive.phantoms)
    assert {path: path.stat().st_mtime_ns for path in archive.folder.rglob("*")} == before
    with pytest.raises(InputError, match="another demo archive"):
        synthetic_archive.write_demo_archive(archive.folder, IMAGES, seed=2)


def test_a_folder_with_something_else_in_it_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="not a demo archive"):
        synthetic_archive.write_demo_archive(tmp_path, 4, seed=1)
    with pytest.raises(InputError, match="not a demo archive"):
        synthetic_archive.write_demo_archive(tmp_path / "thesis.txt", 4, seed=1)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.usefixtures("fewer_classes")
def test_nothing_half_written_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(folder: Path) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(synthetic_archive, "_copy_pydicom_files", fail)
    with pytest.raises(OSError, match="no space"):
        synthetic_archive.write_demo_archive(tmp_path / "archive", 4, seed=1)
    assert list(tmp_path.iterdir()) == []


# --- wrapped pictures ---

COLUMNS = [*wrap.LABEL_COLUMNS, "sha256"]


def make_labels(folder: Path, rows: list[dict[str, str]]) -> Path:
    path = folder / "labels.csv"
    with path.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows(rows)
    return path


def label(file: str, modality: str = "XR", body_part: str = "HAND", group: str = "case 7") -> dict[str, str]:
    origin = {"source_id": "XR_hand", "dataset": "A set", "licence": "CC BY 4.0"}
    return {"file": file, "modality": modality, "body_part": body_part, "group": group, **origin}


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    (folder / "a").mkdir(parents=True)
    rng = np.random.default_rng(3)
    Image.fromarray(rng.integers(0, 256, (31, 45), dtype="u1")).save(folder / "a" / "gray.png")
    Image.fromarray(rng.integers(0, 256, (40, 40), dtype="u1")).save(folder / "a" / "lossy.jpeg")
    Image.fromarray(rng.integers(0, 4096, (20, 30), dtype="u2")).save(folder / "a" / "deep.png")
    return folder


def test_a_wrapped_picture_has_its_pixels_and_only_tags_that_its_label_gives(
    tmp_path: Path, pictures: Path, preprocessing: Preprocessing
) -> None:
    rows = [label("a/gray.png"), label("a/lossy.jpeg", "US", "LIVER", ""), label("a/deep.png", "MR", "brain")]
    done = wrap.wrap_pictures(make_labels(tmp_path, rows), pictures, tmp_path / "out")
    assert (done.files, done.written) == (3, 3)
    assert done.classes == {"DX/HAND": 1, "MR/BRAIN": 1, "US/LIVER": 1}

    gray = pydicom.dcmread(tmp_path / "out" / "a" / "gray.png.dcm")
    np.testing.assert_array_equal(gray.pixel_array, np.asarray(Image.open(pictures / "a" / "gray.png")))
    assert gray.SOPClassUID == uid.SecondaryCaptureImageStorage
    assert (gray.Modality, gray.BodyPartExamined, gray.PatientID) == ("DX", "HAND", "case 7")
    assert (gray.ConversionType, list(gray.ImageType)) == ("WSD", ["DERIVED", "SECONDARY"])
    assert gray.BurnedInAnnotation == "NO"
    for said in ("A set", "XR_hand", "CC BY 4.0", "a/gray.png"):
        assert said in gray.DerivationDescription
    assert not any(gray[name].value for name in ("PatientName", "PatientSex", "StudyDate", "StudyTime"))
    assert not {"PatientAge", "KVP", "Manufacturer", "PixelSpacing", "LossyImageCompression"} & set(gray.dir())

    lossy = pydicom.dcmread(tmp_path / "out" / "a" / "lossy.jpeg.dcm")
    assert (lossy.LossyImageCompression, lossy.LossyImageCompressionMethod) == ("01", "ISO_10918_1")
    assert lossy.PatientID and lossy.PatientID != "case 7"
    deep = pydicom.dcmread(tmp_path / "out" / "a" / "deep.png.dcm")
    np.testing.assert_array_equal(deep.pixel_array, np.asarray(Image.open(pictures / "a" / "deep.png")))
    assert (deep.PatientID, deep.StudyInstanceUID) == (gray.PatientID, gray.StudyInstanceUID)
    assert deep.SeriesInstanceUID != gray.SeriesInstanceUID
    for path in (tmp_path / "out").rglob("*.dcm"):
        assert read_instance(path.read_bytes(), preprocessing, Vocabulary()).tags.kind == "image"


def test_wrapping_again_writes_nothing_and_gives_the_same_uids(tmp_path: Path, pictures: Path) -> None:
    labels = make_labels(tmp_path, [label("a/gray.png"), label("a/lossy.jpeg")])
    wrap.wrap_pictures(labels, pictures, tmp_path / "out")
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in (tmp_path / "out").rglob("*.dcm")}
    assert wrap.wrap_pictures(labels, pictures, tmp_path / "out").written == 0
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in before} == before
    # Another set may use the same name for another picture: that is another image.
    Image.fromarray(np.zeros((31, 45), "u1")).save(pictures / "a" / "gray.png")
    wrap.wrap_pictures(labels, pictures, tmp_path / "other")
    uids = [pydicom.dcmread(tmp_path / out / "a" / "gray.png.dcm").SOPInstanceUID for out in ("out", "other")]
    assert uids[0] != uids[1]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (label("../secret.png"), "below the images folder"),
        (label("/etc/passwd"), "below the images folder"),
        (label("a/absent.png"), "there is no picture"),
        (label("a/gray.png", modality="ZZ"), "modality 'ZZ'"),
        (label("a/gray.png", body_part="SOUL"), "body part 'SOUL'"),
        (label("a/gray.png", group="x" * 65), "group"),
        (label("a/lossy.jpeg"), "more than once"),
    ],
)
def test_a_bad_label_is_named_before_anything_is_written(
    tmp_path: Path, pictures: Path, row: dict[str, str], problem: str
) -> None:
    labels = make_labels(tmp_path, [label("a/lossy.jpeg"), row])
    with pytest.raises(InputError, match=problem):
        wrap.wrap_pictures(labels, pictures, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_labels_without_the_columns_or_without_a_file_are_refused(tmp_path: Path, pictures: Path) -> None:
    (tmp_path / "labels.csv").write_text("file,modality\na/gray.png,CT\n")
    with pytest.raises(InputError, match="lacks the column body_part, group"):
        wrap.wrap_pictures(tmp_path / "labels.csv", pictures, tmp_path / "out")
    with pytest.raises(InputError, match=r"absent\.csv: No such file"):
        wrap.wrap_pictures(tmp_path / "absent.csv", pictures, tmp_path / "out")
    (pictures / "a" / "gray.png").write_bytes(b"not a picture")
    with pytest.raises(InputError, match="cannot be read as a picture"):
        wrap.wrap_pictures(make_labels(tmp_path, [label("a/gray.png")]), pictures, tmp_path / "out")


def test_the_shared_pictures_wrap_with_their_labels(tmp_path: Path, shared_data: Path) -> None:
    with (shared_data / "labels.csv").open(newline="") as handle:
        rows = list(csv.DictReader(handle))[::60]
    path = tmp_path / "labels.csv"
    with path.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    done = wrap.wrap_pictures(path, shared_data / "labelled", tmp_path / "out")
    assert done.files == len(rows)
    for row in rows:
        ds = pydicom.dcmread(tmp_path / "out" / f"{row['file']}.dcm")
        assert ds.pixel_array.shape == (int(row["height"]), int(row["width"]))
        assert (ds.BodyPartExamined, ds.PatientID) == (row["body_part"], row["group"])
