"""Pictures wrapped as DICOM: their pixels, and only the tags that their labels give."""

import csv
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom import uid

from cbmir_spark.errors import InputError
from cbmir_spark.synthetic.wrap import LABEL_COLUMNS, wrap_pictures
from tests.support.dicom_files import read

COLUMNS = [*LABEL_COLUMNS, "sha256"]


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


def test_a_wrapped_picture_has_its_pixels_and_only_tags_that_its_label_gives(tmp_path: Path, pictures: Path) -> None:
    rows = [label("a/gray.png"), label("a/lossy.jpeg", "US", "LIVER", ""), label("a/deep.png", "MR", "brain")]
    done = wrap_pictures(make_labels(tmp_path, rows), pictures, tmp_path / "out")
    assert (done.files, done.written) == (3, 3)
    assert done.classes == {"DX/HAND": 1, "MR/BRAIN": 1, "US/LIVER": 1}

    gray = pydicom.dcmread(tmp_path / "out" / "a" / "gray.png.dcm")
    np.testing.assert_array_equal(gray.pixel_array, np.asarray(Image.open(pictures / "a" / "gray.png")))
    assert gray.SOPClassUID == uid.SecondaryCaptureImageStorage
    assert (gray.Modality, gray.BodyPartExamined, gray.PatientID) == ("DX", "HAND", "case 7")
    assert (gray.ConversionType, list(gray.ImageType)) == ("WSD", ["DERIVED", "SECONDARY"])
    assert gray.BurnedInAnnotation == "NO"
    for text in ("A set", "XR_hand", "CC BY 4.0", "a/gray.png"):
        assert text in gray.DerivationDescription
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
        assert read(path.read_bytes()).tags.kind == "image"


def test_wrapping_again_writes_nothing_and_gives_the_same_uids(tmp_path: Path, pictures: Path) -> None:
    labels = make_labels(tmp_path, [label("a/gray.png"), label("a/lossy.jpeg")])
    wrap_pictures(labels, pictures, tmp_path / "out")
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in (tmp_path / "out").rglob("*.dcm")}
    assert wrap_pictures(labels, pictures, tmp_path / "out").written == 0
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in before} == before
    # Another set may use the same name for another picture: that is another image.
    Image.fromarray(np.zeros((31, 45), "u1")).save(pictures / "a" / "gray.png")
    wrap_pictures(labels, pictures, tmp_path / "other")
    uids = [pydicom.dcmread(tmp_path / out / "a" / "gray.png.dcm").SOPInstanceUID for out in ("out", "other")]
    assert uids[0] != uids[1]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (label("../secret.png"), "below the images folder"),
        (label("/etc/passwd"), "below the images folder"),
        (label("a/absent.png"), "does not exist"),
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
        wrap_pictures(labels, pictures, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_labels_without_the_columns_or_without_a_file_are_refused(tmp_path: Path, pictures: Path) -> None:
    (tmp_path / "labels.csv").write_text("file,modality\na/gray.png,CT\n")
    with pytest.raises(InputError, match="has no column body_part, group"):
        wrap_pictures(tmp_path / "labels.csv", pictures, tmp_path / "out")
    with pytest.raises(InputError, match=r"absent\.csv: No such file"):
        wrap_pictures(tmp_path / "absent.csv", pictures, tmp_path / "out")
    (pictures / "a" / "gray.png").write_bytes(b"not a picture")
    with pytest.raises(InputError, match="is not a picture"):
        wrap_pictures(make_labels(tmp_path, [label("a/gray.png")]), pictures, tmp_path / "out")


def test_the_shared_pictures_wrap_with_their_labels(tmp_path: Path, shared_data: Path) -> None:
    with (shared_data / "labels.csv").open(newline="") as handle:
        rows = list(csv.DictReader(handle))[::60]
    path = tmp_path / "labels.csv"
    with path.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    done = wrap_pictures(path, shared_data / "labelled", tmp_path / "out")
    assert done.files == len(rows)
    for row in rows:
        ds = pydicom.dcmread(tmp_path / "out" / f"{row['file']}.dcm")
        assert ds.pixel_array.shape == (int(row["height"]), int(row["width"]))
        assert (ds.BodyPartExamined, ds.PatientID) == (row["body_part"], row["group"])
