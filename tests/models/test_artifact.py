"""The paper's network layer by layer; models that travel whole or not at all; projections that bound distances."""

import hashlib
import json
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import nn

from cbmir_spark.errors import ModelError
from cbmir_spark.models import embed as embedding
from cbmir_spark.models import networks, presets, weights
from cbmir_spark.models import projection as models_projection
from cbmir_spark.models.artifact import Manifest, Saved
from cbmir_spark.models.projection import Projection

CLASSES = ("CT/CHEST", "CT/HEAD", "MR/HEAD")
POSSIBLE = {"CT": ("CT/CHEST", "CT/HEAD"), "MR": ("MR/HEAD",)}


def saved(seed: int = 0, preset: str = "alexnet-small") -> Saved:
    torch.manual_seed(seed)
    network = networks.build(preset, len(CLASSES)).eval()
    rows = np.random.default_rng(seed).random((50, network.embedding), dtype=np.float32)
    return weights.save(
        network,
        Projection.fit([rows]),
        label="modality/body_part",
        classes=CLASSES,
        possible=POSSIBLE,
        preprocessing="px1-keep",
        snapshot="5a",
    )


def pictures(count: int) -> np.ndarray:
    return np.random.default_rng(7).integers(0, 256, (count, 256, 256), dtype=np.uint8)


def test_alexnet_has_the_papers_layers_and_shapes() -> None:
    network = networks.build("alexnet", 22).eval()
    x = network.to_input(torch.zeros(2, 256, 256, dtype=torch.uint8))
    seen = []
    for layer in network.features:
        x = layer(x)
        if not isinstance(layer, nn.ReLU):
            seen.append((type(layer).__name__, tuple(x.shape[1:])))
    assert seen == [
        ("Conv2d", (96, 62, 62)),
        ("MaxPool2d", (96, 30, 30)),
        ("Conv2d", (256, 30, 30)),
        ("MaxPool2d", (256, 14, 14)),
        ("Conv2d", (384, 14, 14)),
        ("Conv2d", (384, 14, 14)),
        ("Conv2d", (256, 14, 14)),
        ("MaxPool2d", (256, 6, 6)),
    ]
    convolutions = [layer for layer in network.features if isinstance(layer, nn.Conv2d)]
    assert [(c.kernel_size[0], c.stride[0], c.padding[0]) for c in convolutions] == [
        (11, 4, 0),
        (5, 1, 2),
        (3, 1, 1),
        (3, 1, 1),
        (3, 1, 1),
    ]
    following = [type(b) for a, b in zip(network.features, network.features[1:], strict=False) if a in convolutions]
    assert following == [nn.ReLU] * 5
    linear = [layer for layer in network.modules() if isinstance(layer, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in linear] == [(9216, 4096), (4096, 4096), (4096, 22)]
    assert network(network.to_input(torch.zeros(2, 256, 256, dtype=torch.uint8))).shape == (2, 22)


def test_alexnet_has_as_many_parameters_as_the_paper_s_sizes_give() -> None:
    convolutions = [(1, 96, 11), (96, 256, 5), (256, 384, 3), (384, 384, 3), (384, 256, 3)]
    linear = [(256 * 6 * 6, 4096), (4096, 4096), (4096, 22)]
    expected = sum(a * b * k * k + b for a, b, k in convolutions) + sum(a * b + b for a, b in linear)
    assert expected == 58_348_246
    assert sum(p.numel() for p in networks.build("alexnet", 22).parameters()) == expected


def test_small_alexnet_keeps_five_convolutions_and_three_linear_layers() -> None:
    network = networks.build("alexnet-small", 22)
    assert sum(isinstance(layer, nn.Conv2d) for layer in network.modules()) == 5
    assert sum(isinstance(layer, nn.Linear) for layer in network.modules()) == 3
    assert sum(p.numel() for p in network.parameters()) < 3_000_000


@pytest.mark.parametrize("preset", presets.PRESETS)
def test_what_a_network_embeds_is_what_it_classifies(preset: str) -> None:
    network = networks.build(preset, 3).eval()
    x = network.to_input(torch.from_numpy(pictures(2)))
    vectors = network.embed(x)
    assert vectors.shape == (2, network.embedding) and vectors.dtype == torch.float32
    assert torch.equal(network.classify(vectors), network(x))
    if isinstance(network, networks.AlexNet):
        assert vectors.min() == 0.0 and vectors.max() > 0.0
    else:
        assert torch.allclose(vectors.norm(dim=1), torch.ones(2))


def test_an_unknown_preset_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ModelError, match=r"'alexnet-tiny'.*alexnet, alexnet-small, paper, retrieval"):
        networks.build("alexnet-tiny", 3)


def test_a_saved_model_loads_to_the_same_vectors_and_scores() -> None:
    files = saved()
    loaded = weights.load_files(files.weights, files.manifest.to_json())
    assert loaded.manifest == files.manifest
    assert loaded.manifest.model_id == f"alexnet-small-{hashlib.sha256(files.weights).hexdigest()[:12]}"
    torch.manual_seed(0)
    original = networks.build("alexnet-small", len(CLASSES)).eval().to(memory_format=torch.channels_last)
    embedded = embedding.embed_batches(loaded, pictures(16))
    with torch.inference_mode():
        x = original.to_input(torch.from_numpy(pictures(16))).contiguous(memory_format=torch.channels_last)
        # Another number of rows and of threads: the last digits are the processor's.
        assert np.allclose(embedded.vectors, original.embed(x).numpy(), rtol=1e-4, atol=1e-5)
        assert np.allclose(embedded.scores, torch.softmax(original(x), 1).numpy(), atol=1e-6)


def test_the_same_model_saves_to_the_same_bytes() -> None:
    assert saved() == saved()
    assert saved(1).manifest.model_id != saved().manifest.model_id


def test_weights_that_were_changed_are_refused_with_both_digests() -> None:
    files = saved()
    changed = bytearray(files.weights)
    changed[-1] ^= 1
    with pytest.raises(ModelError) as refusal:
        weights.load_files(bytes(changed), files.manifest.to_json())
    assert hashlib.sha256(changed).hexdigest() in str(refusal.value)
    assert files.manifest.weights_sha256 in str(refusal.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, r"format 2, this version reads 1"),
        ({"classes": ["CT/HEAD", "CT/CHEST", "MR/HEAD"]}, "differs from the copy within the weights"),
        ({"preprocessing": "px1-stretch"}, "differs from the copy within the weights"),
        ({"classes": "CT/HEAD"}, "values of another type"),
        ({"extra": 1}, r"unknown \['extra'\]"),
    ],
)
def test_a_manifest_that_was_changed_is_refused(change: dict[str, object], message: str) -> None:
    files = saved()
    changed = {**json.loads(files.manifest.to_json()), **change}
    with pytest.raises(ModelError, match=message):
        weights.load_files(files.weights, json.dumps(changed))


def test_what_is_no_manifest_or_no_weights_is_refused() -> None:
    for text in ("", "[]", "not JSON", '"text"', "[" * 100_000):
        with pytest.raises(ModelError, match="not a JSON object"):
            Manifest.from_json(text)
    files = saved()
    junk = b"not safetensors"
    manifest = {**json.loads(files.manifest.to_json()), "weights_sha256": hashlib.sha256(junk).hexdigest()}
    with pytest.raises(ModelError, match="not one that cbmir wrote"):
        weights.load_files(junk, json.dumps(manifest))


def test_saving_refuses_what_does_not_belong_together() -> None:
    network = networks.build("alexnet-small", 3)
    projection = Projection(np.zeros(network.embedding), np.eye(32, network.embedding))
    rest = {"possible": {}, "preprocessing": "p", "snapshot": "s"}
    with pytest.raises(ModelError, match="2 classes for a network with 3 outputs"):
        weights.save(network, projection, label="body_part", classes=["A", "B"], **rest)
    with pytest.raises(ModelError, match="UNKNOWN is no class"):
        weights.save(network, projection, label="modality/body_part", classes=["CT/A", "CT/B", "CT/UNKNOWN"], **rest)


def bytes_of(embedded: embedding.Embedded, row: int) -> bytes:
    return b"".join(each[row].tobytes() for each in (embedded.vectors, embedded.scores, embedded.probabilities))


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("preset", ["alexnet-small", "retrieval"])
def test_a_picture_has_one_vector_whoever_shares_its_batch(preset: str) -> None:
    """Bit for bit, on any number of threads: a query that is in the archive has distance 0 to itself."""
    files = saved(preset=preset)
    loaded = weights.load_files(files.weights, files.manifest.to_json())
    many = pictures(26)
    alone = bytes_of(embedding.embed_batches(loaded, many[:1]), 0)
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        together = embedding.embed_batches(loaded, many)
        assert torch.get_num_threads() == number
        assert bytes_of(together, 0) == alone
        for row in (5, 11, 12, 25):
            assert bytes_of(embedding.embed_batches(loaded, many[row : row + 1]), 0) == bytes_of(together, row)
    for place in range(13):
        others = np.roll(many[1:14], place, axis=0)
        others[place] = many[0]
        assert bytes_of(embedding.embed_batches(loaded, others), place) == alone, f"at place {place}"


def test_a_network_runs_on_the_same_rows_and_threads_whatever_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """What makes bytes agree also on processors where this one's agreement says nothing."""
    files = saved()
    loaded = weights.load_files(files.weights, files.manifest.to_json())
    seen = set()
    embed = loaded.model.embed

    def watched(x: torch.Tensor) -> torch.Tensor:
        seen.add((tuple(x.shape), x.is_contiguous(memory_format=torch.channels_last), torch.get_num_threads()))
        return embed(x)

    monkeypatch.setattr(loaded.model, "embed", watched)
    for count in (1, 11, 12, 13, 40):
        embedding.embed_batches(loaded, pictures(count))
    assert seen == {((12, 1, 256, 256), True, 1)}


def test_scores_go_to_the_classes_of_the_pictures_modality_only() -> None:
    files = saved()
    logits = np.array([[2.0, 1.0, 5.0]] * 4, dtype=np.float32)
    scores = embedding.class_scores(logits, files.manifest, ["CT", "MR", "US", "UNKNOWN"])
    odds = 1.0 / (1.0 + np.exp(-1.0))
    assert np.allclose(scores[0], [odds, 1 - odds, 0.0], atol=1e-6)
    assert np.allclose(scores[1], [0.0, 0.0, 1.0])
    assert np.allclose(scores[2], [0.0, 0.0, 0.0])
    assert np.allclose(scores[3], np.exp(logits[3]) / np.exp(logits[3]).sum(), atol=1e-6)
    # Logits this far apart underflow in a softmax over all classes.
    far = np.array([[0.0, 1.0, 1000.0]], dtype=np.float32)
    assert np.allclose(embedding.class_scores(far, files.manifest, ["CT"])[0], [1 - odds, odds, 0.0], atol=1e-6)


def test_a_modality_that_was_not_learned_gets_no_label() -> None:
    files = saved()
    loaded = weights.load_files(files.weights, files.manifest.to_json())
    embedded = embedding.embed_batches(loaded, pictures(3), ["US", "MR", "CT"])
    assert embedded.labels[:2] == (None, "MR/HEAD") and embedded.labels[2] in ("CT/CHEST", "CT/HEAD")
    assert embedded.probabilities[0] == 0.0 and embedded.probabilities[1] == pytest.approx(1.0)
    assert embedding.embed_batches(loaded, pictures(0)).vectors.shape == (0, loaded.manifest.embedding_dim)


def test_pixels_of_another_shape_or_type_are_refused() -> None:
    files = saved()
    loaded = weights.load_files(files.weights, files.manifest.to_json())
    with pytest.raises(ModelError, match=r"float32 \(1, 256, 256\)"):
        embedding.embed_batches(loaded, np.zeros((1, 256, 256), dtype=np.float32))
    with pytest.raises(ModelError, match=r"uint8 \(1, 128, 128\)"):
        embedding.embed_batches(loaded, np.zeros((1, 128, 128), dtype=np.uint8))


def low_rank(rows: int, seed: int = 0) -> np.ndarray:
    draws = np.random.default_rng(seed)
    basis = draws.normal(size=(6, 60))
    return (3.0 + draws.normal(size=(rows, 6)) @ basis + 0.01 * draws.normal(size=(rows, 60))).astype(np.float32)


def test_projection_does_not_depend_on_how_rows_come_in_batches() -> None:
    rows = low_rank(200)
    whole = Projection.fit([rows])
    parts = Projection.fit([rows[:1], rows[1:90], rows[90:90], rows[90:]])
    assert np.allclose(whole.mean, parts.mean) and np.allclose(whole.mean, rows.mean(axis=0, dtype=np.float64))
    # Only the six leading directions are determined; signs are not.
    ours, theirs = whole.directions[:6], parts.directions[:6]
    assert np.allclose(np.abs(np.linalg.svd(ours @ theirs.T)[1]), 1.0)
    assert whole.directions.shape == (60, 60)


def test_projection_takes_the_directions_of_greatest_variance_and_is_orthonormal() -> None:
    rows = low_rank(300)
    projection = Projection.fit([rows], directions=6)
    assert projection.defect < 1e-14
    _, residuals = projection.apply(rows)
    centred = rows.astype(np.float64) - rows.mean(axis=0, dtype=np.float64)
    assert np.square(residuals).sum() == pytest.approx(np.square(np.linalg.svd(centred)[1][6:]).sum(), rel=1e-6)


def test_projection_of_many_rows_is_that_of_each_block(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = low_rank(300)
    projection = Projection.fit([rows], directions=6)
    whole = projection.apply(rows)
    monkeypatch.setattr(models_projection, "_PROJECTED", 64)
    for found, expected in zip(projection.apply(rows), whole, strict=True):
        assert found.dtype == expected.dtype
        assert np.allclose(found, expected, rtol=1e-6, atol=1e-9)
    coordinates, residuals = projection.apply(rows[:0])
    assert (coordinates.shape, residuals.shape) == ((0, 6), (0,))


def test_projection_bounds_every_distance_from_below() -> None:
    rows = low_rank(80)
    coordinates, residuals = Projection.fit([rows], directions=4).apply(rows)
    distance = np.linalg.norm(rows[:, None].astype(np.float64) - rows[None], axis=2)
    apart = np.linalg.norm(coordinates[:, None].astype(np.float64) - coordinates[None], axis=2)
    bound = np.sqrt(np.square(apart) + np.square(residuals[:, None] - residuals[None]))
    assert np.all(bound <= distance * (1 + 1e-6) + 1e-5)
    assert np.median((bound / np.where(distance > 0, distance, 1.0))[distance > 0]) > 0.5


def test_projection_needs_rows_and_makes_do_with_few() -> None:
    with pytest.raises(ModelError, match="train split is empty"):
        Projection.fit([])
    few = Projection.fit([low_rank(2)])
    assert few.directions.shape == (60, 60) and few.defect < 1e-14
