"""The whole path on a drawn archive: archive → ingest → train → index → retrieve → evaluate, in one folder.

Runs on the driver, like a person calling the jobs one after the other; each job's own `run` does the work. Nothing is
printed here: `run` returns the story, and whoever called tells it.
"""

import csv
import io
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from cbmir_spark import storage
from cbmir_spark.config import Settings
from cbmir_spark.errors import InputError
from cbmir_spark.evaluation import job as evaluation_job
from cbmir_spark.index import job as index_job
from cbmir_spark.ingest import job as ingest_job
from cbmir_spark.lake import columns as cols
from cbmir_spark.lake import delta, publication, schemas
from cbmir_spark.lake.paths import LakePaths
from cbmir_spark.retrieval import job as retrieval_job
from cbmir_spark.storage import ObjectStore
from cbmir_spark.synthetic import archive as synthetic_archive
from cbmir_spark.training import job as training_job
from cbmir_spark.training.manifest import LABEL, TEST, Snapshot

STEPS = ("archive", "ingest", "train", "index", "retrieve", "evaluate")
QUERIES_FILE = "queries.csv"

# Of each class this many test images become queries.
_QUERIES_PER_CLASS = 2

Progress = Callable[[str, int, int, Mapping[str, Any]], None]
"""Step (one of STEPS), how much of it is done, of how much in all (0 where that is not known), and figures."""


@dataclass(frozen=True)
class Story:
    """What happened, step by step: each job's own report, where the pages are, and how to look at the run."""

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
        """Whether an object of an archive that was there already was read twice; it never should be."""
        return not self.archive.created and any(self.ingest.outcomes.values())


def run(spark: SparkSession, settings: Settings, progress: Progress | None = None) -> Story:
    """Draw the archive where it is missing, then run every job on it, all below `demo.folder`.

    Run again it draws and ingests nothing, and trains and answers anew. Raises InputError where the folder holds
    something else or lies in object storage.
    """
    tell = progress or (lambda step, done, total, figures: None)
    seconds: dict[str, float] = {}
    folder = storage.canonical(settings.demo.folder)
    if not storage.is_local(folder):
        raise InputError(f"demo.folder {folder}: the demo draws its archive on this machine; give a local folder")
    settings = inside(settings, folder)
    lake = LakePaths.of(settings.lake)

    with _step("archive", seconds, tell):
        archive = synthetic_archive.write_demo_archive(
            Path(storage.local_path(folder)) / "archive", settings.demo.images_per_class, settings.dataset.seed
        )
        tell("archive", archive.files, archive.files, {"phantoms": archive.phantoms})
    with _step("ingest", seconds, tell):
        ingested = ingest_job.run(spark, settings, lambda done, total, counts: tell("ingest", done, total, counts))
    with _step("train", seconds, tell):
        trained = training_job.run(
            spark, settings, lambda epoch: tell("train", epoch.number, epoch.of, {"loss": epoch.loss})
        )
    with _step("index", seconds, tell):
        indexed = index_job.run(spark, settings)
    with _step("retrieve", seconds, tell):
        queries = storage.join(folder, QUERIES_FILE)
        rows = query_list(spark, settings, lake, trained.snapshot)
        ObjectStore(settings.storage).write_bytes(queries, as_csv(rows))
        answered = retrieval_job.run(spark, settings)
    with _step("evaluate", seconds, tell):
        judged = evaluation_job.run(spark, settings)
    return Story(
        folder=folder,
        lake=lake.uri,
        archive=archive,
        ingest=ingested,
        training=trained,
        index=indexed,
        retrieval=answered,
        evaluation=judged,
        queries=queries,
        gallery=answered.gallery,
        mlflow_command=f"mlflow ui --backend-store-uri {trained.tracking_uri}",
        seconds=seconds,
    )


def inside(settings: Settings, folder: str) -> Settings:
    """The same settings with lake, vault, archive, queries and results below the demo's folder."""
    return settings.override(
        {
            "lake": {"uri": storage.join(folder, "lake"), "vault": None},
            "ingest.archive": storage.join(folder, "archive"),
            "index.model": None,
            "retrieval": {"model": None, "queries": storage.join(folder, QUERIES_FILE), "out": None},
            "evaluation.out": None,
        }
    )


def query_list(spark: SparkSession, settings: Settings, lake: LakePaths, snapshot: str) -> list[dict[str, str]]:
    """Queries as somebody would hand them in: files of test patients, one image by its id, one file that is not there.

    Rows of query_id, uri, image_id; one of the last two is empty. Runs on the driver: a snapshot of the demo has
    some seventy test images.
    """
    uri = storage.join(lake.snapshots, snapshot)
    held = Snapshot.from_json(ObjectStore(settings.storage).read_bytes(storage.join(uri, "manifest.json")), uri)
    files = [storage.join(uri, file.path) for file in held.files[TEST]]
    tested = spark.read.parquet(*files).select(cols.IMAGE_ID, LABEL)
    pinned = publication.require_published(spark, lake)
    sources = delta.read(spark, lake.path(schemas.SOURCES), pinned.sources).where(F.col(cols.OUTCOME) == cols.INGESTED)
    found = tested.join(sources.select(cols.IMAGE_ID, cols.URI), on=cols.IMAGE_ID, how="inner").orderBy(LABEL, cols.URI)
    by_label: dict[str, list[tuple[str, str]]] = {}
    for row in found.collect():
        by_label.setdefault(row[LABEL], []).append((row[cols.URI], row[cols.IMAGE_ID]))
    rows = []
    for label, images in by_label.items():
        # Apart from each other, so that two patients are asked about where there are two.
        for number, (uri, _) in enumerate(images[:: max(1, len(images) - 1)][:_QUERIES_PER_CLASS], start=1):
            rows.append(
                {cols.QUERY_ID: f"{label.lower().replace('/', '-')}-{number}", cols.URI: uri, cols.IMAGE_ID: ""}
            )
    of_some_label = list(by_label.values())[len(by_label) // 2]
    rows.append({cols.QUERY_ID: "by-image-id", cols.URI: "", cols.IMAGE_ID: of_some_label[len(of_some_label) // 2][1]})
    missing = storage.join(storage.canonical(settings.ingest.archive or ""), "not", "there.dcm")
    rows.append({cols.QUERY_ID: "missing-file", cols.URI: missing, cols.IMAGE_ID: ""})
    return rows


def as_csv(rows: list[dict[str, str]]) -> bytes:
    """A query list as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, (cols.QUERY_ID, cols.URI, cols.IMAGE_ID), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode("utf-8")


@contextmanager
def _step(name: str, seconds: dict[str, float], tell: Progress) -> Iterator[None]:
    tell(name, 0, 0, {})
    began = time.monotonic()
    yield
    seconds[name] = time.monotonic() - began
