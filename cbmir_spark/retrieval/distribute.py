"""Cut files into tasks and run them."""

import heapq
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

from pyspark import Broadcast
from pyspark.sql import SparkSession

from cbmir_spark.config import RetrievalSettings
from cbmir_spark.index.vector_files import DataFile
from cbmir_spark.retrieval.tasks import Share

# Files are cut into shares of at least this size: opening one again costs its footer.
_SHARE_BYTES = 32 * 2**20

Item = TypeVar("Item")
_Sent = TypeVar("_Sent")
_Result = TypeVar("_Result")


def tasks_of(spark: SparkSession, options: RetrievalSettings) -> int:
    return options.tasks_per_core * spark.sparkContext.defaultParallelism


def shares_of(files: Sequence[DataFile], tasks: int) -> list[list[Share]]:
    """Files cut into shares, which are spread over at most so many tasks by their bytes, biggest first."""
    if not files:
        return []
    size = max(_SHARE_BYTES, sum(file.bytes for file in files) // tasks)
    shares = []
    for file in files:
        count = math.ceil(file.bytes / size)
        shares += [(file.bytes / count, Share(file, part, count)) for part in range(count)]
    loads: list[tuple[float, int]] = [(0.0, number) for number in range(min(tasks, len(shares)))]
    spread: list[list[Share]] = [[] for _ in loads]
    for weight, share in sorted(shares, key=lambda each: -each[0]):
        load, number = heapq.heappop(loads)
        spread[number].append(share)
        heapq.heappush(loads, (load + weight, number))
    # Rows come in the order of files within a task, so that what a file's lists of queries share is used.
    return [sorted(each, key=lambda share: (share.file.number, share.part)) for each in spread]


def run_tasks(
    spark: SparkSession,
    items: Sequence[Item],
    task: Callable[[Item, _Sent], _Result],
    broadcast: Broadcast[_Sent],
) -> list[_Result]:
    """One task for each item; what they return, in order."""
    if not items:
        return []
    given = spark.sparkContext.parallelize(items, len(items))
    return given.map(lambda each: task(each, broadcast.value)).collect()
