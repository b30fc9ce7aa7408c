"""`python -m tests.benchmarks.indexing`: embedding by the index job beside the bare model on arrays in memory.

    python -m tests.benchmarks.labelled --preset alexnet --lake FOLDER      # a trained AlexNet, and its pictures
    python -m tests.benchmarks.indexing --lake FOLDER

Both embed every picture of the lake with as many threads as there are cores, in turn. The job's figure is that of its
stage `embed`, which reads PIXELS, embeds in Spark's tasks and looks at every vector; `all stages` has the rest too:
loading the model, comparing, writing, and verifying.
"""

import argparse
import os
import shutil
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from cbmir_spark import config, storage
from cbmir_spark.index import job as index_job
from cbmir_spark.lake.paths import LakePaths
from cbmir_spark.models import embed as embedding
from cbmir_spark.models import weights
from cbmir_spark.models.artifact import MANIFEST_FILE, WEIGHTS_FILE
from cbmir_spark.spark import session
from tests.benchmarks.common import keep, tell
from tests.benchmarks.retrieval import pictures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lake", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=3)
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    folder = next(f for f in sorted((asked.lake / "lake" / "models").glob("alexnet-*")) if "small" not in f.name)
    overrides = [f"lake.uri={asked.lake / 'lake'}", f"index.model={folder}", f"retrieval.model={folder}"]
    settings = config.load(overrides=overrides, environ={})
    spark = session.build(settings, "bench")
    cores = os.cpu_count() or 1
    torch.set_num_threads(cores)
    loaded = weights.load_files(*((folder / name).read_bytes() for name in (WEIGHTS_FILE, MANIFEST_FILE)))
    pixels = pictures(asked.lake)
    table = Path(storage.local_path(LakePaths.of(settings.lake).features(loaded.manifest.model_id)))
    runs: list[dict[str, Any]] = []
    for turn in range(asked.runs + 1):
        start = time.perf_counter()
        embedding.embed_batches(loaded, pixels)
        alone = len(pixels) / (time.perf_counter() - start)
        shutil.rmtree(table)
        report = index_job.run(spark, settings)
        assert report.embedded == len(pixels)
        job = report.embedded / report.seconds["embed"]
        run = {
            "bare model, images/s": round(alone, 1),
            "job, images/s": round(job, 1),
            "ratio": round(job / alone, 3),
            "all stages, s": {name: round(seconds, 1) for name, seconds in report.seconds.items()},
        }
        tell(f"{turn or 'warm'}: {run}")
        # The first turn starts workers and compiles plans.
        if turn:
            runs.append(run)
    spark.stop()
    median = statistics.median(run["ratio"] for run in runs)
    keep("index beside the bare model", {"images": len(pixels), "model": "alexnet", "ratio": median, "runs": runs})


if __name__ == "__main__":
    main()
