"""A driver that searches a made-up index; hits as JSON.

python -m tests.support.search_job MASTER FOLDER SEED ASKED
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from pyspark.sql import SparkSession

from cbmir_spark import config
from cbmir_spark.retrieval import search
from cbmir_spark.spark import session
from tests.support.search_oracle import DIMENSION, MODES, collected, make, mixed, options
from tests.support.series_oracle import answered, ask_series


def searched(spark: SparkSession, folder: Path, seed: int, asked: int) -> dict[str, list[Any]]:
    """Hits of `asked` random queries in every mode, by bounds and by scan; and of a few series."""
    made, queries = mixed(seed, rows=700, asked=asked)
    base = made.store(folder / "images", 3)
    found: dict[str, list[Any]] = {}
    for number, values in enumerate(MODES):
        for method in ("bounds", "scan"):
            answer = search.search(spark, base, queries, options(method=method, **values))
            found[f"{method} {number}"] = collected(answer)
    series = make(np.random.default_rng(seed).standard_normal((300, DIMENSION)).astype(np.float32), seed)
    wanted, _ = ask_series(series, 8, seed)
    chosen = options(prefilter="none", unknown="include", k=5)
    hits, _ = answered(spark, series.store(folder / "series", 2), series, wanted, chosen)
    found["series"] = hits
    return json.loads(json.dumps(found))  # type: ignore[no-any-return]


def main() -> None:
    master, folder, seed, asked = sys.argv[1:]
    settings = config.load(overrides=[f"spark.master={master}"], environ={})
    spark = session.build(settings, "search")
    found = searched(spark, Path(folder), int(seed), int(asked))
    spark.stop()
    Path(folder, "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
