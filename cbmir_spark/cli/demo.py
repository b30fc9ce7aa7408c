"""The whole path on a drawn archive: archive → ingest → train → index → retrieve → evaluate, in one folder.

It calls the Python API as a user would, step by step, and returns what each step reported.
"""

import csv
import io
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyspark.sql import functions as F

from cbmir_spark import storage
from cbmir_spark.api import Lake
from cbmir_spark.config import Settings
from cbmir_spark.errors import InputError
from cbmir_spark.evaluation import job as evaluation_job
from cbmir_spark.index import job as index_job
from cbmir_spark.ingest import job as ingest_job
from cbmir_spark.lake import columns as cols
from cbmir_spark.lake.paths import LakePaths
from cbmir_spark.retrieval import job as retrieval_job
from cbmir_spark.storage import ObjectStore
from cbmir_spark.synthetic import archive as synthetic_archive
from cbmir_spark.training import job as training_job
from cbmir_spark.training.manifest import LABEL, MANIFEST, TEST, Snapshot

STEPS = ("archive", "ingest", "train", "index", "retrieve", "evaluate")
QUERIES_FILE = "queries.csv"

# Test images of each class that become queries.
_QUERIES_PER_CLASS = 2

Progress = Callable[[str, int, int, Mapping[str, Any]], None]
"""Called with a step (one of STEPS), how much of it is done, the total (0: unknown), and figures."""


@dataclass(frozen=True)
class Story:
    """The report of each step, where the pages are, and how to look at the run."""

    folder: str
    lake: str
    archive: synthetic_archive.Archive
    ingest: ingest_job.Report
    training: training_job.TrainingReport
    index: index_job.Report
    retrieval: retrieval_job.Report
    evaluation: evaluation_job.Report
    queries: str
    gallery: str | None
    mlflow_command: str
    seconds: Mapping[str, float]

    @property
    def ingested_again(self) -> bool:
        """Whether an object of an existing archive was read twice, which it never should be."""
        return not self.archive.created and any(self.ingest.outcomes.values())


def inside(settings: Settings) -> Settings:
    """Put lake, vault, archive, queries and results below `demo.folder`.

    Raises InputError where that lies in object storage.
    """
    folder = storage.canonical(settings.demo.folder)
    if not storage.is_local(folder):
        raise InputError(f"demo.folder {folder}: the demo draws its archive on this machine; give a local folder")
    return settings.override(
        {
            "lake": {"uri": storage.join(folder, "lake"), "vault": None},
            "ingest": {"archive": storage.join(folder, "archive")},
            "index": {"model": None},
            "retrieval": {"model": None, "queries": storage.join(folder, QUERIES_FILE), "out": None},
            "evaluation": {"out": None},
        }
    )


def run(lake: Lake, progress: Progress = lambda step, done, total, figures: None) -> Story:
    """Draw the archive where it is missing, then run every job on it; the lake's settings are those of `inside`.

    A second run draws and ingests nothing, and trains and answers again. Raises InputError where the folder holds
    something else.
    """
    settings = lake.settings
    seconds: dict[str, float] = {}
    folder = storage.canonical(settings.demo.folder)
    with _step("archive", seconds, progress):
        archive = synthetic_archive.write_demo_archive(
            Path(storage.local_path(folder)) / "archive", settings.demo.images_per_class, settings.dataset.seed
        )
        progress("archive", archive.files, archive.files, {"phantoms": archive.phantoms})
    with _step("ingest", seconds, progress):
        ingested = lake.ingest(on_progress=lambda done, total, counts: progress("ingest", done, total, counts))
    with _step("train", seconds, progress):
        trained = lake.train(on_epoch=lambda epoch: progress("train", epoch.number, epoch.of, {"loss": epoch.loss}))
    with _step("index", seconds, progress):
        indexed = lake.index()
    with _step("retrieve", seconds, progress):
        queries = storage.join(folder, QUERIES_FILE)
        ObjectStore(settings.storage).write_bytes(queries, as_csv(query_list(lake, trained.snapshot)))
        answered = lake.search().report
    with _step("evaluate", seconds, progress):
        evaluated = lake.evaluate()
    return Story(
        folder=folder,
        lake=lake.uri,
        archive=archive,
        ingest=ingested,
        training=trained,
        index=indexed,
        retrieval=answered,
        evaluation=evaluated,
        queries=queries,
        gallery=answered.gallery,
        mlflow_command=f"mlflow ui --backend-store-uri {trained.tracking_uri}",
        seconds=seconds,
    )


def query_list(lake: Lake, snapshot: str) -> list[dict[str, str]]:
    """Choose queries as a user might: files of test patients, one image by its id, one file that does not exist.

    Rows have query_id, uri and image_id; one of the last two is empty.
    """
    uri = LakePaths.of(lake.settings.lake).snapshot(snapshot)
    manifest = Snapshot.from_json(ObjectStore(lake.settings.storage).read_bytes(storage.join(uri, MANIFEST)), uri)
    files = [storage.join(uri, file.path) for file in manifest.files[TEST]]
    tested = lake.spark.read.parquet(*files).select(cols.IMAGE_ID, LABEL)
    ingested = lake.sources.where(F.col(cols.OUTCOME) == cols.INGESTED).select(cols.IMAGE_ID, cols.URI)
    found = tested.join(ingested, on=cols.IMAGE_ID, how="inner").orderBy(LABEL, cols.URI)
    by_label: dict[str, list[tuple[str, str]]] = {}
    for row in found.collect():
        by_label.setdefault(row[LABEL], []).append((row[cols.URI], row[cols.IMAGE_ID]))
    rows = []
    for label, images in by_label.items():
        # Far apart in the list, so that they show two patients where there are two.
        for number, (uri, _) in enumerate(images[:: max(1, len(images) - 1)][:_QUERIES_PER_CLASS], start=1):
            query_id = f"{label.lower().replace('/', '-')}-{number}"
            rows.append({cols.QUERY_ID: query_id, cols.URI: uri, cols.IMAGE_ID: ""})
    of_some_label = list(by_label.values())[len(by_label) // 2]
    image_id = of_some_label[len(of_some_label) // 2][1]
    rows.append({cols.QUERY_ID: "by-image-id", cols.URI: "", cols.IMAGE_ID: image_id})
    missing = storage.join(storage.canonical(lake.settings.ingest.archive or ""), "not", "there.dcm")
    rows.append({cols.QUERY_ID: "missing-file", cols.URI: missing, cols.IMAGE_ID: ""})
    return rows


def as_csv(rows: list[dict[str, str]]) -> bytes:
    """Format a query list as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, (cols.QUERY_ID, cols.URI, cols.IMAGE_ID), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode("utf-8")


@contextmanager
def _step(name: str, seconds: dict[str, float], progress: Progress) -> Iterator[None]:
    progress(name, 0, 0, {})
    began = time.monotonic()
    yield
    seconds[name] = time.monotonic() - began
