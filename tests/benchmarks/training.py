"""`make bench`: the loader alone, the network alone, and training from the loader beside training from memory.

Each pair runs in turn in one process; results go to results.json here, with their input and machine.
"""

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from PIL import Image

from cbmir_spark import config, storage
from cbmir_spark.lake import columns as cols
from cbmir_spark.models import networks
from cbmir_spark.models.presets import preset_of
from cbmir_spark.storage import ObjectStore
from cbmir_spark.training import allocator, loop
from cbmir_spark.training import loader as training_loader
from cbmir_spark.training.course import Fitting
from cbmir_spark.training.history import Epoch
from cbmir_spark.training.manifest import FORMAT, TARGET, TEST, TRAIN, VALIDATION, DataFile, Snapshot
from tests.benchmarks.common import SHARED, keep, tell

CLASSES = 8
BATCH = 64
ROWS_PER_GROUP = 256


def pictures(images: int) -> tuple[NDArray[np.uint8], str]:
    """(images, 256, 256) uint8: the shared real pictures, over and over; noise, which compresses worse, without."""
    paths = sorted(path for path in (SHARED / "labelled").rglob("*") if path.suffix in (".png", ".jpg", ".jpeg"))
    if not paths:
        return np.random.default_rng(1).integers(0, 256, (images, cols.SIDE, cols.SIDE), dtype=np.uint8), "noise"
    paths = paths[:: max(1, len(paths) // images)][:images]
    real = np.stack([np.asarray(Image.open(path).convert("L").resize((cols.SIDE, cols.SIDE))) for path in paths])
    return np.resize(real, (images, cols.SIDE, cols.SIDE)), f"{len(paths)} real pictures"


def write(folder: Path, pixels: NDArray[np.uint8], targets: NDArray[np.int64]) -> Snapshot:
    """A snapshot whose train split is these rows, laid out as `dataset.snapshot` lays them out by default."""
    schema = pa.schema([(TARGET, pa.int64()), (cols.PIXELS_COLUMN, pa.binary())])
    path = f"{TRAIN}/part-00000.parquet"
    (folder / TRAIN).mkdir(parents=True)
    groups = []
    with pq.ParquetWriter(folder / path, schema, compression="snappy", use_dictionary=False) as writer:
        for start in range(0, len(targets), ROWS_PER_GROUP):
            rows = slice(start, start + ROWS_PER_GROUP)
            columns = [targets[rows], [picture.tobytes() for picture in pixels[rows]]]
            groups.append(len(targets[rows]))
            writer.write_table(pa.table(columns, schema=schema), row_group_size=groups[-1])
    files = (DataFile(path, tuple(groups), "-"),)
    return Snapshot(
        format=FORMAT,
        digest="bench",
        uri=storage.canonical(str(folder)),
        label="body_part",
        classes=tuple(f"C{number}" for number in range(CLASSES)),
        possible={},
        preprocessing="bench",
        images={},
        patients={},
        single_patient_classes=(),
        left_out={},
        versions={},
        files={TRAIN: files, VALIDATION: (), TEST: ()},
    )


class InMemory:
    """torch's own DataLoader over arrays in memory, as `loop.fit` reads it."""

    def __init__(self, pixels: NDArray[np.uint8], targets: NDArray[np.int64]) -> None:
        self._data = torch.utils.data.TensorDataset(torch.from_numpy(pixels), torch.from_numpy(targets))
        self.rows = len(targets)
        self.steps = self.rows // BATCH

    def span(self, step: int) -> tuple[int, int]:
        return 0, BATCH

    def epoch(self, number: int) -> Generator[loop.Batch, None, None]:
        shuffled = torch.Generator().manual_seed(1 + number)
        yield from torch.utils.data.DataLoader(self._data, BATCH, shuffle=True, generator=shuffled)


def loader_alone(loader: training_loader.Loader, rounds: int) -> list[float]:
    speeds = []
    for number in range(rounds):
        began = time.perf_counter()
        rows = sum(len(targets) for _, targets in loader.epoch(number))
        speeds.append(rows / (time.perf_counter() - began))
    return speeds


def fitted(preset: str, source: loop.BatchSource, precision: Any) -> Epoch:
    """The figures of a second epoch: the first one allocates memory and chooses kernels."""
    torch.manual_seed(1)
    recipe = preset_of(preset).recipe
    course = Fitting(
        optimiser=recipe.optimiser,
        learning_rate=1e-4,
        weight_decay=recipe.weight_decay,
        epochs=2,
        class_weights=(1.0,) * CLASSES,
        seed=1,
        momentum=recipe.momentum,
        clip=recipe.clip,
        augment=recipe.augment,
        precision=precision,
    )
    with allocator.retain_freed_memory():
        return loop.fit(networks.build(preset, CLASSES), loop.Loaders(source, None), course).epochs[-1]


def bench(folder: Path, presets: Sequence[str], images: int, rounds: int, precision: str) -> dict[str, Any]:
    pixels, of = pictures(images)
    targets = np.arange(images, dtype=np.int64) % CLASSES
    snapshot = write(folder, pixels, targets)
    loader = training_loader.Loader(
        snapshot, TRAIN, ObjectStore(config.load(environ={}).storage), batch_size=BATCH, seed=1, shuffle=True
    )
    memory = InMemory(pixels, targets)
    alone = loader_alone(loader, 1 + rounds)[1:]
    speed = statistics.median(alone)
    tell(f"loader alone: {speed:.0f} images/s")
    result: dict[str, Any] = {
        "input": {"images": images, "of": of, "batch": BATCH, "rows per group": ROWS_PER_GROUP},
        "threads": torch.get_num_threads(),
        "precision": precision,
        "loader alone, images/s": round(speed, 1),
    }
    for preset in presets:
        runs = []
        for _ in range(rounds):
            from_memory, ours = fitted(preset, memory, precision), fitted(preset, loader, precision)
            runs.append(
                {
                    "from memory, images/s": round(from_memory.images_per_second, 1),
                    "from the loader, images/s": round(ours.images_per_second, 1),
                    "ratio": round(ours.images_per_second / from_memory.images_per_second, 3),
                    "waiting for the loader": round(ours.waiting, 4),
                }
            )
            tell(f"{preset}: {runs[-1]}")
        appetite = statistics.median(run["from memory, images/s"] for run in runs)
        result[preset] = {
            "loader alone / network": round(speed / appetite, 1),
            "ratio, median": statistics.median(run["ratio"] for run in runs),
            "waiting, median": statistics.median(run["waiting for the loader"] for run in runs),
            "runs": runs,
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--presets", nargs="+", default=["alexnet", "alexnet-small", "retrieval"])
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory(prefix="cbmir-bench-") as folder:
        found = bench(Path(folder), asked.presets, asked.images, asked.rounds, asked.precision)
    keep("training from the loader beside training from memory", found)


if __name__ == "__main__":
    main()
