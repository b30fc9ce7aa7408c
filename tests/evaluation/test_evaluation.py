"""Figures against hand-computed ones and scikit-learn; the run against a brute force over the same index."""

import dataclasses
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from numpy.typing import NDArray
from pyspark.sql import SparkSession
from sklearn.metrics import average_precision_score, precision_recall_fscore_support

from cbmir_spark import config, storage
from cbmir_spark.errors import ModelError
from cbmir_spark.evaluation import document, measures
from cbmir_spark.evaluation import job as evaluation_job
from cbmir_spark.evaluation import queries as test_queries
from cbmir_spark.index import job as index_job
from cbmir_spark.lake import columns as cols
from cbmir_spark.lake import schemas
from cbmir_spark.lake.open import open_lake
from cbmir_spark.models import networks, weights
from cbmir_spark.models.projection import Projection
from cbmir_spark.storage import ObjectStore
from cbmir_spark.training import metrics
from cbmir_spark.training.manifest import Snapshot
from cbmir_spark.training.snapshot import write_snapshot
from tests.support import tiny_lake
from tests.support.models import open_index
from tests.support.tiny_lake import Drawn, draw, pseudonym, publish

pytestmark = pytest.mark.slow


def figures_of(ranks: list[int], relevant: int, k: int, depth: int) -> dict[str, float]:
    return {name: column[0] for name, column in measures.ranking([ranks], [relevant], k, depth).items()}


def test_ranking_figures_by_hand() -> None:
    # Relevant at ranks 1, 3 and 4 of four; five there are.
    assert figures_of([1, 3, 4], 5, k=3, depth=4) == pytest.approx(
        {
            "precision_at_k": 2 / 3,
            "precision_at_min": 2 / 3,
            "recall_at_k": 2 / 5,
            "average_precision": (1 / 1 + 2 / 3 + 3 / 4) / 4,
            "reciprocal_rank": 1,
        }
    )
    # A single one to find, at rank 2: precision at 3 cannot exceed 1/3, precision at min(3, 1) could have been 1.
    assert figures_of([2], 1, k=3, depth=4) == pytest.approx(
        {
            "precision_at_k": 1 / 3,
            "precision_at_min": 0,
            "recall_at_k": 1,
            "average_precision": 1 / 2,
            "reciprocal_rank": 1 / 2,
        }
    )
    # The hit at rank 9 lies beyond the depth.
    assert figures_of([2, 9], 2, k=10, depth=4) == pytest.approx(
        {
            "precision_at_k": 2 / 10,
            "precision_at_min": 1 / 2,
            "recall_at_k": 1,
            "average_precision": (1 / 2) / 2,
            "reciprocal_rank": 1 / 2,
        }
    )
    assert figures_of([], 2, k=3, depth=4) == dict.fromkeys(measures.MEASURES, 0.0)
    assert all(math.isnan(value) for value in figures_of([], 0, k=3, depth=4).values())


def test_a_perfect_ranking_is_perfect_in_all_but_what_k_forbids() -> None:
    for relevant in (1, 4, 30):
        figures = figures_of(list(range(1, relevant + 1)), relevant, k=10, depth=20)
        assert figures["precision_at_min"] == figures["average_precision"] == figures["reciprocal_rank"] == 1
        assert figures["precision_at_k"] == min(10, relevant) / 10


def test_average_precision_agrees_with_scikit_learn_where_all_is_ranked() -> None:
    rng = np.random.default_rng(7)
    for _ in range(20):
        n = int(rng.integers(5, 200))
        relevant = rng.random(n) < 0.3
        relevant[rng.integers(n)] = True
        ranks = (np.flatnonzero(relevant) + 1).tolist()
        ours = figures_of(ranks, len(ranks), k=5, depth=n)["average_precision"]
        assert ours == pytest.approx(average_precision_score(relevant, -np.arange(n)))


def test_means_over_queries_classes_and_chosen_classes() -> None:
    values = {name: np.array([1.0, 0.0, 0.5, math.nan, math.nan]) for name in measures.MEASURES}
    labels = ["A", "A", "B", "B", "C"]
    by_class = measures.by_label(values, labels)
    # C has nothing to find, so it is no class of the means; B's second query has nothing to find either.
    assert {label: figures["recall_at_k"] for label, figures in by_class.items()} == {"A": 0.5, "B": 0.5}
    assert measures.mean(values)["recall_at_k"] == 0.5
    values["recall_at_k"] = np.array([1.0, 1.0, 0.25, math.nan, math.nan])
    by_class = measures.by_label(values, labels)
    assert measures.mean(values)["recall_at_k"] == 0.75  # (1 + 1 + 0.25) / 3
    assert measures.macro(by_class)["recall_at_k"] == 0.625  # (1 + 0.25) / 2
    assert measures.macro(by_class, ["B"])["recall_at_k"] == 0.25
    assert measures.macro(by_class, ["C"])["recall_at_k"] is None
    assert measures.mean({"x": np.array([math.nan])})["x"] is None


def test_classification_agrees_with_scikit_learn() -> None:
    rng = np.random.default_rng(3)
    classes = ["CT/CHEST", "CT/HEAD", "MR/KNEE", "US/LIVER"]
    true = rng.choice(classes[:3], 60).tolist()  # nobody's liver was tested, yet it is predicted now and then
    predicted = rng.choice(classes, 60).tolist()
    counts = measures.confusion_matrix(Counter(zip(true, predicted, strict=True)), classes)
    assert counts.sum() == 60 and counts[0, 3] == sum(
        pair == ("CT/CHEST", "US/LIVER") for pair in zip(true, predicted, strict=True)
    )
    figures = metrics.classification_figures(counts, classes)
    theirs = precision_recall_fscore_support(true, predicted, labels=classes[:3], zero_division=0)
    for number, label in enumerate(classes[:3]):
        ours = figures.by_class[label]
        assert [ours["precision"], ours["recall"], ours["f1"]] == pytest.approx([row[number] for row in theirs[:3]])
    assert figures.macro_recall == pytest.approx(theirs[1].mean())


def test_circularity_is_told() -> None:
    both = {
        mode: measures.circularity(mode, "modality/body_part") for mode in ("none", "modality", "predicted", "tags")
    }
    assert both == {"none": "no", "modality": "partly", "predicted": "partly", "tags": "yes"}
    alone = {mode: measures.circularity(mode, "body_part") for mode in ("none", "modality", "predicted", "tags")}
    assert alone == {"none": "no", "modality": "no", "predicted": "no", "tags": "yes"}


def hit(query: str, rank: int, modality: str, body_part: str, source: str = cols.FROM_TAG) -> tuple[object, ...]:
    ids = (f"i{rank}", 0, "s", "st", "p")
    return (query, rank, float(rank), *ids, modality, body_part, source, "CT/CHEST", "F", 40.0, 2020)


def test_hits_without_a_label_of_their_own_take_no_rank() -> None:
    rows = [
        hit("a", 1, "CT", "CHEST", cols.FROM_PREDICTION),
        hit("a", 2, "CT", "CHEST"),
        hit("a", 3, "CT", "UNKNOWN", cols.FROM_NOTHING),
        hit("a", 4, "DX", "CHEST"),
        hit("a", 5, "CT", "CHEST"),
        hit("b", 1, "CT", "CHEST"),
        hit("c", 1, "MR", "KNEE"),
    ]
    hits = pa.table([pa.array(column) for column in zip(*rows, strict=True)], schemas.RESULTS_HITS.schema.names)
    labels = {"a": "CT/CHEST", "b": "MR/KNEE", "c": "MR/KNEE"}
    assert test_queries.relevant_ranks(hits, labels, "modality/body_part") == {"a": [1, 3], "c": [1]}
    alone = {"a": "CHEST", "b": "KNEE", "c": "KNEE"}
    assert test_queries.relevant_ranks(hits, alone, "body_part") == {"a": [1, 2, 3], "c": [1]}


def test_a_sample_spares_the_rare_classes_and_is_always_the_same(spark: SparkSession) -> None:
    rows = [(f"big{n}", 0, "BIG") for n in range(40)] + [(f"rare{n}", 0, "RARE") for n in range(3)]
    images = spark.createDataFrame(pd.DataFrame(rows, columns=["image_id", "frame", "label"]))
    taken = test_queries.sample(images, 10).toPandas()
    assert taken["label"].value_counts().to_dict() == {"BIG": 7, "RARE": 3}
    again = test_queries.sample(images.repartition(7), 10).toPandas()
    assert set(again["image_id"]) == set(taken["image_id"])
    assert len(test_queries.sample(images, 100).collect()) == 43


# --- the run, over a real index ---

CHEST, HEAD, BRAIN = ("CT", "CHEST"), ("CT", "HEAD"), ("MR", "BRAIN")
IMAGES = [
    *[Drawn(f"c{n}", f"chest {n // 2}", *CHEST) for n in range(10)],
    *[Drawn(f"h{n}", f"head {n}", *HEAD) for n in range(5)],
    *[Drawn(f"b{n}", f"brain {n // 4}", *BRAIN) for n in range(8)],
    # Searched, but no ground truth.
    Drawn("u0", "nobody", "CT", "UNKNOWN"),
    Drawn("u1", "chest 0", "MR", "UNKNOWN"),
]


def misleading(image: Drawn, frame: int) -> NDArray[np.uint8]:
    """Every third image looks like one of another class, so that no ranking is perfect."""
    other = {CHEST: HEAD, HEAD: BRAIN, BRAIN: CHEST}.get((image.modality, image.body_part), CHEST)
    if int(image.name[1:]) % 3 == 0:
        image = dataclasses.replace(image, modality=other[0], body_part=other[1])
    return draw(image, frame)


@pytest.fixture(scope="module")
def evaluated(
    spark: SparkSession, tmp_path_factory: pytest.TempPathFactory
) -> tuple[config.Settings, evaluation_job.Report, pd.DataFrame, Snapshot]:
    """A lake, the small network untrained, its index, and their evaluation; and the index for the brute force."""
    folder = tmp_path_factory.mktemp("evaluation")
    settings = config.load(
        overrides=[
            f"lake.uri={folder / 'lake'}",
            "dataset.min_images=2",
            f"index.model={folder / 'model'}",
            "index.min_probability=0.0",
            f"retrieval.model={folder / 'model'}",
            "evaluation.k=3",
            "evaluation.depth=8",
            "evaluation.prefilters=[none, tags]",
            f"evaluation.out={folder / 'out'}",
        ],
        environ={},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_lake, "draw", misleading)
        publish(spark, settings, IMAGES)
    snapshot = write_snapshot(open_lake(spark, settings), settings.dataset)
    torch.manual_seed(1)
    network = networks.build("alexnet-small", len(snapshot.classes)).eval()
    saved = weights.save(
        network,
        Projection.fit([np.random.default_rng(1).random((64, 512), dtype=np.float32)]),
        label=snapshot.label,
        classes=snapshot.classes,
        possible=snapshot.possible,
        preprocessing=snapshot.preprocessing,
        snapshot=snapshot.digest,
    )
    (folder / "model").mkdir()
    (folder / "model" / "manifest.json").write_text(saved.manifest.to_json())
    (folder / "model" / "weights.safetensors").write_bytes(saved.weights)
    index_job.run(spark, settings)
    report = evaluation_job.run(spark, settings)
    rows = open_index(spark, settings).rows.toPandas()
    return settings, report, rows, snapshot


def brute_force(
    rows: pd.DataFrame, snapshot: Snapshot, prefilter: str, k: int, depth: int
) -> tuple[dict[str, dict[str, float]], float]:
    """Each query's figures the slow way, one comparison after the other, and the mean number of candidates."""
    truth = {pseudonym(image.name): f"{image.modality}/{image.body_part}" for image in IMAGES}
    tested = [
        image
        for file in snapshot.files["test"]
        for image in pd.read_parquet(storage.local_path(storage.join(snapshot.uri, file.path)))["image_id"]
    ]
    figures, candidates = {}, []
    for image in tested:
        query = rows[rows["image_id"] == image].iloc[0]
        base = rows[rows["patient_id"] != query["patient_id"]]
        relevant = int((base["image_id"].map(truth) == truth[image]).sum())
        if prefilter == "tags":
            base = base[(base["modality"] == query["modality"]) & (base["body_part"] == query["body_part"])]
        candidates.append(len(base))
        gaps = [float(np.sqrt(((v.astype(float) - query["vector"].astype(float)) ** 2).sum())) for v in base["vector"]]
        order = sorted(zip(gaps, base["image_id"], strict=True))[:depth]
        judged = [truth[name] for _, name in order if not truth[name].endswith("UNKNOWN")]
        right = [label == truth[image] for label in judged]
        precisions = [sum(right[: n + 1]) / (n + 1) for n in range(len(right)) if right[n]]
        figures[image] = {
            "precision_at_k": sum(right[:k]) / k,
            "precision_at_min": sum(right[: min(k, relevant)]) / min(k, relevant),
            "recall_at_k": sum(right[:k]) / relevant,
            "average_precision": sum(precisions) / min(depth, relevant),
            "reciprocal_rank": next((1 / (n + 1) for n in range(len(right)) if right[n]), 0.0),
        }
    return figures, float(np.mean(candidates))


Evaluated = tuple[config.Settings, evaluation_job.Report, pd.DataFrame, Snapshot]


@pytest.mark.parametrize("prefilter", ["none", "tags"])
def test_the_run_agrees_with_a_brute_force(evaluated: Evaluated, prefilter: str) -> None:
    settings, report, rows, snapshot = evaluated
    expected, candidates = brute_force(rows, snapshot, prefilter, settings.evaluation.k, settings.evaluation.depth)
    assert report.queries == len(expected) == snapshot.rows("test") > 4
    found = report.retrieval[prefilter]
    for measure in measures.MEASURES:
        assert found[measure] == pytest.approx(np.mean([of[measure] for of in expected.values()])), measure
    assert found["candidates"] == pytest.approx(candidates)
    assert found["share"] == pytest.approx(candidates / len(rows))
    truth = {pseudonym(image.name): f"{image.modality}/{image.body_part}" for image in IMAGES}
    by_class: dict[str, list[float]] = {}
    for image, of in expected.items():
        by_class.setdefault(truth[image], []).append(of["average_precision"])
    assert found["macro_average_precision"] == pytest.approx(np.mean([np.mean(v) for v in by_class.values()]))


def test_the_tags_prefilter_is_perfect_by_construction_and_marked(evaluated: Evaluated) -> None:
    _, report, _, _ = evaluated
    assert report.retrieval["tags"]["precision_at_min"] == 1.0 and report.circular["tags"] == "yes"
    assert report.retrieval["none"]["precision_at_min"] < 1.0 and report.circular["none"] == "no"
    assert report.retrieval["tags"]["share"] < report.retrieval["none"]["share"]


def test_classes_with_few_patients_are_told_apart(evaluated: Evaluated) -> None:
    _, report, rows, snapshot = evaluated
    assert {label: of["patients"] for label, of in report.by_class.items()} == {
        "CT/CHEST": 5,
        "CT/HEAD": 5,
        "MR/BRAIN": 2,
    }
    truth = {pseudonym(image.name): f"{image.modality}/{image.body_part}" for image in IMAGES}
    files = [storage.local_path(storage.join(snapshot.uri, file.path)) for file in snapshot.files["test"]]
    tested = pd.concat([pd.read_parquet(file) for file in files])
    predicted = rows.set_index("image_id")["predicted"]
    right = {label: [] for label in report.by_class}
    for image in tested["image_id"]:
        right[truth[image]].append(predicted[image] == truth[image])
    assert report.accuracy == pytest.approx(np.mean([hit for hits in right.values() for hit in hits]))
    assert report.macro_recall == pytest.approx(np.mean([np.mean(hits) for hits in right.values()]))
    many = [np.mean(right[label]) for label in ("CT/CHEST", "CT/HEAD")]
    assert report.macro_recall_of_many == pytest.approx(np.mean(many))


def test_the_files_say_what_the_report_says(evaluated: Evaluated) -> None:
    settings, report, rows, _ = evaluated
    read = json.loads(ObjectStore(settings.storage).read_bytes(report.document))
    assert read["indexed"] == report.indexed == len(rows) == len(IMAGES)
    assert read["retrieval"]["none"]["mean"]["average_precision"] == report.retrieval["none"]["average_precision"]
    confusion = np.array(read["classification"]["confusion"]["counts"])
    assert confusion.sum() == read["test_images"] and np.trace(confusion) / confusion.sum() == report.accuracy
    page = ObjectStore(settings.storage).read_bytes(report.page).decode()
    assert report.model_id in page and f"{report.accuracy:.3f}" in page and page.count("data:image/png") == 2
    folder = report.page.rpartition("/")[0]
    for name in (document.CONFUSION, document.BY_CLASS):
        assert ObjectStore(settings.storage).read_bytes(f"{folder}/{name}").startswith(b"\x89PNG")


def test_a_model_of_another_lake_is_refused(spark: SparkSession, evaluated: Evaluated, tmp_path: Path) -> None:
    settings, _, _, snapshot = evaluated
    gone = tmp_path / "moved"
    place = Path(storage.local_path(snapshot.uri))
    place.rename(gone)
    try:
        with pytest.raises(ModelError, match="its test patients are unknown"):
            evaluation_job.run(spark, settings)
    finally:
        gone.rename(place)
