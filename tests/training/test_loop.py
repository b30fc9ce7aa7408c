"""The loop: the same seed, the same weights; on one process or two, and however often it is stopped."""

import hashlib
import json
import os
import pickle
import random
from collections.abc import Generator
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from cbmir_spark.config import StorageSettings
from cbmir_spark.errors import TrainingError
from cbmir_spark.models import layers, networks, presets
from cbmir_spark.storage import ObjectStore
from cbmir_spark.training import augment, checkpoints, loop, metrics
from cbmir_spark.training.course import Fitting
from cbmir_spark.training.history import Epoch
from cbmir_spark.training.loop import Batch, Loaders

pytestmark = pytest.mark.slow

LOCAL = StorageSettings(endpoint=None, region="eu-central-1", path_style=False, attempts=1)


class InMemory:
    """Batches of two kinds of picture, bright and dark, in an order that only the epoch decides."""

    def __init__(self, rows: int = 16, size: int = 8) -> None:
        self.rows, self.steps, self.size = rows, rows // size, size
        noise = np.random.default_rng(5).integers(0, 40, (rows, 256, 256))
        self.targets = np.arange(rows) % 2
        self.pixels = (noise + 160 * self.targets[:, None, None]).astype(np.uint8)

    def span(self, step: int) -> tuple[int, int]:
        return 0, self.size

    def epoch(self, number: int) -> Generator[Batch, None, None]:
        order = np.random.default_rng(number + 1).permutation(self.rows)
        for chosen in np.split(order, self.steps):
            yield torch.from_numpy(self.pixels[chosen]), torch.from_numpy(self.targets[chosen])


def course(**changes: object) -> Fitting:
    values = {
        "optimiser": "adamw",
        "learning_rate": 1e-3,
        "weight_decay": 1e-2,
        "epochs": 2,
        "class_weights": (1.0, 1.0),
        "seed": 1,
    }
    return Fitting(**{**values, **changes})


def small(seed: int = 1) -> networks.Network:
    torch.manual_seed(seed)
    return networks.build("alexnet-small", 2)


# The loop


def test_training_twice_with_one_seed_gives_the_same_weights() -> None:
    def weights(seed: int) -> list[torch.Tensor]:
        network = small()
        loop.fit(network, Loaders(InMemory(), None), course(seed=seed))
        return list(network.state_dict().values())

    first = weights(1)
    assert all(torch.equal(a, b) for a, b in zip(first, weights(1), strict=True))
    # The seed decides dropout, so another one gives other weights from the same start.
    assert not all(torch.equal(a, b) for a, b in zip(first, weights(2), strict=True))


def test_training_learns_and_leaves_the_callers_random_numbers_alone() -> None:
    network, source, epochs = small(), InMemory(), []
    torch.manual_seed(9)
    expected = torch.rand(3)
    torch.manual_seed(9)
    history = loop.fit(network, Loaders(source, None), course(epochs=6), epochs.append)
    assert torch.equal(torch.rand(3), expected)
    assert list(history.epochs) == epochs and [epoch.number for epoch in epochs] == [1, 2, 3, 4, 5, 6]
    assert epochs[-1].loss < 0.5 * epochs[0].loss and history.best_epoch == 6
    _, confusion = loop.confusion_of(network, source, torch.ones(2))
    assert confusion.tolist() == [[8, 0], [0, 8]]


def test_the_model_gets_the_weights_of_the_epoch_that_validates_best() -> None:
    network, source = small(), InMemory()
    states, scores = [], []

    def remember(epoch: Epoch) -> None:
        states.append({name: tensor.clone() for name, tensor in network.state_dict().items()})
        scores.append(epoch.validation_macro_recall)

    history = loop.fit(network, Loaders(source, InMemory(rows=8)), course(epochs=4), remember)
    assert history.best_epoch == max(range(1, 5), key=lambda number: (scores[number - 1], number))
    best = states[history.best_epoch - 1]
    assert all(torch.equal(best[name], tensor) for name, tensor in network.state_dict().items())


def test_a_loss_that_is_not_a_number_stops_the_training_and_names_the_learning_rate() -> None:
    with pytest.raises(TrainingError, match=r"loss is (nan|inf) in epoch \d.*learning_rate \(it was 1e\+30\)"):
        loop.fit(small(), Loaders(InMemory(), None), course(optimiser="sgd", learning_rate=1e30, epochs=3))


def test_class_weights_make_every_class_count_alike() -> None:
    images = [90, 9, 0, 1]
    weights = loop.class_weights(images)
    assert [w * n for w, n in zip(weights, images, strict=True)] == pytest.approx([100 / 3, 100 / 3, 0.0, 100 / 3])


def test_figures_of_a_confusion_matrix_by_hand() -> None:
    found = metrics.classification_figures(np.array([[3, 1, 0], [0, 2, 0], [0, 0, 0]]), ["A", "B", "C"])
    assert found.accuracy == pytest.approx(5 / 6)
    assert found.by_class["A"] == pytest.approx({"precision": 1.0, "recall": 0.75, "f1": 6 / 7, "images": 4})
    assert found.by_class["B"] == pytest.approx({"precision": 2 / 3, "recall": 1.0, "f1": 0.8, "images": 2})
    # C has no image: it says nothing about the classifier.
    assert found.macro_recall == pytest.approx(0.875) and found.macro_precision == pytest.approx(5 / 6)
    assert found.macro_f1 == pytest.approx((6 / 7 + 0.8) / 2)


def test_curves_of_precision_and_recall_by_hand() -> None:
    # Class 0: right, wrong, then two with one score of which one is right. Class 1 is what is left.
    scores = np.array([[0.9, 0.1], [0.8, 0.2], [0.5, 0.5], [0.5, 0.5]], dtype=np.float32)
    first, second, third = metrics.precision_recall(np.c_[scores, scores[:, 1]], np.array([0, 1, 0, 1]))
    assert first is not None and second is not None and third is None
    assert first.precision.tolist() == [1.0, 0.5, 0.5] and first.recall.tolist() == [0.5, 0.5, 1.0]
    assert first.average_precision == pytest.approx(0.5 * 1.0 + 0.5 * 0.5)
    assert second.precision.tolist() == [0.5, 2 / 3, 0.5] and second.recall.tolist() == [0.5, 1.0, 1.0]


# Stopped and resumed


class Stopped(Exception):
    """What a kill does to the loop: it ends between two steps, without any cleaning up."""


class Stopping(InMemory):
    """Ends the training when it is asked for its nth batch."""

    def __init__(self, after: int, **how: int) -> None:
        super().__init__(**how)
        self.left = after

    def epoch(self, number: int) -> Generator[Batch, None, None]:
        for batch in super().epoch(number):
            if not self.left:
                raise Stopped
            self.left -= 1
            yield batch


def folder(path: Path, every: int = 2) -> checkpoints.CheckpointFolder:
    return checkpoints.CheckpointFolder(f"file://{path}", ObjectStore(LOCAL), every)


@pytest.mark.parametrize("optimiser", ["adamw", "sgd"])
def test_a_training_that_was_stopped_ten_times_ends_in_the_same_weights(tmp_path: Path, optimiser: str) -> None:
    how = course(optimiser=optimiser, epochs=4, learning_rate=1e-3)
    whole = small()
    expected = loop.fit(whole, Loaders(InMemory(rows=24), InMemory(rows=8)), how)

    chance = random.Random(3)
    steps = 3 * 4
    for _ in range(10):
        left = folder(tmp_path / "checkpoints", every=chance.randint(1, 3))
        with pytest.raises(Stopped):
            # Most of them are too short to finish; none may be long enough, or there would be nothing to stop.
            before = left.newest()
            remaining = steps - (before.position["steps"] if before else 0)
            skipped = before.position["done"] if before else 0
            after = skipped + chance.randrange(max(1, remaining))
            loop.fit(small(), Loaders(Stopping(after, rows=24), InMemory(rows=8)), how, checkpoints=left)
    resumed = small()
    history = loop.fit(
        resumed, Loaders(InMemory(rows=24), InMemory(rows=8)), how, checkpoints=folder(tmp_path / "checkpoints")
    )
    assert history.resumed is not None and history.resumed > 0
    assert history.best_epoch == expected.best_epoch
    assert [epoch.loss for epoch in history.epochs] == [epoch.loss for epoch in expected.epochs]
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


@pytest.mark.parametrize("updates", [None, 5])
def test_a_training_that_was_stopped_after_its_last_step_is_summed_up(tmp_path: Path, updates: int | None) -> None:
    """24 rows are three steps, so five of them end within an epoch."""
    how = course(epochs=2, updates=updates)
    expected = loop.fit(small(), Loaders(InMemory(rows=24), None), how)

    def stop(epoch: Epoch) -> None:
        if epoch.number == 2:
            raise Stopped

    with pytest.raises(Stopped):
        loop.fit(small(), Loaders(InMemory(rows=24), None), how, stop, folder(tmp_path, every=1))
    again = loop.fit(small(), Loaders(InMemory(rows=24), None), how, checkpoints=folder(tmp_path, every=1))
    assert again.resumed == (updates or 6)
    assert [epoch.loss for epoch in again.epochs] == [epoch.loss for epoch in expected.epochs]
    assert again.curve == expected.curve and again.best_epoch == expected.best_epoch == 2


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path: Path) -> None:
    left = folder(tmp_path, every=1)
    with pytest.raises(Stopped):
        loop.fit(small(), Loaders(Stopping(3), None), course(), checkpoints=left)
    older, newer = sorted(tmp_path.iterdir())
    content = bytearray(newer.read_bytes())
    content[len(content) // 2] ^= 1
    newer.write_bytes(content)
    found = left.newest()
    assert found is not None and found.position["steps"] == 2
    older.write_bytes(older.read_bytes()[:-1])
    assert left.newest() is None


def test_a_checkpoint_runs_no_code_that_was_put_into_it(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "ran"),)

    for content in (pickle.dumps(Hostile()), b"\x80\x04" + pickle.dumps(Hostile())):
        name = f"{9:012d}-{hashlib.sha256(content).hexdigest()}.safetensors"
        (tmp_path / name).write_bytes(content)
    assert folder(tmp_path).newest() is None
    assert not (tmp_path / "ran").exists()


def test_a_loss_that_is_not_a_number_leaves_the_last_good_checkpoint(tmp_path: Path) -> None:
    how = course(optimiser="sgd", learning_rate=1e30, epochs=3)
    with pytest.raises(TrainingError, match="training diverged"):
        loop.fit(small(), Loaders(InMemory(), None), how, checkpoints=folder(tmp_path, every=1))
    found = folder(tmp_path).newest()
    assert found is not None and found.position["steps"] >= 1


# One process or two


class Share(InMemory):
    """A process's part of the batches of InMemory."""

    def __init__(self, rank: int, world: int, **how: int) -> None:
        super().__init__(**how)
        self.rank, self.world = rank, world
        self.rows //= world

    def span(self, step: int) -> tuple[int, int]:
        return self.rank * self.size // self.world, self.size

    def epoch(self, number: int) -> Generator[Batch, None, None]:
        first, count = self.span(0)[0], self.size // self.world
        self.rows *= self.world
        try:
            for pixels, targets in super().epoch(number):
                yield pixels[first : first + count], targets[first : first + count]
        finally:
            self.rows //= self.world


def losses(source: InMemory) -> list[float]:
    """In double precision: batch normalisation of four rows makes much of the last digit."""
    network = small().double()
    network.to_input = lambda pixels: networks.Network.to_input(pixels).double()  # type: ignore[method-assign]
    history = loop.fit(network, Loaders(source, None), course(optimiser="sgd", learning_rate=1e-3))
    return [epoch.loss for epoch in history.epochs]


def _one_of_two(rank: int, place: str) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{place}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    found = losses(Share(rank, 2))
    if rank == 0:
        Path(place, "losses").write_text(json.dumps(found))
    dist.destroy_process_group()


def test_two_processes_take_the_steps_of_one(tmp_path: Path) -> None:
    """With dropout and batch normalisation: masks and statistics are those of the whole batch."""
    torch.multiprocessing.spawn(_one_of_two, args=(str(tmp_path),), nprocs=2)
    assert json.loads((tmp_path / "losses").read_text()) == pytest.approx(losses(InMemory()), rel=1e-9)


# Presets


@pytest.mark.parametrize("preset", presets.PRESETS)
def test_every_preset_learns_two_kinds_of_picture(preset: str) -> None:
    """A few steps by its recipe, but for the paper's rate, which needs more pictures than these."""
    recipe = presets.PRESETS[preset].recipe
    torch.manual_seed(1)
    network = networks.build(preset, 2)
    how = course(
        optimiser=recipe.optimiser,
        learning_rate=1e-4 if preset == "paper" else recipe.learning_rate,
        updates=6,
        epochs=9,
        schedule=recipe.schedule,
        momentum=recipe.momentum,
        clip=recipe.clip,
        augment=recipe.augment,
    )
    history = loop.fit(network, Loaders(InMemory(rows=32), None), how)
    # Four steps are an epoch, so the second one is cut short.
    assert [epoch.number for epoch in history.epochs] == [1, 2]
    assert [point.step for point in history.curve] == [6]
    rates = {epoch.learning_rate for epoch in history.epochs}
    assert len(rates) == (1 if recipe.schedule == "constant" else 2)


def test_a_picture_is_changed_alike_wherever_its_row_is_computed() -> None:
    pictures = networks.Network.to_input(torch.from_numpy(InMemory(rows=8).pixels))

    def changed(first: int, count: int) -> torch.Tensor:
        draw = layers.Draw(torch.Generator().manual_seed(5), first, 8)
        return augment.augment_batch(pictures[first : first + count], draw)

    whole = changed(0, 8)
    assert torch.equal(torch.cat([changed(0, 3), changed(3, 5)]), whole)
    assert not torch.allclose(whole, pictures) and whole.shape == pictures.shape
    # A black picture is dark all over: nothing gray comes in from outside.
    black = networks.Network.to_input(torch.zeros(1, 256, 256, dtype=torch.uint8))
    made = augment.augment_batch(black, layers.Draw(torch.Generator().manual_seed(5), 0, 1))
    assert float(made.max() - made.min()) < 1e-4


def test_half_precision_learns_what_whole_precision_learns() -> None:
    """On a CPU too, where it is slow; weights and their updates stay in float32."""
    curves = []
    for precision in ("float32", "bfloat16"):
        network = small()
        history = loop.fit(network, Loaders(InMemory(), None), course(epochs=3, precision=precision))
        curves.append([epoch.loss for epoch in history.epochs])
        assert {tensor.dtype for tensor in network.parameters()} == {torch.float32}
    assert curves[0] != curves[1] and curves[1] == pytest.approx(curves[0], rel=0.25)
