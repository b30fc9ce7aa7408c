"""What the presets reach on the shared labelled pictures: real pixels, label-derived tags, patients never seen.

    python -m tests.benchmarks.labelled --preset alexnet [--set training.precision=bfloat16] [--lake FOLDER]

The pictures are wrapped as DICOM and go through the jobs (ingest, train, index). Figures are then computed here, from
the vectors in the index by numpy, and not by the product: queries are the test patients' pictures, searched in all
others without a prefilter. Means count cells with at least five groups. Medical-MNIST is the only source of its cells,
so a network may have learnt the source there: figures are given without its pictures too.
"""

import argparse
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from pyspark.sql import SparkSession

from cbmir_spark import config, storage
from cbmir_spark.evaluation import job as evaluation_job
from cbmir_spark.evaluation import measures
from cbmir_spark.evaluation import queries as test_queries
from cbmir_spark.index import job as index_job
from cbmir_spark.ingest import job as ingest_job
from cbmir_spark.lake import columns as cols
from cbmir_spark.lake import delta, pseudonyms, publication, schemas
from cbmir_spark.lake.open import open_lake
from cbmir_spark.lake.paths import LakePaths
from cbmir_spark.models import weights
from cbmir_spark.models.registry import CHAMPION, Registry
from cbmir_spark.spark import session
from cbmir_spark.storage import ObjectStore
from cbmir_spark.synthetic import wrap
from cbmir_spark.training import job as training_job
from cbmir_spark.training import manifest, metrics
from tests.benchmarks.common import SHARED, keep, tell
from tests.support.models import open_index

SOURCE = "Medical-MNIST"
K, DEPTH = 10, 1000
LABEL, DATASET, GROUP, TEST, TRUE = "label", "dataset", "group", "test", "true"


def gather(spark: SparkSession, settings: config.Settings) -> tuple[pd.DataFrame, NDArray[np.float32]]:
    """Every picture of the index with its cell, source and side of the split, and their (N, D) float32 vectors."""
    lake = LakePaths.of(settings.lake)
    pinned = publication.require_published(spark, lake)
    index = open_index(spark, settings)
    rows = index.rows.select(cols.IMAGE_ID, cols.PATIENT_ID, cols.VECTOR, cols.PREDICTED).toPandas()
    uris = delta.read(spark, lake.path(schemas.SOURCES), pinned.sources).select(cols.IMAGE_ID, cols.URI).toPandas()
    labels = pd.read_csv(SHARED / "labels.csv")
    labels[LABEL] = labels["modality"].replace("XR", "DX") + "/" + labels["body_part"]
    archive = storage.canonical(str(settings.ingest.archive))
    uris["file"] = uris[cols.URI].str[len(archive) + 1 :].str.removesuffix(".dcm")
    told = rows.merge(uris[[cols.IMAGE_ID, "file"]], on=cols.IMAGE_ID).merge(labels, on="file")
    assert len(told) == len(rows), f"{len(rows) - len(told)} pictures are not in labels.csv"
    snapshot = test_queries.snapshot_of(open_lake(spark, settings), index.manifest)
    files = [storage.local_path(storage.join(snapshot.uri, file.path)) for file in snapshot.files[manifest.TEST]]
    held = pd.concat([pd.read_parquet(file, columns=[cols.IMAGE_ID]) for file in files])
    told[TEST] = told[cols.IMAGE_ID].isin(held[cols.IMAGE_ID])
    vectors = np.stack(told.pop(cols.VECTOR).to_list()).astype(np.float32)
    # Every class is open to each picture here, whatever its modality: nothing is circular.
    registry = Registry(settings.mlflow, lake.uri, ObjectStore(settings.storage))
    loaded = weights.load(registry.resolve(registry.alias_uri(CHAMPION)))
    with torch.inference_mode():
        best = loaded.model.classify(torch.from_numpy(vectors)).argmax(1).numpy()
    told[cols.PREDICTED] = [loaded.manifest.classes[number] for number in best]
    return told, vectors


def figures(told: pd.DataFrame, vectors: NDArray[np.float32], asked: NDArray[np.bool_]) -> dict[str, Any]:
    """Classification and ranking of the pictures in `asked`, over the cells with enough groups."""
    groups = told.groupby(LABEL)[GROUP].nunique()
    many = sorted(groups.index[groups >= evaluation_job.MANY_PATIENTS])
    queries = told[asked & told[LABEL].isin(many)]
    classes = sorted(set(told[LABEL]) | set(told[cols.PREDICTED]))
    pairs = told[asked].groupby([LABEL, cols.PREDICTED]).size()
    counts = measures.confusion_matrix({(str(a), str(b)): int(n) for (a, b), n in pairs.items()}, classes)
    by_class = metrics.classification_figures(counts, classes).by_class
    cells = [label for label in many if by_class[label]["images"]]
    found, relevant = [], []
    labels, patients = told[LABEL].to_numpy(), told[cols.PATIENT_ID].to_numpy()
    for row in queries.index:
        others = np.flatnonzero(patients != patients[row])
        distances = np.linalg.norm(vectors[others].astype(np.float64) - vectors[row], axis=1)
        right = labels[others][np.argsort(distances, kind="stable")] == labels[row]
        found.append((1 + np.flatnonzero(right)).tolist())
        relevant.append(int(right.sum()))
    each = measures.ranking(found, relevant, K, DEPTH)
    mean, macro = measures.mean(each), measures.macro(measures.by_label(each, queries[LABEL].tolist()))
    return {
        "queries": len(queries),
        "cells": len(cells),
        "accuracy": _round((queries[LABEL] == queries[cols.PREDICTED]).mean()),
        **{f"macro {name}": _round(np.mean([by_class[c][name] for c in cells])) for name in ("precision", "recall")},
        "macro F1": _round(np.mean([by_class[c]["f1"] for c in cells])),
        "P@min(10, relevant)": _round(mean[measures.PRECISION_AT_MIN]),
        "macro P@min(10, relevant)": _round(macro[measures.PRECISION_AT_MIN]),
        "mAP": _round(mean[measures.AVERAGE_PRECISION]),
        "macro mAP": _round(macro[measures.AVERAGE_PRECISION]),
    }


def _round(value: float | None) -> float | None:
    return None if value is None else round(float(value), 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", required=True)
    parser.add_argument("--set", action="append", default=[], help="a setting: section.key=value")
    parser.add_argument("--lake", type=Path, help="a folder to work in, and to find wrapped and ingested pictures in")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory(prefix="cbmir-bench-") as scratch:
        folder = asked.lake or Path(scratch)
        # As the paper: 70 % of the patients to learn from, 30 % to be tested with.
        own = [f"lake.uri={folder / 'lake'}", f"ingest.archive={folder / 'archive'}", f"training.preset={asked.preset}"]
        own += ["dataset.test_fraction=0.3", "dataset.validation_fraction=0", "evaluation.max_queries=5000"]
        # A key of its own would be another split each time.
        os.environ[pseudonyms.KEY_VARIABLE] = "a key for this benchmark alone, so that splits agree"
        settings = config.load(overrides=[*own, *asked.set], environ={})
        wrap.wrap_pictures(SHARED / "labels.csv", SHARED / "labelled", folder / "archive")
        spark = session.build(settings, "bench")
        ingest_job.run(spark, settings)
        trained = training_job.run(spark, settings, lambda epoch: tell(f"epoch {epoch.number}: {epoch.metrics()}"))
        index_job.run(spark, settings)
        told, vectors = gather(spark, settings)
        spark.stop()
    test = told[TEST].to_numpy()
    last = trained.history.epochs[-1]
    result = {
        "command": f"python -m tests.benchmarks.labelled --preset {asked.preset}"
        + "".join(f" --set {each}" for each in asked.set),
        "images": trained.images,
        "patients": trained.patients,
        "epochs": len(trained.history.epochs),
        "seconds of training": round(trained.seconds["fit"], 1),
        "images/s": round(last.images_per_second, 1),
        "waiting for data": round(last.waiting, 4),
        "embedding": vectors.shape[1],
        "all": figures(told, vectors, test),
        f"without {SOURCE}": figures(told, vectors, test & (told[DATASET] != SOURCE).to_numpy()),
    }
    keep(f"labelled pictures, preset {asked.preset}", result)
    tell(str(result))


if __name__ == "__main__":
    main()
