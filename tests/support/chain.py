"""Several commands of `cbmir`, one after the other in one process, so that Spark starts once."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.conftest import REPO

# What makes Spark quick on small tables.
QUICK = [
    "--set=spark.master=local[2]",
    "--set=spark.driver_memory=2g",
    "--set=spark.conf.spark.sql.shuffle.partitions=2",
    "--set=spark.conf.spark.databricks.delta.snapshotPartitions=2",
    "--set=spark.conf.spark.sql.codegen.wholeStage=false",
    "--set=spark.conf.spark.sql.codegen.factoryMode=NO_CODEGEN",
    "--set=spark.conf.spark.driver.extraJavaOptions="
    "-XX:TieredStopAtLevel=1 -XX:ReservedCodeCacheSize=240m -XX:+UseSerialGC",
]

_CHAIN = """
import contextlib, io, json, runpy, sys
ended = []
for arguments in json.load(sys.stdin):
    sys.argv, printed, status = ["cbmir", *arguments], io.StringIO(), 0
    try:
        with contextlib.redirect_stdout(printed):
            runpy.run_module("cbmir_spark", run_name="__main__")
    except SystemExit as error:
        status = error.code or 0
    ended.append((status, printed.getvalue()))
    if status:
        break
with open("ended.json", "w") as file:
    json.dump(ended, file)
"""


def inherited() -> dict[str, str]:
    """The environment of this process for a process with another Python.

    A session that runs here names this Python as that of Spark's workers.
    """
    return {name: value for name, value in os.environ.items() if not name.startswith(("SPARK_", "PYSPARK_"))}


def run(
    commands: Mapping[str, Sequence[str]],
    cwd: Path,
    *,
    python: str | Path = sys.executable,
    environment: Mapping[str, str] | None = None,
    timeout: float = 800,
) -> dict[str, Any]:
    """Run commands with `--json` in the folder `cwd`; what each prints, by its name. Fails where one of them fails."""
    ran = subprocess.run(
        [str(python), "-c", _CHAIN],
        input=json.dumps([list(command) for command in commands.values()]),
        cwd=cwd,
        env={**inherited(), "PYTHONPATH": str(REPO), **(environment or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    ended = json.loads((cwd / "ended.json").read_text())
    assert [status for status, _ in ended] == [0] * len(commands), ran.stderr
    return {name: json.loads(text.splitlines()[-1]) for name, (_, text) in zip(commands, ended, strict=True)}
