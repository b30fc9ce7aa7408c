"""What Spark starts on each executor to fork Python workers from: its own daemon, with a shorter path.

Spark puts itself on the workers' path as archives, and before each task Python reads the directories of all archives on
it anew, some of thousands of entries: 60 ms of a task that may take 20. Where pyspark is installed besides, as in our
images and in a virtual environment, workers import that one and never look into an archive.
"""

import gc
import sys
from importlib.machinery import PathFinder


def without_archives(path: list[str]) -> list[str]:
    """The entries of a path that are no archives; all of them where pyspark is found in archives alone."""
    kept = [entry for entry in path if not entry.endswith((".zip", ".jar"))]
    return kept if PathFinder.find_spec("pyspark", kept) else path


if __name__ == "__main__":
    sys.path[:] = without_archives(sys.path)
    sys.path_importer_cache.clear()

    from pyspark.daemon import manager

    # Workers are collected for garbage after each task; what they are born with need not be looked at.
    gc.freeze()
    manager()  # type: ignore[no-untyped-call]
