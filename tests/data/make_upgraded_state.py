"""The recipe of before_field.tar.xz and before_field.json; see README.md beside it. It runs with the code of ec80ff5:

    git worktree add /tmp/old ec80ff5
    PYTHONPATH=/tmp/old python tests/data/make_upgraded_state.py

It unpacks old_state.tar.xz, puts objects of field.tar.xz into the archive, and goes on with commands of that version:
ingest, forget, index, retrieve. What is packed is what they add to the files of old_state.tar.xz, or change in them.
It fails where that version reads an object in another way than its kind below says.
"""

import csv
import json
import os
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pydicom
from make_old_state import HERE, INGEST, LAKE, SPARK, cbmir, pack
from numpy.typing import NDArray
from pydicom.dataset import Dataset

# Made from another object: uncompressed, and with every tag, so that only another rule for patients may concern them.
UNCONCERNED = {"whole_slice": "control", "whole_capture": "planar_1_native"}
# Objects of field.tar.xz by what the old version makes of them, and the new one.
KINDS = {
    # Another picture than the right one; then the right one.
    "picture": (
        "jpeg_says_rgb_no_jfif",
        "planar_1_jpeg",
        "planar_1_jpeg_lossless",
        "planar_1_j2k",
        "sc_gray_rescale",
        "shape_swapped_jpls",
        "shape_swapped_j2k",
        "j2k_unsigned16_says_signed12",
        "palette_ob",
        "slope_empty",
        "intercept_missing",
        "comma_spacing",
        "float_padding",
    ),
    # A picture of pixels that are not the header's; then refused.
    "impossible": ("jpeg_color_in_gray_header", "jpls_stream_wider", "jpls_stream_bigger"),
    # Refused; then read.
    "readable": (
        "end_missing",
        "pi_blank",
        "bot_all_zero",
        "alloc16_jpeg",
        "jpeg_in_implicit_syntax",
        "ybr422_full_length_rgb",
        "uid_only_in_meta",
    ),
    # Wrong tags, or none; then the right ones.
    "tags": ("birth_placeholder", "date_only_datetime"),
    # Two patients with one pseudonym; then with two.
    "people": (
        "patient_backslash_0",
        "patient_backslash_1",
        "patient_yen_0",
        "patient_yen_1",
        "patient_latin1_as_utf8_0",
        "patient_latin1_as_utf8_1",
        "issuer_north",
        "issuer_south",
    ),
    # Read rightly, by both.
    "sound": (
        "control",
        "jpeg_says_rgb_420",
        "jpll_signed12",
        "palette_16_low_byte",
        "planar_1_native",
        "ybr422_native",
        "j2k_color_says_rgb",
        "j2k_color_rct_without_mct",
        "rle_padded_run",
        "rle_odd_segment",
        "shape_1_identity",
        "pet_days",
        "pet_midnight",
        "type_us",
        "sex_word",
        *UNCONCERNED,
    ),
    # Refused by both.
    "refused": ("h264", "html_error", "jpls_stream_smaller", "pixel_length_short"),
    # The patient GONE is forgotten by the old version, and with it these two.
    "forgotten": ("gone_1", "gone_2"),
}
# Made from another object: Patient ID and Issuer of Patient ID.
MADE_FROM = "sex_word"
MADE = {
    "gone_1": ("GONE\\1", ""),
    "gone_2": ("GONE\\2", ""),
    "issuer_north": ("SHARED-7", "NORTH"),
    "issuer_south": ("SHARED-7", "SOUTH"),
}
FORGOTTEN = "GONE"
# A second file with the same content.
COPY_OF = "planar_1_j2k"
# Levels of gray between a wrong picture and the right one, on average.
WRONG = 5.0
SETTLED = 1_710_000_000

K = 5
# Queries by image id, by level: images of old_state.tar.xz and sound ones, in cells where no image changes.
LEVELS = ("image", "series")
ASKED = ("CT-CHEST-0-0", "CT-HEAD-1-1", "MR-HEAD-3-0", "MR-KNEE-4-1")
ASKED_FIELD = ("rle_padded_run", "pet_days", "j2k_color_says_rgb")


def put(work: Path, cases: dict[str, dict[str, Any]], field: Path) -> None:
    """Put the objects into archive/field, as name.dcm."""
    folder = work / "archive" / "field"
    folder.mkdir()
    for name in (name for names in KINDS.values() for name in names):
        origin = MADE_FROM if name in MADE else UNCONCERNED.get(name, name)
        content = (field / cases[origin]["path"]).read_bytes()
        (folder / f"{name}.dcm").write_bytes(content)
    for number, (name, (patient, issuer)) in enumerate(MADE.items()):
        image = pydicom.dcmread(folder / f"{name}.dcm")
        rename(image, patient, issuer, number)
        image.save_as(folder / f"{name}.dcm")
    for number, name in enumerate(UNCONCERNED, start=len(MADE)):
        image = pydicom.dcmread(folder / f"{name}.dcm")
        rename(image, name, "", number)
        image.PatientAge, image.PatientSex, image.StudyDate = "040Y", "F", "20190203"
        image.SliceThickness, image.PixelSpacing = "1", ["1", "1"]
        image.save_as(folder / f"{name}.dcm")
    (folder / "second_copy.dcm").write_bytes((folder / f"{COPY_OF}.dcm").read_bytes())
    for number, path in enumerate(sorted(folder.iterdir())):
        os.utime(path, (SETTLED + number,) * 2)


def rename(image: Dataset, patient: str, issuer: str, number: int) -> None:
    """Make an object another one, of another patient."""
    image.PatientID = patient
    if issuer:
        image.IssuerOfPatientID = issuer
    image.SOPInstanceUID = image.file_meta.MediaStorageSOPInstanceUID = f"2.25.{9000 + number}"
    image.SeriesInstanceUID, image.StudyInstanceUID = f"2.25.{9100 + number}", f"2.25.{9200 + number}"


def rows(folder: str, columns: list[str] | None = None) -> list[dict[str, Any]]:
    """The rows of all Parquet files below a folder, those of older versions of a table too."""
    return [row for file in sorted(Path(folder).rglob("part-*.parquet")) for row in read(file, columns)]


def read(file: Path, columns: list[str] | None = None) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pq.ParquetFile(file).read(columns).to_pylist()
    return found


def check(cases: dict[str, dict[str, Any]], field: Path) -> dict[str, str]:
    """Check that each object was read as its kind says; the image id of those that were, by name."""
    sources = {Path(row["uri"]).stem: row for row in rows("lake/vault/sources") if "/archive/field/" in row["uri"]}
    pixels = {row["image_id"]: row["pixels"] for row in rows("lake/pixels", ["image_id", "pixels"])}
    tags = {row["image_id"]: row for row in rows("lake/tags")}
    images = {name: row["image_id"] for name, row in sources.items() if row["outcome"] == "ingested"}
    assert sources["second_copy"]["outcome"] == "duplicate"
    for kind, names in KINDS.items():
        for name in names:
            assert (name in images) == (kind not in ("readable", "refused")), (name, sources[name])
    for name in KINDS["picture"]:
        assert off(pixels[images[name]], right(field, cases[name])) > WRONG, name
    for name in KINDS["sound"]:
        case = cases[UNCONCERNED.get(name, name)]
        assert off(pixels[images[name]], right(field, case)) <= case["tolerance"] + 0.02, name
    for name in KINDS["tags"]:
        found = {tag: tags[images[name]][tag] for tag in cases[name]["tags"]}
        assert found != cases[name]["tags"], name
    for one, other in zip(KINDS["people"][::2], KINDS["people"][1::2], strict=True):
        assert tags[images[one]]["patient_id"] == tags[images[other]]["patient_id"], one
    return images


def off(pixels: bytes, picture: NDArray[np.uint8]) -> float:
    return float(np.abs(np.frombuffer(pixels, np.uint8).reshape(256, 256).astype(int) - picture).mean())


def right(field: Path, case: dict[str, Any]) -> NDArray[np.uint8]:
    picture: NDArray[np.uint8] = np.load(field / case["picture"])["arr_0"]
    return picture


def queries(images: dict[str, str]) -> None:
    """One list of images in cells without changes, and one of images of merged patients."""
    known = {Path(row["uri"]).name.split(".")[0]: row["image_id"] for row in rows("lake/vault/sources")}
    asked = {name: known[name] for name in ASKED} | {name: images[name] for name in ASKED_FIELD}
    people = {name: images[name] for name in KINDS["people"]}
    for path, wanted in (("cells.csv", asked), ("people.csv", people)):
        with Path(path).open("w", newline="") as file:
            csv.writer(file).writerows([("query_id", "image_id"), *wanted.items()])


def answers(folder: Path) -> list[dict[str, Any]]:
    """Hits below a results folder, in the order of queries and ranks."""
    hits = [hit for file in sorted((folder / "hits").glob("*.parquet")) for hit in read(file)]
    return sorted(hits, key=lambda hit: (hit["query_id"], hit["rank"]))


def make(work: Path, field: Path) -> dict[str, Any]:
    """Every command of the old version in its turn; what the test compares with."""
    cases = {case["name"]: case for case in json.loads((field / "expected.json").read_text())}
    os.chdir(work)
    put(work, cases, field)
    ingested = cbmir("ingest", *LAKE, *INGEST, *SPARK)
    images = check(cases, field)
    forgotten = cbmir("forget", f"--patient={FORGOTTEN}", *LAKE, *SPARK)
    assert forgotten["images"] == len(KINDS["forgotten"])
    indexed = cbmir("index", "--model=models:/cbmir/1", *LAKE, *SPARK)
    queries(images)
    found = {}
    for level in LEVELS:
        asked = ["--queries=cells.csv", f"--k={K}", f"--level={level}", "--set=retrieval.gallery=0"]
        hits = answers(Path(cbmir("retrieve", *asked, *LAKE, *SPARK)["out"].removeprefix("file://")))
        found[level] = [[hit[column] for column in ("query_id", "rank", "image_id", "distance")] for hit in hits]
    again = cbmir("ingest", *LAKE, *INGEST, *SPARK)
    assert again["unchanged"] == again["listed"]
    return {
        "listed": again["listed"],
        "published": {name: again["published"][name] for name in ("sources", "tags", "pixels", "batch")},
        "outcomes": ingested["outcomes"],
        "indexed": {name: indexed[name] for name in ("model_id", "version", "rows", "files")},
        "kinds": KINDS,
        "unconcerned": UNCONCERNED,
        "images": images,
        "answers": found,
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        work, field = Path(folder) / "work", Path(folder) / "field"
        with tarfile.open(HERE / "field.tar.xz") as archive:
            archive.extractall(folder, filter="data")
        with tarfile.open(HERE / "old_state.tar.xz") as archive:
            archive.extractall(work, filter="data")
        before = {path: path.read_bytes() for path in work.rglob("*") if path.is_file()}
        expected = make(work, field)
        added = [path for path in sorted(work.rglob("*")) if path.is_file() and before.get(path) != path.read_bytes()]
        # Checkpoints, which `forget` deletes.
        expected["removed"] = [str(path.relative_to(work)) for path in sorted(before) if not path.exists()]
        pack(work, HERE / "before_field.tar.xz", added)
    (HERE / "before_field.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main()
