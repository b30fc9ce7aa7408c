"""A lake of the version before, with pictures and patients that it read wrongly, after `cbmir upgrade`, ingest, index.

What is in it and how it was made is in ../data/README.md. Commands run through `python -m cbmir_spark`, one after the
other in one process that was started in the unpacked folder.
"""

import hashlib
import json
import shutil
import tarfile
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pydicom
import pytest
from pyspark.sql import SparkSession

from cbmir_spark import __version__
from cbmir_spark.dicom.preprocessing import READING_REVISION
from cbmir_spark.lake import columns as cols
from cbmir_spark.lake import delta
from cbmir_spark.lake.paths import LakePaths
from cbmir_spark.lake.pseudonyms import PatientRule
from cbmir_spark.lake.schemas import IDENTITY, PIXELS, SOURCES, TAGS
from tests.support import chain

# Two minutes on an idle machine, for whichever test comes first.
pytestmark = [pytest.mark.timeout(900), pytest.mark.more]

DATA = Path(__file__).parent.parent / "data"
EXPECTED: Mapping[str, Any] = json.loads((DATA / "before_field.json").read_text())
KINDS: Mapping[str, Collection[str]] = EXPECTED["kinds"]
IMAGES: Mapping[str, str] = EXPECTED["images"]
# Objects that only another rule for patients concerns.
UNCONCERNED: Collection[str] = EXPECTED["unconcerned"]
ROOT = "/proc/self/cwd"
OTHER_PATIENTS = ["--set=retrieval.exclude_same=patient"]
INGEST = ["ingest", f"--archive={ROOT}/archive", "--set=privacy.identity=true"]
# Levels of gray that rounding may add to the tolerance of a case.
ROUNDING = 0.02

NO_PAGE = ["--set=retrieval.gallery=0"]
# Searches by queries in cells where nothing changes, in the order of the answers of the version before, and one of
# all images by those of merged patients.
SEARCHES = {
    "image": ["--queries=cells.csv", "--k=5"],
    "series": ["--queries=cells.csv", "--k=5", "--level=series"],
    "all": ["--queries=people.csv", "--k=100", "--prefilter=none", "--set=retrieval.unique=none", *OTHER_PATIENTS],
}
# Commands by the names that the tests know them by, in their order: before anything is changed, and after.
BEFORE = {
    "count": ["upgrade"],
    "forget merged": ["forget", "--patient=A\\100"],
    **{
        f"before {name}": ["retrieve", *each, *NO_PAGE, f"--out=before-{name}"]
        for name, each in SEARCHES.items()
        if name != "series"
    },
}
AFTER = {
    "mark": ["upgrade", "--apply"],
    "marked": ["upgrade"],
    "forget marked": ["forget", "--patient=A\\100"],
    "ingest": INGEST,
    "index": ["index"],
    **{f"after {name}": ["retrieve", *each, *NO_PAGE, f"--out=after-{name}"] for name, each in SEARCHES.items()},
    "count again": ["upgrade"],
    "ingest again": INGEST,
    "ingest late": ["ingest", f"--archive={ROOT}/late"],
    "forget one": ["forget", "--patient=A\\100"],
}
REFUSED = ("forget merged", "forget marked")
# On a copy of the lake of before.
SKIPPED = {
    "skipped: mark": ["upgrade", "--apply", "--skip=patients"],
    "skipped: ingest": INGEST[:2],
    "skipped: count": ["upgrade"],
}


@dataclass(frozen=True)
class Lake:
    """Rows of the published tables: of SOURCES by URI, of the others by image id and frame."""

    sources: Mapping[str, Mapping[str, Any]]
    tags: Mapping[str, Mapping[str, Any]]
    frames: Mapping[str, Mapping[int, Mapping[str, Any]]]
    vectors: Mapping[str, Mapping[int, Mapping[str, Any]]]

    def images_that_differ(self, other: "Lake") -> set[str]:
        """Names of objects whose image has other rows, or none, in one of the two lakes."""
        ids = {
            image
            for mine, others in ((self.tags, other.tags), (self.frames, other.frames), (self.vectors, other.vectors))
            for image in {*mine, *others}
            if mine.get(image) != others.get(image)
        }
        return {name for name, image in {**self.names, **other.names}.items() if image in ids}

    @property
    def names(self) -> Mapping[str, str]:
        """Image ids by the name of the object that represents the image."""
        return {
            name_of(uri): row[cols.IMAGE_ID] for uri, row in self.sources.items() if row[cols.OUTCOME] == cols.INGESTED
        }


@dataclass(frozen=True)
class Upgraded:
    """The unpacked folder, what the commands print, and the lake before, after and where a change was skipped.

    `files` are digests of the files below the lake: as unpacked, after BEFORE, and after AFTER.
    """

    root: Path
    printed: Mapping[str, Any]
    before: Lake
    after: Lake
    skipped: Lake
    files: tuple[Mapping[str, str], Mapping[str, str], Mapping[str, str]]


def name_of(uri: str) -> str:
    return uri.rsplit("/", 1)[1].removesuffix(".dcm")


def changed_names() -> set[str]:
    return named(("picture", "impossible", "readable", "tags", "people"))


def named(kinds: Collection[str]) -> set[str]:
    return {name for kind in kinds for name in KINDS[kind]}


def files_below(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def by_frame(rows: list[Mapping[str, Any]]) -> dict[str, dict[int, Mapping[str, Any]]]:
    found: dict[str, dict[int, Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(row[cols.IMAGE_ID], {})[row[cols.FRAME]] = row
    return found


def read(spark: SparkSession, lake: Path, published: Mapping[str, int], indexed: int) -> Lake:
    """Read versions of the tables: the published ones of an ingest, and one of the index."""
    paths = LakePaths(str(lake), str(lake / "vault"))

    def rows(path: str, version: int, *without: str) -> list[Mapping[str, Any]]:
        return [row.asDict(recursive=True) for row in delta.read(spark, path, version).drop(*without).collect()]

    features = rows(paths.features(EXPECTED["indexed"]["model_id"]), indexed) if indexed >= 0 else []
    return Lake(
        {row[cols.URI]: row for row in rows(paths.path(SOURCES), published["sources"])},
        {row[cols.IMAGE_ID]: row for row in rows(paths.path(TAGS), published["tags"])},
        by_frame(rows(paths.path(PIXELS), published["pixels"])),
        by_frame(features),
    )


@pytest.fixture(scope="module")
def field(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("field")
    with tarfile.open(DATA / "field.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder / "field"


@pytest.fixture(scope="module")
def upgraded(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Upgraded:
    root = tmp_path_factory.mktemp("upgrade")
    for name in ("old_state", "before_field"):
        with tarfile.open(DATA / f"{name}.tar.xz") as archive:
            archive.extractall(root, filter="data")
    lake, skipped = root / "lake", root / "skipped"
    for path in EXPECTED["removed"]:
        (root / path).unlink()
    # Another image of the patient whom the version before forgot.
    image = pydicom.dcmread(root / "archive" / "field" / "gone_1.dcm")
    image.PatientID = "GONE\\3"
    image.SOPInstanceUID = image.file_meta.MediaStorageSOPInstanceUID = "2.25.1"
    (root / "late").mkdir()
    image.save_as(root / "late" / "late.dcm")

    unpacked = files_below(lake)
    printed = chain.run(options(BEFORE, "lake"), root, refused=REFUSED)
    counted = files_below(lake)
    for part in ("tags", "pixels", "vault"):
        shutil.copytree(lake / part, skipped / part)
    printed |= chain.run(options(AFTER, "lake") | options(SKIPPED, "skipped"), root, refused=REFUSED)
    return Upgraded(
        root,
        printed,
        before=read(spark, lake, EXPECTED["published"], EXPECTED["indexed"]["version"]),
        after=read(spark, lake, printed["ingest again"]["published"], printed["index"]["version"]),
        skipped=read(spark, skipped, printed["skipped: ingest"]["published"], indexed=-1),
        files=(unpacked, counted, files_below(lake)),
    )


def options(commands: Mapping[str, Sequence[str]], lake: str) -> dict[str, list[str]]:
    return {name: [*each, f"--lake={ROOT}/{lake}", "--json", *chain.QUICK] for name, each in commands.items()}


def hits(folder: Path) -> list[tuple[Any, ...]]:
    """(query, rank, image, distance) below a results folder, in the order of queries and ranks."""
    files = sorted((folder / "hits").glob("*.parquet"))
    rows = [row for file in files for row in pq.ParquetFile(file).read().to_pylist()]
    names = (cols.QUERY_ID, cols.RANK, cols.IMAGE_ID, cols.DISTANCE)
    return sorted(tuple(row[name] for name in names) for row in rows)


def test_counting_changes_nothing(upgraded: Upgraded) -> None:
    unpacked, counted, _ = upgraded.files
    # Answers, and who held which lease last.
    others = ("results/", "runs/", "vault/leases/")
    assert {path: digest for path, digest in counted.items() if not path.startswith(others)} == {
        path: digest for path, digest in unpacked.items() if not path.startswith(others)
    }
    report = upgraded.printed["count"]
    assert (report["applied"], report["marked"], report["written_by"]) == (False, 0, "")
    assert (report["patients_before"], report["patients"]) == (PatientRule.FIRST, PatientRule.ISSUER)
    counts = {each["name"]: each["objects"] for each in report["changes"]}
    outcomes = Counter(row[cols.OUTCOME] for row in upgraded.before.sources.values())
    reasons = Counter(row[cols.REASON] for row in upgraded.before.sources.values())
    refused = outcomes[cols.REJECTED] + outcomes[cols.NOT_AN_IMAGE] - reasons[cols.ERASED]
    assert (counts["patients"], counts["refused"]) == (outcomes[cols.INGESTED], refused)
    assert report["objects"] == outcomes[cols.INGESTED] + refused
    assert min(counts.values()) > 0
    marked = upgraded.printed["mark"]
    assert {**marked, "applied": False, "seconds": {}} == {**report, "seconds": {}}


def test_marked_objects_are_counted_until_they_are_read(upgraded: Upgraded) -> None:
    marked = upgraded.printed["mark"]["objects"]
    report = upgraded.printed["marked"]
    assert (report["objects"], report["marked"]) == (0, marked)
    report = upgraded.printed["count again"]
    assert (report["objects"], report["marked"], report["patients_before"]) == (0, 0, PatientRule.ISSUER)
    assert report["written_by"] == __version__


def test_only_what_was_read_wrongly_changes(upgraded: Upgraded) -> None:
    """All other rows are the same, their batch included."""
    assert upgraded.after.images_that_differ(upgraded.before) == changed_names()
    before, after = set(upgraded.before.names), set(upgraded.after.names)
    assert (before - after, after - before) == (named(("impossible",)), named(("readable",)))
    assert {name for name in after if name in named(KINDS)} == named(("picture", "readable", "tags", "people", "sound"))
    report = upgraded.printed["ingest"]
    read_anew = named(("picture", "readable", "tags", "people"))
    assert report["frames"] == sum(len(upgraded.after.frames[upgraded.after.names[name]]) for name in read_anew)


def test_only_what_changed_is_embedded(upgraded: Upgraded) -> None:
    report = upgraded.printed["index"]
    assert report["embedded"] == upgraded.printed["ingest"]["frames"]
    assert report["deleted"] == len(named(("picture", "impossible", "tags", "people")))
    assert report["model_id"] == EXPECTED["indexed"]["model_id"]
    vectors = {image: set(frames) for image, frames in upgraded.after.vectors.items()}
    assert vectors == {image: set(frames) for image, frames in upgraded.after.frames.items()}


def test_files_of_other_partitions_of_the_index_stay_as_they_are(upgraded: Upgraded) -> None:
    _, before, after = upgraded.files
    features = f"features/{EXPECTED['indexed']['model_id']}/modality="
    old, new = ({p: d for p, d in files.items() if p.startswith(features)} for files in (before, after))
    assert {path: new.get(path) for path in old} == old
    places = {
        (row[cols.MODALITY], row[cols.BODY_PART])
        for lake in (upgraded.before, upgraded.after)
        for name in changed_names() & set(lake.names)
        for row in lake.vectors[lake.names[name]].values()
    }
    touched = {tuple(part.split("=")[1] for part in path.split("/")[2:4]) for path in set(new) - set(old)}
    assert touched and touched <= places
    every = {tuple(part.split("=")[1] for part in path.split("/")[2:4]) for path in old}
    assert len(every - places) >= 5


@pytest.mark.parametrize("name", sorted(named(("picture", "readable", "sound")) - set(UNCONCERNED)))
def test_pictures_are_the_right_ones(upgraded: Upgraded, field: Path, name: str) -> None:
    case = next(each for each in json.loads((field / "expected.json").read_text()) if each["name"] == name)
    right = np.load(field / case["picture"])["arr_0"].astype(int)
    (frame,) = upgraded.after.frames[upgraded.after.names[name]].values()
    found = np.frombuffer(frame[cols.PIXELS_COLUMN], np.uint8).reshape(right.shape)
    assert np.abs(found - right).mean() <= case["tolerance"] + ROUNDING


def test_merged_patients_are_told_apart(upgraded: Upgraded) -> None:
    pairs = list(zip(KINDS["people"][::2], KINDS["people"][1::2], strict=True))
    counts = []
    for lake in (upgraded.before, upgraded.after, upgraded.skipped):
        patients = [[lake.tags[IMAGES[name]][cols.PATIENT_ID] for name in pair] for pair in pairs]
        counts.append([len(set(pair)) for pair in patients])
        assert len({each for pair in patients for each in pair}) == sum(counts[-1])
    assert counts == [[1] * len(pairs), [2] * len(pairs), [1] * len(pairs)]


def test_identities_are_those_of_the_new_patients(upgraded: Upgraded, spark: SparkSession) -> None:
    """But for the one that is forgotten at the end."""
    path = LakePaths(f"{upgraded.root}/lake", f"{upgraded.root}/lake/vault").path(IDENTITY)
    rows = delta.read(spark, path).where(f"{cols.KIND} = 'patient'").collect()
    known = {row[cols.IDENTIFIER]: (row[cols.PSEUDONYM], row[cols.ISSUER]) for row in rows}
    assert {"SITE\\0001", "SITE\\0002", "A\\200", "Müller-1", "Möller-1"} <= set(known)
    assert not {"SITE", "A", "A\\100", "M\ufffdller-1"} & set(known)
    assert known["SITE\\0001"][0] == upgraded.after.tags[IMAGES["patient_backslash_0"]][cols.PATIENT_ID]
    assert {row[cols.ISSUER] for row in rows if row[cols.IDENTIFIER] == "SHARED-7"} == {"NORTH", "SOUTH"}
    owners = {row[cols.PATIENT_ID] for row in upgraded.after.tags.values()}
    assert {pseudonym for pseudonym, _ in known.values()} <= owners


def test_answers_without_what_changed_are_the_same(upgraded: Upgraded) -> None:
    assert hits(upgraded.root / "before-image") == hits(upgraded.root / "after-image")


@pytest.mark.parametrize("name", ["image", "series"])
def test_they_are_those_of_the_version_before(upgraded: Upgraded, name: str) -> None:
    """Distances may differ in the last digits where another processor computes them."""
    found, expected = hits(upgraded.root / f"after-{name}"), EXPECTED["answers"][name]
    assert [list(hit[:3]) for hit in found] == [hit[:3] for hit in expected]
    assert [hit[3] for hit in found] == pytest.approx([hit[3] for hit in expected], rel=1e-6)


def test_distances_to_what_did_not_change_are_the_same(upgraded: Upgraded) -> None:
    before, after = hits(upgraded.root / "before-all"), hits(upgraded.root / "after-all")
    changed = {
        image
        for lake in (upgraded.before, upgraded.after)
        for name, image in lake.names.items()
        if name in changed_names()
    }
    kept = [[(query, image, distance) for query, _, image, distance in each] for each in (before, after)]
    others = [sorted(hit for hit in each if hit[1] not in changed) for each in kept]
    assert others[0] == others[1]
    assert len(others[0]) < min(len(before), len(after))
    assert {hit for hit in kept[0] if hit[1] in changed} != {hit for hit in kept[1] if hit[1] in changed}


def test_what_belonged_to_a_merged_patient_is_found_by_the_other_one(upgraded: Upgraded) -> None:
    one, other = KINDS["people"][2:4]
    found = [
        {image for query, _, image, _ in hits(upgraded.root / f"{when}-all") if query == one}
        for when in ("before", "after")
    ]
    assert [IMAGES[other] in each for each in found] == [False, True]


def test_sources_say_which_version_read_an_object(upgraded: Upgraded) -> None:
    forgotten = {uri for uri, row in upgraded.before.sources.items() if row[cols.REASON] == cols.ERASED}
    assert {row.get(cols.REVISION) for row in upgraded.before.sources.values()} == {None}
    revisions = {uri: row[cols.REVISION] for uri, row in upgraded.after.sources.items()}
    assert revisions == {uri: None if uri in forgotten else READING_REVISION for uri in revisions}


def test_a_second_ingest_reads_nothing(upgraded: Upgraded) -> None:
    first, second = upgraded.printed["ingest"], upgraded.printed["ingest again"]
    assert (second["listed"], second["unchanged"]) == (EXPECTED["listed"],) * 2
    assert (second["batches"], second["published"]) == (0, first["published"])


def test_what_was_forgotten_stays_forgotten(upgraded: Upgraded) -> None:
    """By a tombstone of the old rule, which names all patients whose ID begins like that up to a backslash."""
    for name in KINDS["forgotten"]:
        uri = next(uri for uri in upgraded.before.sources if name_of(uri) == name)
        known = {key: value for key, value in upgraded.after.sources[uri].items() if value is not None}
        assert known == {key: value for key, value in upgraded.before.sources[uri].items() if value is not None}
        assert known[cols.REASON] == cols.ERASED
        assert IMAGES[name] not in upgraded.after.tags
    report = upgraded.printed["ingest late"]
    assert (report["outcomes"], report["reasons"]) == ({cols.REJECTED: 1}, {cols.ERASED: 1})


def test_one_of_the_merged_patients_can_be_forgotten_once_they_are_told_apart(
    upgraded: Upgraded, spark: SparkSession
) -> None:
    """Before, and until they are read again, it would be both of them, or none."""
    for name, remedy in (("forget merged", "`cbmir upgrade --apply`"), ("forget marked", "`cbmir ingest` first")):
        said = upgraded.printed[name].splitlines()
        assert len(said) == 1
        assert remedy in said[0]
    report = upgraded.printed["forget one"]
    assert (report["asked"], report["unknown"], report["images"]) == (1, 0, 1)
    paths = LakePaths(f"{upgraded.root}/lake", f"{upgraded.root}/lake/vault")
    left = {row[cols.IMAGE_ID] for row in delta.read(spark, paths.path(TAGS)).collect()}
    assert set(upgraded.after.tags) - left == {IMAGES["patient_yen_0"]}


def test_patients_can_be_left_as_they_are(upgraded: Upgraded) -> None:
    report = upgraded.printed["skipped: mark"]
    assert (report["patients"], report["patients_before"]) == (PatientRule.FIRST, PatientRule.FIRST)
    assert "patients" not in {each["name"] for each in report["changes"]}
    assert report["objects"] == upgraded.printed["mark"]["objects"] - len(UNCONCERNED)
    rows = upgraded.skipped.sources.items()
    unread = {name_of(uri) for uri, row in rows if row[cols.REVISION] is None and row[cols.REASON] != cols.ERASED}
    assert unread == set(UNCONCERNED)
    changed = named(("picture", "impossible", "readable", "tags"))
    assert upgraded.skipped.images_that_differ(replace(upgraded.before, vectors={})) == changed
    for name in named(("picture", "readable", "sound")):
        ((mine,), (full,)) = (lake.frames[lake.names[name]].values() for lake in (upgraded.skipped, upgraded.after))
        assert mine[cols.PIXELS_COLUMN] == full[cols.PIXELS_COLUMN], name
    again = upgraded.printed["skipped: count"]
    assert {each["name"]: each["objects"] for each in again["changes"] if each["objects"]} == {
        "patients": len(upgraded.skipped.names)
    }
