"""Ingest, index and retrieve on both stacks, in turn: medians of the job's own seconds, and their ratio.

Each round starts a process per stack, which ingests a demo archive into a new lake, indexes it with one model and
answers a list of its images, and then does the same once more with another lake: the first pass mostly shows how Spark
starts, since its classes are loaded and compiled then, and the second how it works. The model is trained once, on the
current stack. `make bench-stacks`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.benchmarks.common import REPO, keep, tell

STACKS = {"current": REPO / ".venv" / "bin" / "python", "oldest": REPO / ".venv-oldest" / "bin" / "python"}

ROUND = """
import json, sys, time, warnings
warnings.simplefilter("ignore")
import cbmir_spark as cbmir
folder, archive, model, count = sys.argv[1:5]
seconds = {}

def timed(name, function):
    started = time.perf_counter()
    done = function()
    seconds[name] = time.perf_counter() - started
    return done

for number in ("first", "second"):
    lake = cbmir.open(f"{folder}-{number}", **{"retrieval.gallery": 0})
    if number == "first":
        timed("start", lambda: lake._spark("start"))
    timed(f"{number} ingest", lambda: lake.ingest(archive))
    timed(f"{number} index", lambda: lake.index(model=model))
    rows = lake.features(model).select("image_id").distinct().orderBy("image_id").limit(int(count)).collect()
    ids = [row[0] for row in rows]
    timed(f"{number} retrieve", lambda: lake.search(ids, model=model, prefilter="none"))
json.dump(seconds, sys.stdout)
"""
BLAS = """
import json, numpy, sys, threadpoolctl
numpy.ones((2, 2)) @ numpy.ones((2, 2))
names = ("pyspark", "pyarrow", "numpy", "pandas", "torch")
import importlib.metadata as m
blas = next(each for each in threadpoolctl.threadpool_info() if each["user_api"] == "blas")
found = {key: blas[key] for key in ("internal_api", "version", "architecture", "num_threads")}
json.dump({"blas": found} | {n: m.version(n) for n in names}, sys.stdout)
"""


def run(python: Path, code: str, *arguments: str) -> Any:
    command = [str(python), "-c", code, *arguments]
    done = subprocess.run(
        command, cwd=REPO, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(REPO)}
    )
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def train(folder: Path, archive: Path) -> str:
    code = """
import json, sys, warnings
warnings.simplefilter("ignore")
import cbmir_spark as cbmir
lake = cbmir.open(sys.argv[1])
lake.ingest(sys.argv[2])
report = lake.train(preset="alexnet-small", epochs=1)
lake.index()
lake.close()
json.dump(report.model_id, sys.stdout)
"""
    return str(folder / "models" / run(STACKS["current"], code, str(folder), str(archive)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=60, help="phantoms of each of ten classes")
    parser.add_argument("--queries", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=5)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        archive = Path(scratch) / "archive"
        code = (
            "import json, sys\nfrom cbmir_spark.synthetic.archive import write_demo_archive\n"
            "print(json.dumps(write_demo_archive(sys.argv[1], int(sys.argv[2]), 7).files))"
        )
        files = run(STACKS["current"], code, str(archive), str(chosen.images))
        model = train(Path(scratch) / "trained", archive)
        seconds: dict[str, list[dict[str, float]]] = {stack: [] for stack in STACKS}
        for number in range(chosen.rounds):
            for stack, python in STACKS.items():
                lake = Path(scratch) / f"{stack}-{number}"
                seconds[stack].append(run(python, ROUND, str(lake), str(archive), model, str(chosen.queries)))
                tell(
                    f"round {number + 1}, {stack}: " + ", ".join(f"{k} {v:.2f}" for k, v in seconds[stack][-1].items())
                )
    medians = {
        stack: {step: round(statistics.median(each[step] for each in rounds), 2) for step in rounds[0]}
        for stack, rounds in seconds.items()
    }
    ratios = {step: round(medians["current"][step] / medians["oldest"][step], 3) for step in medians["current"]}
    keep(
        "current stack beside the oldest",
        {
            "input": {"files": files, "queries": chosen.queries, "rounds": chosen.rounds},
            "stacks": {stack: run(python, BLAS) for stack, python in STACKS.items()},
            "median seconds": medians,
            "current/oldest": ratios,
            "rounds": seconds,
        },
    )
    tell(f"current/oldest: {ratios}")


if __name__ == "__main__":
    main()
