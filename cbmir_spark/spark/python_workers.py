"""The daemon that forks Python workers on each executor: Spark's daemon, with a shorter module path.

Spark puts itself on the workers' path as archives, and before each task Python reads the directories of all of them
again, some with thousands of entries: 60 ms of a task that may take 20. If pyspark is also installed as a package, as
in our images and in a virtual environment, workers import that and never look into an archive.
"""

import gc
import sys
from importlib.machinery import PathFinder


def without_archives(path: list[str]) -> list[str]:
    """Drop the archives from a module path, unless pyspark is found in archives alone."""
    folders = [entry for entry in path if not entry.endswith((".zip", ".jar"))]
    return folders if PathFinder.find_spec("pyspark", folders) else path


if __name__ == "__main__":
    sys.path[:] = without_archives(sys.path)
    sys.path_importer_cache.clear()

    from pyspark.daemon import manager

    # Workers collect garbage after each task; what they are forked with needs no inspection.
    gc.freeze()
    manager()
