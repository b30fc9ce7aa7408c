"""Content-based retrieval of DICOM images from archives, as distributed Spark jobs.

`open` opens a lake to ingest, train, index and search with; `errors` are what it raises.
"""

import importlib
import logging
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Answer", "Lake", "Query", "errors", "open"]

if TYPE_CHECKING:
    from cbmir_spark import errors
    from cbmir_spark.api import Answer, Lake, open
    from cbmir_spark.retrieval.query_sources import Query

_HOMES = {
    "Answer": "cbmir_spark.api",
    "Lake": "cbmir_spark.api",
    "Query": "cbmir_spark.retrieval.query_sources",
    "open": "cbmir_spark.api",
}

# A library is silent until its user configures logging; see `log`.
logging.getLogger(__name__).addHandler(logging.NullHandler())


def __getattr__(name: str) -> Any:
    """Import the API on first use: Python workers and decoders import this package without it."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name == "errors":
        return importlib.import_module("cbmir_spark.errors")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
