"""CPU seconds of an ingest by this checkout and by another one, in turn: the ratio with its 95 % interval.

The archive is copies of the real files that both ingest: what one of them rejects costs it nothing. Each run is
`cbmir ingest` into a new lake in a process of its own. Its CPU seconds are those of the driver, the JVM, Python's
workers and the decoding processes together, which say more than the clock where other work shares the machine.
`python -m tests.benchmarks.checkouts --before DIR`.
"""

import argparse
import ctypes
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from deltalake import DeltaTable

from cbmir_spark import config
from cbmir_spark.ingest.parse import preprocessing_of
from tests.benchmarks.common import REPO, keep, tell
from tests.benchmarks.ingest import CORES, fill

_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER
# Quantiles of Student's t at 97.5 %, by degrees of freedom.
_T = {4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 14: 2.145, 19: 2.093}


def cpu_seconds(checkout: Path, archive: Path, lake: Path) -> float:
    """User and system seconds of one ingest, of every process that it started."""
    arguments = [f"--archive={archive}", f"--lake={lake}", f"--set=spark.master=local[{CORES}]"]
    process = subprocess.Popen(
        [sys.executable, "-m", "cbmir_spark", "ingest", *arguments],
        cwd=archive,
        env=os.environ | {"PYTHONPATH": str(checkout)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    seconds = 0.0
    # The JVM outlives the process that started it for a moment; this process inherits it.
    while True:
        try:
            pid, status, usage = os.wait3(0)
        except ChildProcessError:
            return seconds
        seconds += usage.ru_utime + usage.ru_stime
        if pid == process.pid and status:
            sys.exit(f"the ingest of {checkout} failed")


def remove_rejected(archive: Path, lake: Path) -> None:
    """Delete the objects that an ingest into `lake` did not ingest."""
    sources = DeltaTable(str(lake / "vault" / "sources")).to_pyarrow_table(columns=["uri", "outcome"]).to_pylist()
    for row in sources:
        if row["outcome"] != "ingested":
            Path(row["uri"].removeprefix("file://")).unlink()
    tell(f"{sum(path.is_file() for path in archive.rglob('*'))} objects are left")


def interval(ratios: list[float]) -> tuple[float, float, float]:
    """Geometric mean of paired ratios, and its 95 % interval."""
    logs = [math.log(ratio) for ratio in ratios]
    mean, margin = statistics.mean(logs), _T[len(logs) - 1] * statistics.stdev(logs) / math.sqrt(len(logs))
    return math.exp(mean), math.exp(mean - margin), math.exp(mean + margin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--before", type=Path, required=True, help="another checkout")
    parser.add_argument("--objects", type=int, default=2_000)
    parser.add_argument("--pairs", type=int, default=10, choices=[n + 1 for n in _T])
    asked = parser.parse_args()
    ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)
    checkouts = {"before": asked.before.resolve(), "after": REPO}
    seconds: dict[str, list[float]] = {name: [] for name in checkouts}
    with tempfile.TemporaryDirectory(prefix="cbmir-bench-") as scratch:
        archive, lake = Path(scratch) / "archive", Path(scratch) / "lake"
        filled = fill(archive, asked.objects, preprocessing_of(config.load(environ={}).pixels))
        # One uncounted run of each, after which only what both ingest stays.
        for number in range(asked.pairs + 1):
            for name in sorted(checkouts, reverse=bool(number % 2)):
                found = cpu_seconds(checkouts[name], archive, lake)
                if not number:
                    remove_rejected(archive, lake)
                shutil.rmtree(lake)
                if number:
                    seconds[name].append(round(found, 2))
                tell(f"pair {number}, {name}: {found:.1f} CPU seconds")
        ratios = [after / before for before, after in zip(seconds["before"], seconds["after"], strict=True)]
        mean, low, high = interval(ratios)
        keep(
            "ingest of two checkouts, CPU seconds",
            {
                "input": filled | {"of them ingested by both": sum(path.is_file() for path in archive.rglob("*"))},
                "median CPU seconds": {name: statistics.median(found) for name, found in seconds.items()},
                "after/before": round(mean, 4),
                "95 % interval": [round(low, 4), round(high, 4)],
                "runs": seconds,
            },
        )
        tell(f"after/before {mean:.3f}, 95 % interval {low:.3f} to {high:.3f}")


if __name__ == "__main__":
    main()
