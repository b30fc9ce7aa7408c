"""The two levels of a search behind one protocol: images, and series. Runs on the driver, searches in tasks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cbmir_spark.config import RetrievalSettings
from cbmir_spark.index.open import Index
from cbmir_spark.lake.open import OpenLake
from cbmir_spark.lake.runs import Stages
from cbmir_spark.retrieval import resolve, search, series
from cbmir_spark.retrieval.answer import Answer, Base, Resolved
from cbmir_spark.retrieval.query import QueryRow
from cbmir_spark.retrieval.query_files import Reader
from cbmir_spark.retrieval.series_resolve import resolve_series


@dataclass(frozen=True)
class ImageSearcher:
    """Searches for images. `reader` returns what reads query files; it is called only if a row names one."""

    lake: OpenLake
    index: Index
    base: Base
    options: RetrievalSettings
    stages: Stages
    reader: Callable[[], Reader]

    def answer(self, rows: Sequence[QueryRow]) -> tuple[Resolved, Answer]:
        with self.stages.stage("resolve"):
            resolved = resolve.resolve(self.lake, rows, self.index, self.reader)
        queries = list(resolved.queries.values())
        return resolved, search.search(self.lake.spark, self.base, queries, self.options, self.stages)


@dataclass(frozen=True)
class SeriesSearcher:
    """Searches for series, by their frames."""

    lake: OpenLake
    index: Index
    base: Base
    options: RetrievalSettings
    stages: Stages

    def answer(self, rows: Sequence[QueryRow]) -> tuple[Resolved, Answer]:
        with self.stages.stage("resolve"):
            resolved, volumes = resolve_series(self.lake, rows, self.index, self.base, self.options)
        queries = list(resolved.queries.values())
        return resolved, series.search(self.lake.spark, self.base, queries, volumes, self.options, self.stages)
