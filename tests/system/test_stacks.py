"""What one stack of dependencies writes, the other reads: lakes, indexes, answers, models and snapshots, both ways.

The stacks are the two environments that `make setup` and `make setup STACK=oldest` create in the checkout.
"""

import csv
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pydicom
import pytest
from deltalake import DeltaTable

from cbmir_spark.lake import columns as cols
from cbmir_spark.synthetic.archive import write_demo_archive
from cbmir_spark.synthetic.phantoms import CLASSES
from tests.conftest import REPO
from tests.support import chain
from tests.support.tools import INHERITED

pytestmark = [pytest.mark.more, pytest.mark.timeout(1800)]

STACKS = {"current": REPO / ".venv" / "bin" / "python", "oldest": REPO / ".venv-oldest" / "bin" / "python"}
# Embedding is floating-point arithmetic of torch, and projections are of numpy's BLAS: the product's own tolerance.
TOLERANCE = 1e-5
KEY = {"CBMIR_PRIVACY__KEY": "a key that both stacks share, of 32 characters or more"}
FIT = [
    "--preset=alexnet-small",
    "--set=dataset.min_images=3",
    "--set=dataset.validation_fraction=0",
    "--set=training.epochs=1",
    "--set=training.batch_size=8",
    "--set=training.seed=5",
]
SEARCH = ["--k=5", "--prefilter=none", "--set=retrieval.gallery=0"]


@dataclass(frozen=True)
class Written:
    """A stack's own lake, and what its commands printed and answered."""

    stack: str
    folder: Path
    printed: Mapping[str, Any]

    @property
    def model(self) -> str:
        return str(self.printed["index"]["model_id"])

    def table(self, name: str) -> pa.Table:
        return DeltaTable(str(self.folder / "lake" / name)).to_pyarrow_table()

    def hits(self, answer: str) -> list[dict[str, Any]]:
        files = sorted((self.folder / answer / "hits").glob("*.parquet"))
        rows = [row for file in files for row in pq.ParquetFile(file).read().to_pylist()]
        return sorted(rows, key=lambda row: (row[cols.QUERY_ID], row[cols.RANK]))


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for stack, python in STACKS.items():
        if not python.exists():
            reason = f"the environment of stack {stack} is missing: make setup STACK={stack}"
            if os.environ.get(INHERITED) == "1":
                pytest.fail(reason, pytrace=False)
            pytest.skip(reason)
    return write_demo_archive(tmp_path_factory.mktemp("archive") / "archive", 12, 3, CLASSES[:3]).folder


@pytest.fixture(scope="module")
def written(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Written]:
    """Each stack ingests the archive, trains, indexes and answers in a lake of its own."""
    phantoms = [path for path in sorted(archive.rglob("*.dcm")) if "phantom" in str(path)][::4]
    assert len(phantoms) >= 6
    uids = [str(pydicom.dcmread(path, stop_before_pixels=True).SOPInstanceUID) for path in phantoms]
    found = {}
    for stack, python in STACKS.items():
        folder = tmp_path_factory.mktemp(stack)
        with (folder / "queries.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["query_id", "sop_instance_uid", "uri"])
            rows.writerows([f"uid-{number}", uid, ""] for number, uid in enumerate(uids))
            rows.writerows([f"file-{number}", "", str(path)] for number, path in enumerate(phantoms))
        commands = {
            "ingest": ["ingest", f"--archive={archive}"],
            "train": ["train", *FIT],
            "index": ["index"],
            "answer": ["retrieve", "--queries=queries.csv", "--out=answer", *SEARCH],
        }
        found[stack] = Written(stack, folder, run(python, folder, commands))
    return found


@pytest.fixture(scope="module")
def continued(archive: Path, written: dict[str, Written]) -> dict[str, dict[str, Any]]:
    """By the stack that wrote: what the other one printed in its lake, and then the writer itself again."""
    more = archive.parent / "more"
    more.mkdir()
    image = pydicom.dcmread(next(path for path in sorted(archive.rglob("*.dcm")) if "phantom" in str(path)))
    image.SOPInstanceUID = image.file_meta.MediaStorageSOPInstanceUID = "2.25.77"
    image.save_as(more / "new.dcm")
    found = {}
    for stack, writer in written.items():
        other = next(name for name in STACKS if name != stack)
        commands = {
            "verify": ["verify"],
            "answer": ["retrieve", "--queries=queries.csv", "--out=answer-of-other", *SEARCH],
            "ingest nothing": ["ingest", f"--archive={archive}"],
            "index nothing": ["index", "--model=models:/cbmir@champion"],
            "ingest more": ["ingest", f"--archive={more}"],
            "index more": ["index", "--model=models:/cbmir@champion"],
            "evaluate": ["evaluate"],
            "train": ["train", *FIT],
        }
        printed = run(STACKS[other], writer.folder, commands)
        again = {
            "verify again": ["verify"],
            "answer again": ["retrieve", "--queries=queries.csv", "--out=answer-again", *SEARCH],
        }
        found[stack] = printed | run(STACKS[stack], writer.folder, again)
    return found


def run(python: Path, folder: Path, commands: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    options = [f"--lake={folder / 'lake'}", "--json", *chain.QUICK]
    given = {name: [*command, *options] for name, command in commands.items()}
    return chain.run(given, folder, python=python, environment=KEY, timeout=900)


def in_order(table: pa.Table) -> list[dict[str, Any]]:
    order = [(name, "ascending") for name in (cols.URI, cols.IMAGE_ID, cols.FRAME) if name in table.column_names]
    return table.select(sorted(table.column_names)).sort_by(order).to_pylist()  # type: ignore[no-any-return]


def test_the_stacks_are_two(written: dict[str, Written]) -> None:
    code = "import numpy, pandas, pyarrow, pyspark; print(*(m.__version__ for m in (numpy, pandas, pyarrow, pyspark)))"
    versions = {
        stack: subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.split()
        for stack, python in STACKS.items()
    }
    assert all(old != new for old, new in zip(versions["oldest"], versions["current"], strict=True)), versions


@pytest.mark.parametrize("name", ["tags", "pixels", "vault/sources"])
def test_one_archive_gives_the_same_rows(written: dict[str, Written], name: str) -> None:
    """Byte for byte: nothing here is floating-point arithmetic of a library, but for what codecs round."""
    current, oldest = (in_order(written[stack].table(name)) for stack in ("current", "oldest"))
    assert len(current) == len(oldest) > 30
    assert current == oldest


@pytest.mark.parametrize("name", ["tags", "pixels", "vault/sources", "runs"])
def test_tables_have_the_same_protocol(written: dict[str, Written], name: str) -> None:
    """A newer Delta must not write what an older one cannot read."""
    current, oldest = (DeltaTable(str(written[stack].folder / "lake" / name)).protocol() for stack in STACKS)
    assert current == oldest


def test_snapshots_are_the_same_files(written: dict[str, Written]) -> None:
    current, oldest = (
        {path.name: path.read_bytes() for path in (written[stack].folder / "lake" / "snapshots").rglob("manifest.json")}
        for stack in ("current", "oldest")
    )
    assert current.keys() == oldest.keys() and len(current) == 1


@pytest.mark.parametrize("writer", STACKS)
def test_the_other_stack_finds_the_index_whole_and_gives_the_same_answer(
    written: dict[str, Written], continued: dict[str, dict[str, Any]], writer: str
) -> None:
    lake, printed = written[writer], continued[writer]
    assert printed["verify"]["model_id"] == lake.model
    assert printed["verify"]["rows"] == lake.printed["index"]["rows"]
    assert same_answer(lake.hits("answer"), lake.hits("answer-of-other"))


@pytest.mark.parametrize("writer", STACKS)
def test_the_other_stack_goes_on_in_the_lake(
    written: dict[str, Written], continued: dict[str, dict[str, Any]], writer: str
) -> None:
    lake, printed = written[writer], continued[writer]
    assert printed["ingest nothing"]["outcomes"] == {}
    assert (printed["index nothing"]["embedded"], printed["index nothing"]["deleted"]) == (0, 0)
    assert printed["ingest more"]["outcomes"] == {"ingested": 1}
    assert printed["index more"]["embedded"] == 1
    assert printed["index more"]["model_id"] == lake.model
    assert printed["evaluate"]["model_id"] == lake.model
    assert printed["verify again"]["rows"] == lake.printed["index"]["rows"] + 1
    # The new image is a copy of an indexed one, so that hits are not those of before: the statuses are.
    assert printed["answer again"]["statuses"] == lake.printed["answer"]["statuses"]


@pytest.mark.parametrize("writer", STACKS)
def test_a_model_of_one_stack_embeds_alike_on_the_other(
    written: dict[str, Written], continued: dict[str, dict[str, Any]], writer: str
) -> None:
    """The image that the other stack embedded is a copy of one that the writer embedded."""
    assert continued[writer]["index more"]["embedded"] == 1
    rows = written[writer].table(f"features/{written[writer].model}").to_pylist()
    (new,) = (row for row in rows if row[cols.PIXELS_BATCH] == max(each[cols.PIXELS_BATCH] for each in rows))
    same = (cols.PIXEL_DIGEST, cols.MODALITY)
    copies = [(row, new) for row in rows if row is not new and all(row[name] == new[name] for name in same)]
    assert copies
    for one, two in copies:
        first, second = (np.asarray(row[cols.VECTOR], np.float64) for row in (one, two))
        assert np.linalg.norm(first - second) <= TOLERANCE * np.linalg.norm(first)
        assert one[cols.PREDICTED] == two[cols.PREDICTED]


@pytest.mark.parametrize("writer", STACKS)
def test_a_snapshot_of_one_stack_trains_on_the_other(
    written: dict[str, Written], continued: dict[str, dict[str, Any]], writer: str
) -> None:
    folders = [path for path in (written[writer].folder / "lake" / "snapshots").iterdir() if path.is_dir()]
    assert continued[writer]["train"]["model_id"]
    # The new image made a second snapshot, which the other stack wrote.
    assert len(folders) == 2


def same_answer(one: list[dict[str, Any]], two: list[dict[str, Any]]) -> bool:
    names = (cols.QUERY_ID, cols.RANK, cols.IMAGE_ID, cols.FRAME)
    assert one and [[row[name] for name in names] for row in one] == [[row[name] for name in names] for row in two]
    largest = max(row[cols.DISTANCE] for row in one)
    differences = [abs(a[cols.DISTANCE] - b[cols.DISTANCE]) for a, b in zip(one, two, strict=True)]
    assert max(differences) <= TOLERANCE * largest, max(differences)
    return True
