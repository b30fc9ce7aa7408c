"""Several commands of `cbmir`, one after the other in one process, so that Spark starts once."""

import json
import os
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
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
for arguments, may_fail in json.load(sys.stdin):
    sys.argv, printed, said, status = ["cbmir", *arguments], io.StringIO(), io.StringIO(), 0
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(said):
            runpy.run_module("cbmir_spark", run_name="__main__")
    except SystemExit as error:
        status = error.code or 0
    finally:
        sys.stderr.write(said.getvalue())
    ended.append((status, said.getvalue() if status else printed.getvalue()))
    if status and not may_fail:
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
    refused: Collection[str] = (),
) -> dict[str, Any]:
    """Run commands with `--json` in the folder `cwd`; what each prints, by its name.

    Fails where one of them fails. Those named in `refused` have to fail: of them it is what they say on stderr.
    """
    ran = subprocess.run(
        [str(python), "-c", _CHAIN],
        input=json.dumps([(list(command), name in refused) for name, command in commands.items()]),
        cwd=cwd,
        env={**inherited(), "PYTHONPATH": str(REPO), **(environment or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    ended = json.loads((cwd / "ended.json").read_text())
    assert [status != 0 for status, _ in ended] == [name in refused for name in commands], ran.stderr
    found = {name: text for name, (_, text) in zip(commands, ended, strict=True)}
    return {name: text if name in refused else json.loads(text.splitlines()[-1]) for name, text in found.items()}
