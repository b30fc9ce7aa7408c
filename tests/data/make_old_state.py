"""The recipe of old_state.tar.xz and old_state.json; see README.md beside it. It runs with the code of commit ab03e90:

    git worktree add /tmp/old ab03e90
    PYTHONPATH=/tmp/old python tests/data/make_old_state.py

Every step is a command of that version's command line, but for two interventions, which leave all formats as they are:
most units of the network are switched off before it is trained, so that its weights compress to almost nothing; and the
second training is killed after a checkpoint.

Paths begin with /proc/self/cwd, so that whoever works in the unpacked folder finds everything where the tables and
MLflow's database say it is.
"""

import csv
import hashlib
import io
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable
from contextlib import redirect_stdout
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from PIL import Image

HERE = Path(__file__).parent
ROOT = "/proc/self/cwd"
LAKE = [f"--lake={ROOT}/lake"]
SPARK = [
    "--set=spark.master=local[2]",
    "--set=spark.conf.spark.sql.shuffle.partitions=2",
    "--set=spark.conf.spark.databricks.delta.snapshotPartitions=2",
    "--set=spark.conf.spark.driver.extraJavaOptions=-XX:TieredStopAtLevel=1 -XX:+UseSerialGC",
]
INGEST = [f"--archive={ROOT}/archive", "--set=privacy.identity=true"]
TRAIN = ["--set=dataset.min_images=4", "--set=dataset.rows_per_group=8", "--set=training.batch_size=8"]
STOPPED = ["--set=training.epochs=3", "--set=training.checkpoint_steps=2", "--set=training.seed=2"]
STOP_AFTER_STEP = 6

CLASSES = {"CT": ("CHEST", "HEAD"), "MR": ("HEAD", "KNEE")}
PATIENTS, IMAGES = 5, 2
# Units of each layer that learn.
ALIVE = 16
K = 5
# Distances of neighbouring ranks differ by this share at least: processors may differ in their last digits.
LEAST_GAP = 1e-3


def picture(modality: str, body_part: str, patient: int, image: int) -> NDArray[np.uint8]:
    """(256, 256) uint8 of few gray values: stripes of the class, a box of the patient, a disc of the image."""
    label = hashlib.sha256(f"{modality}/{body_part}".encode()).digest()
    random = np.random.default_rng(int.from_bytes(label[:4], "big") + 100 * patient + image)
    y, x = np.mgrid[0:256, 0:256]
    angle, width = label[0] / 40.0, 8.0 + label[1] % 24
    phase = random.uniform(0, 6)
    drawn = np.where(np.sin((y * np.cos(angle) + x * np.sin(angle)) / width + phase) > 0, 170, 50)
    top, left = 20 + 17 * patient, 30 + 11 * patient
    drawn[top : top + 40, left : left + 70] = 110 + 20 * patient
    centre = random.uniform(60, 196, 2)
    drawn[np.hypot(y - centre[0], x - centre[1]) < 18 + 8 * image] = 240
    return drawn.astype(np.uint8)


def draw(work: Path) -> None:
    """The pictures and their labels, as `cbmir wrap` takes them."""
    rows = []
    for modality, parts in CLASSES.items():
        for part in parts:
            for patient in range(PATIENTS):
                for image in range(IMAGES):
                    name = f"{modality}-{part}-{patient}-{image}.png"
                    (work / "pictures").mkdir(exist_ok=True)
                    Image.fromarray(picture(modality, part, patient, image)).save(work / "pictures" / name)
                    rows.append((name, modality, part, f"P-{modality}-{part}-{patient}", name, "drawn", "CC0"))
    with (work / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [("file", "modality", "body_part", "group", "source_id", "dataset", "licence"), *rows]
        )


def cbmir(*arguments: str) -> dict[str, Any]:
    """Run a command in this process; its JSON."""
    sys.argv = ["cbmir", *arguments, "--json"]
    printed = io.StringIO()
    try:
        with redirect_stdout(printed):
            runpy.run_module("cbmir_spark", run_name="__main__")
    except SystemExit as ended:
        if ended.code:
            raise
    found: dict[str, Any] = json.loads(printed.getvalue().splitlines()[-1])
    return found


def switch_units_off() -> None:
    """Leave ALIVE units in each layer; the gradients of the others are exactly 0, and so their optimiser's state."""
    from cbmir_spark import networks, training

    whole = networks.build

    def build(preset: str, classes: int) -> networks.Network:
        network = whole(preset, classes)
        with torch.no_grad():
            for module in network.modules():
                if isinstance(module, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d):
                    module.weight[ALIVE:] = 0.0
                    module.bias[ALIVE:] = 0.0
            inputs = 1
            for module in network.features:
                if isinstance(module, torch.nn.Conv2d):
                    module.weight[ALIVE:] = 0.0
                    module.weight[:, inputs:] = 0.0
                    inputs = ALIVE
            first, second = network.fc1[0], network.fc2[0]
            side = first.in_features // network.features[-4].out_channels
            first.weight[ALIVE:] = 0.0
            first.weight[:, ALIVE * side :] = 0.0
            second.weight[ALIVE:] = 0.0
            second.weight[:, ALIVE:] = 0.0
            network.fc3.weight[:, ALIVE:] = 0.0
        return network

    training.build = build  # type: ignore[assignment]


def stop_after(steps: int) -> None:
    """Kill this process and its JVM as soon as a checkpoint of so many steps is written."""
    from cbmir_spark import checkpoints

    write = checkpoints.Folder.write

    def armed(self: checkpoints.Folder, checkpoint: Any) -> None:
        write(self, checkpoint)
        if checkpoint.position["steps"] >= steps:
            os.killpg(0, signal.SIGKILL)

    checkpoints.Folder.write = armed  # type: ignore[method-assign]


def queries(work: Path) -> None:
    """Images named by id, by UID and by file; one that is not there; series by one of their images and by UID."""
    import pydicom

    def uids(name: str) -> Any:
        return pydicom.dcmread(work / "archive" / f"{name}.png.dcm", stop_before_pixels=True)

    found = pq.read_table(sorted((work / "lake" / "tags").rglob("*.parquet"))[0], columns=["image_id"])
    images = [("uid", uids("CT-HEAD-2-1").SOPInstanceUID), ("uid-mr", uids("MR-KNEE-4-0").SOPInstanceUID)]
    by_id = sorted(found["image_id"].to_pylist())[:3]
    rows = [(f"id-{n}", "", image, "") for n, image in enumerate(by_id)]
    rows += [(name, "", "", uid) for name, uid in images]
    rows += [(f"file-{n}", f"{ROOT}/archive/{n}.png.dcm", "", "") for n in ("CT-CHEST-0-0", "MR-HEAD-3-1")]
    rows += [("missing", "", "0" * 32, "")]
    for name, columns, lines in (
        ("queries.csv", ("query_id", "uri", "image_id", "sop_instance_uid"), rows),
        (
            "series.csv",
            ("query_id", "series_instance_uid", "sop_instance_uid"),
            [
                ("series", uids("CT-CHEST-3-0").SeriesInstanceUID, ""),
                ("by-image", "", uids("MR-HEAD-2-0").SOPInstanceUID),
            ],
        ),
    ):
        with (work / name).open("w", newline="") as file:
            csv.writer(file).writerows([columns, *lines])


def answers(folder: Path) -> dict[str, Any]:
    """Hits up to rank K and statuses below a results folder, in the order of queries and ranks."""
    hits = pq.read_table(folder / "hits").select(["query_id", "rank", "distance", "image_id", "series_id"]).to_pylist()
    statuses = pq.read_table(folder / "statuses").select(["query_id", "status", "candidates"]).to_pylist()
    hits.sort(key=lambda hit: (hit["query_id"], hit["rank"]))
    for near, far in pairwise(hits):
        if near["query_id"] == far["query_id"]:
            assert far["distance"] > (1 + LEAST_GAP) * near["distance"] > 0, (near, far)
    return {
        "hits": [hit for hit in hits if hit["rank"] <= K],
        "statuses": sorted(statuses, key=lambda status: status["query_id"]),
    }


def make(work: Path) -> dict[str, Any]:
    """Every command of the old version in its turn; what the test compares with."""
    os.chdir(work)
    draw(work)
    cbmir("wrap", "--images=pictures", "--labels=labels.csv", "--archive=archive")
    later = Path("archive/CT-HEAD-4-1.png.dcm")
    content = later.read_bytes()
    later.unlink()
    Path("archive/duplicate.dcm").write_bytes(Path("archive/CT-HEAD-0-0.png.dcm").read_bytes())
    Path("archive/truncated.dcm").write_bytes(Path("archive/MR-HEAD-0-0.png.dcm").read_bytes()[:900])
    Path("archive/notes.txt").write_text("no DICOM")
    settle(work)
    cbmir("ingest", *LAKE, *INGEST, "--set=ingest.max_files_per_batch=25", *SPARK)
    later.write_bytes(content)
    settle(work)
    cbmir("ingest", *LAKE, *INGEST, *SPARK)
    cbmir("forget", "--patient=P-MR-KNEE-1", "--now", *LAKE, *SPARK)
    switch_units_off()
    trained = cbmir("train", "--preset=alexnet-small", *TRAIN, "--set=training.epochs=40", *LAKE, *SPARK)
    stopped = subprocess.run(
        [sys.executable, __file__, "--stopped", str(work)], env=os.environ, start_new_session=True, check=False
    )
    assert stopped.returncode == -signal.SIGKILL, stopped.returncode
    (checkpoint, *_) = sorted(Path("lake/training").rglob("*.safetensors"))[::-1]
    indexed = cbmir("index", *LAKE, *SPARK)
    queries(work)
    found = {}
    for level in ("image", "series"):
        name = "queries.csv" if level == "image" else "series.csv"
        asked = ["retrieve", f"--queries={name}", f"--level={level}", f"--k={K + 1}", "--prefilter=none"]
        report = cbmir(*asked, *LAKE, *SPARK)
        found[level] = answers(Path(report["out"].removeprefix("file://")))
    evaluated = cbmir("evaluate", *LAKE, *SPARK)
    again = cbmir("ingest", *LAKE, *INGEST, *SPARK)
    assert again["unchanged"] == again["listed"]
    cbmir("verify", *LAKE, *SPARK)
    runs = cbmir("runs", *LAKE)
    for left in ("pictures", "labels.csv", "spark-warehouse"):
        shutil.rmtree(left) if Path(left).is_dir() else Path(left).unlink(missing_ok=True)
    # Made for those who serve models by MLflow, and full of the paths of the machine that made it.
    for served in Path("lake/mlflow").rglob("model.pt2"):
        served.unlink()
    return {
        "listed": again["listed"],
        "batches": again["published"]["batch"],
        "trained": {name: trained[name] for name in ("model_id", "snapshot", "run_id")},
        "validation_map": trained["ranking"]["mean_average_precision"],
        "checkpoint": position(checkpoint),
        "indexed": {name: indexed[name] for name in ("model_id", "version", "rows", "files")},
        "answers": found,
        "evaluated": {name: evaluated[name] for name in ("queries", "patients", "accuracy", "macro_f1")},
        "average_precision": {mode: each["average_precision"] for mode, each in evaluated["retrieval"].items()},
        "runs": [
            {name: run[name] for name in ("run_id", "status", "parameters", "model_id", "aliases")} for run in runs
        ],
    }


def position(checkpoint: Path) -> dict[str, Any]:
    content = checkpoint.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    found: dict[str, Any] = json.loads(header["__metadata__"]["position"])
    return {"folder": checkpoint.parent.name, "steps": found["steps"], "epochs": found["epochs"]}


def settle(work: Path) -> None:
    """Whole seconds for the times of files, since archives of files keep no more than that everywhere."""
    for number, path in enumerate(sorted((work / "archive").iterdir())):
        os.utime(path, (1_700_000_000 + number,) * 2)


def pack(work: Path, target: Path, paths: Iterable[Path]) -> None:
    """Pack paths below a folder."""

    def anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.uid = member.gid = 0
        member.uname = member.gname = ""
        return member

    with tarfile.open(target, "w:xz", preset=9) as archive:
        for path in paths:
            archive.add(path, str(path.relative_to(work)), filter=anonymous)


def main() -> None:
    if sys.argv[1:2] == ["--stopped"]:
        os.chdir(sys.argv[2])
        switch_units_off()
        stop_after(STOP_AFTER_STEP)
        cbmir("train", "--preset=alexnet-small", *TRAIN, *STOPPED, *LAKE, *SPARK)
        raise AssertionError("the training was to be killed")
    with tempfile.TemporaryDirectory() as folder:
        expected = make(Path(folder))
        pack(Path(folder), HERE / "old_state.tar.xz", sorted(Path(folder).iterdir()))
    (HERE / "old_state.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main()
