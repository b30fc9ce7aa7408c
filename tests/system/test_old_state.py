"""A lake, a snapshot, checkpoints and a model of an older version: opened, searched and continued by this one.

What they are and how they were made is in ../data/README.md. Commands run through `python -m cbmir_spark`, one after
the other in one process that was started in the unpacked folder.
"""

import json
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pydicom
import pytest

from tests.support import chain

# A minute on an idle machine, for whichever test comes first.
pytestmark = [pytest.mark.timeout(900), pytest.mark.slow]

DATA = Path(__file__).parent.parent / "data"
ROOT = "/proc/self/cwd"
COMMON = [f"--lake={ROOT}/lake", "--json", *chain.QUICK]
SEARCH = ["--k=5", "--prefilter=none"]
# The settings of the training that was killed: with others it would start over.
STOPPED = [
    "--preset=alexnet-small",
    "--set=dataset.min_images=4",
    "--set=dataset.rows_per_group=8",
    "--set=training.batch_size=8",
    "--set=training.epochs=3",
    "--set=training.checkpoint_steps=2",
    "--set=training.seed=2",
]
FORGOTTEN = "P-CT-HEAD-2"
# The image whose picture a new one has.
KNOWN = "MR-HEAD-2-0"

# Commands by the names that the tests know them by, in their order.
COMMANDS = {
    "ingest": ["ingest", f"--archive={ROOT}/archive", "--set=privacy.identity=true"],
    "verify": ["verify"],
    "images": ["retrieve", "--queries=queries.csv", "--out=images", *SEARCH],
    "series": ["retrieve", "--queries=series.csv", "--out=series", "--level=series", *SEARCH],
    "index": ["index"],
    "evaluate": ["evaluate"],
    "train": ["train", *STOPPED],
    "runs": ["runs"],
    "ingest more": ["ingest", f"--archive={ROOT}/more", "--set=privacy.identity=true"],
    "index more": ["index", "--model=models:/cbmir/1"],
    "search more": ["retrieve", "--queries=more.csv", "--out=found-more", "--set=retrieval.unique=none", *SEARCH],
    "forget": ["forget", f"--patient={FORGOTTEN}"],
}


@dataclass(frozen=True)
class Continued:
    """The unpacked folder, what the older version answered, and what this one prints."""

    root: Path
    expected: Mapping[str, Any]
    printed: Mapping[str, Any]
    forgotten: str


def rows(folder: Path, kind: str) -> list[dict[str, Any]]:
    """The rows of all Parquet files in folders called `kind` below a folder."""
    files = sorted(path for path in folder.rglob("*.parquet") if path.parent.name == kind)
    return [row for file in files for row in pq.ParquetFile(file).read().to_pylist()]


@pytest.fixture(scope="module")
def continued(tmp_path_factory: pytest.TempPathFactory) -> Continued:
    root = tmp_path_factory.mktemp("old-state")
    with tarfile.open(DATA / "old_state.tar.xz") as archive:
        archive.extractall(root, filter="data")
    asked = {row["query_id"]: row for row in rows(root / "lake" / "results", "queries")}
    expected = json.loads((DATA / "old_state.json").read_text())
    # One image more: a picture of the archive as another instance.
    image = pydicom.dcmread(root / "archive" / f"{KNOWN}.png.dcm")
    image.SOPInstanceUID = image.file_meta.MediaStorageSOPInstanceUID = "2.25.1"
    (root / "more").mkdir()
    image.save_as(root / "more" / "new.dcm")
    (root / "more.csv").write_text(f"query_id,uri\nnew,{ROOT}/more/new.dcm\n")
    # `runs` asks MLflow alone.
    commands = [[*each, *COMMON[: 2 if name == "runs" else None]] for name, each in COMMANDS.items()]
    printed = chain.run(dict(zip(COMMANDS, commands, strict=True)), root)
    return Continued(root, expected, printed, asked["uid"]["patient_id"])


def test_a_night_on_an_unchanged_archive_reads_nothing(continued: Continued) -> None:
    report = continued.printed["ingest"]
    listed = continued.expected["listed"]
    assert (report["listed"], report["unchanged"], report["outcomes"]) == (listed, listed, {})
    assert report["published"]["batch"] == continued.expected["batches"]


def test_the_index_is_verified_and_lacks_nothing(continued: Continued) -> None:
    assert continued.printed["verify"] == continued.expected["indexed"]
    report = continued.printed["index"]
    assert (report["embedded"], report["deleted"]) == (0, 0)
    assert {name: report[name] for name in continued.expected["indexed"]} == continued.expected["indexed"]
    assert report["champion"] == "1"


@pytest.mark.parametrize("level", ["image", "series"])
def test_the_same_queries_get_the_same_answers(continued: Continued, level: str) -> None:
    """Image by image; distances may differ where another processor embeds a query's file."""
    expected = continued.expected["answers"][level]
    folder = continued.root / ("images" if level == "image" else "series")
    statuses = {row["query_id"]: (row["status"], row["candidates"]) for row in rows(folder, "statuses")}
    assert statuses == {row["query_id"]: (row["status"], row["candidates"]) for row in expected["statuses"]}
    hits = sorted(rows(folder, "hits"), key=lambda hit: (hit["query_id"], hit["rank"]))
    names = ("query_id", "rank", "image_id", "series_id")
    assert [[hit[name] for name in names] for hit in hits] == [
        [hit[name] for name in names] for hit in expected["hits"]
    ]
    assert [hit["distance"] for hit in hits] == pytest.approx([hit["distance"] for hit in expected["hits"]], rel=1e-4)


def test_the_model_is_judged_alike(continued: Continued) -> None:
    report, expected = continued.printed["evaluate"], continued.expected
    assert {name: report[name] for name in expected["evaluated"]} == pytest.approx(expected["evaluated"])
    found = {mode: each["average_precision"] for mode, each in report["retrieval"].items()}
    assert found == pytest.approx(expected["average_precision"])


def test_a_training_goes_on_from_its_checkpoint(continued: Continued) -> None:
    report, expected = continued.printed["train"], continued.expected
    assert report["snapshot"] == expected["trained"]["snapshot"]
    history, checkpoint = report["history"], expected["checkpoint"]
    assert history["resumed"] == checkpoint["steps"]
    done = len(checkpoint["epochs"])
    assert history["epochs"][:done] == checkpoint["epochs"]
    assert [epoch["number"] for epoch in history["epochs"]] == list(range(1, history["epochs"][0]["of"] + 1))
    assert len(history["epochs"]) > done
    assert not (continued.root / "lake" / "training" / checkpoint["folder"]).exists()
    # The model of before was loaded, and ranked on the snapshot of before.
    assert report["promotion"]["incumbent_reached"] == pytest.approx(expected["validation_map"])


def test_the_runs_of_before_are_listed(continued: Continued) -> None:
    listed = {run["run_id"]: run for run in continued.printed["runs"]}
    assert len(listed) == len(continued.expected["runs"]) + 1
    for run in continued.expected["runs"]:
        assert {name: listed[run["run_id"]][name] for name in run} == run


def test_a_new_image_is_ingested_indexed_and_found(continued: Continued) -> None:
    assert continued.printed["ingest more"]["outcomes"] == {"ingested": 1}
    report = continued.printed["index more"]
    assert (report["embedded"], report["rows"]) == (1, continued.expected["indexed"]["rows"] + 1)
    assert report["model_id"] == continued.expected["indexed"]["model_id"]
    nearest = min(rows(continued.root / "found-more", "hits"), key=lambda hit: hit["rank"])
    known = {row["query_id"]: row for row in rows(continued.root / "series", "queries")}["by-image"]
    # The same picture, indexed by the version of before, and embedded by this one.
    assert nearest["distance"] == pytest.approx(0.0, abs=1e-4)
    assert nearest["series_id"] == known["series_id"]


def test_a_patient_is_forgotten_everywhere(continued: Continued) -> None:
    lake = continued.root / "lake"
    assert continued.printed["forget"]["images"] == 2
    for folder, kinds in (("results", ("hits", "queries")), ("snapshots", ("train", "validation", "test"))):
        left = [row for kind in kinds for row in rows(lake / folder, kind)]
        assert left and continued.forgotten not in {row["patient_id"] for row in left}
