"""The training loop and its figures: torch alone, so that it runs wherever there is a GPU and batches to feed it.

A step is the same whatever the number of processes that share it: its rows, its random numbers, its loss and the
statistics of its normalisation are those of the whole batch, and each process does its part of it.
"""

import contextlib
import hashlib
import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cbmir_spark.errors import TrainingError
from cbmir_spark.models.networks import Draw, Network, synchronise
from cbmir_spark.training.augment import augmented
from cbmir_spark.training.metrics import Figures, figures

_WARM_UP = 0.05
# Steps that one point of the learning curve stands for.
CURVE_STEPS = 50
# Names of a checkpoint's tensors begin so.
_MODEL, _OPTIMISER, _BEST = "model.", "optimiser.", "best."

# Pixels, uint8 (n, 256, 256), and class numbers, int64 (n,).
Batch = tuple[torch.Tensor, torch.Tensor]


class BatchSource(Protocol):
    """What `fit` reads: `dataset.Loader`, or anything with its steps, spans and epochs."""

    rows: int
    steps: int

    def span(self, step: int) -> tuple[int, int]:
        """Where this process's rows begin in the whole batch of a step, and how many rows that batch has."""

    def epoch(self, number: int) -> Generator[Batch, None, None]: ...


class Keeper(Protocol):
    """Where `fit` leaves checkpoints and finds the last good one; `checkpoints.Folder`, or anything like it."""

    @property
    def every(self) -> int:
        """Steps from one checkpoint to the next."""

    def newest(self) -> "Checkpoint | None": ...

    def write(self, checkpoint: "Checkpoint") -> None: ...


@dataclass(frozen=True)
class Checkpoint:
    """All that the rest of a training depends on: tensors by name, and where it stands as plain JSON values."""

    tensors: Mapping[str, torch.Tensor]
    position: Mapping[str, Any]


@dataclass(frozen=True)
class Loaders:
    """What one process trains on, and what it holds back to choose the best epoch by (None: the last one)."""

    train: BatchSource
    validation: BatchSource | None


@dataclass(frozen=True)
class Fitting:
    """How `fit` trains; plain values, so that they travel to other processes and into MLflow."""

    optimiser: Literal["sgd", "adamw"]
    learning_rate: float
    weight_decay: float
    epochs: int
    class_weights: tuple[float, ...]
    seed: int
    updates: int | None = None
    schedule: Literal["cosine", "constant"] = "cosine"
    momentum: float = 0.9
    clip: float | None = 5.0
    augment: bool = False
    precision: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False


@dataclass(frozen=True)
class Epoch:
    """Figures of one epoch over all processes; `waiting` is the share of time spent waiting for batches."""

    number: int
    of: int
    loss: float
    accuracy: float
    learning_rate: float
    seconds: float
    images_per_second: float
    waiting: float
    validation_loss: float | None
    validation_accuracy: float | None
    validation_macro_recall: float | None

    def metrics(self) -> dict[str, float]:
        """As MLflow metrics, with the names they have there."""
        values = {
            "train_loss": self.loss,
            "train_accuracy": self.accuracy,
            "learning_rate": self.learning_rate,
            "epoch_seconds": self.seconds,
            "images_per_second": self.images_per_second,
            "waiting_share": self.waiting,
            "validation_loss": self.validation_loss,
            "validation_accuracy": self.validation_accuracy,
            "validation_macro_recall": self.validation_macro_recall,
        }
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class Point:
    """The learning curve at a step: means over the steps since the point before."""

    step: int
    loss: float
    accuracy: float
    learning_rate: float


@dataclass(frozen=True)
class History:
    """Every epoch, the number of the one whose weights the model has, and the step at which a stopped one went on."""

    epochs: tuple[Epoch, ...]
    kept: int
    curve: tuple[Point, ...] = ()
    resumed: int | None = None


def class_weights(images: Sequence[int]) -> tuple[float, ...]:
    """Weights of the loss, inverse to each class's images, with mean 1 over all images."""
    present = sum(n > 0 for n in images)
    total = sum(images)
    return tuple(total / (present * n) if n else 0.0 for n in images)


def fit(
    model: Network,
    loaders: Loaders,
    fitting: Fitting,
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
    keeper: Keeper | None = None,
) -> History:
    """Train the model in place, on the device it is on, together with the other processes of the group if any.

    The loss of a step is the class-weighted mean over its whole batch, whatever the number of processes that share
    it, and the random numbers of a step follow from seed and step alone. So the same batches give the same curve, and
    a training that goes on from a checkpoint of `keeper` ends, on one CPU process, in the same weights as one that
    was never stopped. With a validation source the weights of the epoch with the best macro recall are kept. Raises
    TrainingError as soon as a loss is not a number; the last good checkpoint is left where it is.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    # Convolutions are fastest in this order, on CPUs (half as fast again for AlexNet) as on GPUs.
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    course = _Course(model, fitting, loaders.train.steps)
    if keeper is not None and (found := keeper.newest()) is not None:
        course.resume(found)
        for epoch in course.epochs:
            on_epoch(epoch)
    group = synchronise(model) if world > 1 else None
    network: nn.Module = DistributedDataParallel(model) if world > 1 else model
    if fitting.compile:
        network = torch.compile(network)  # type: ignore[assignment]
    generator = torch.Generator(device=course.device)
    try:
        # A checkpoint of an epoch's last step has that epoch still to sum up.
        while course.steps < course.total or course.done:
            number = len(course.epochs)
            started, waited, begun, before = time.perf_counter(), 0.0, course.done, float(course.sums[3])
            model.train()
            with contextlib.closing(loaders.train.epoch(number)) as batches:
                for step in range(loaders.train.steps):
                    asked = time.perf_counter()
                    pixels, targets = next(batches)
                    if step < begun:
                        continue
                    if course.steps == course.total:
                        break
                    waited += time.perf_counter() - asked
                    generator.manual_seed(_seed_of(fitting.seed, course.steps))
                    course.step(network, pixels, targets, Draw(generator, *loaders.train.span(step)), world)
                    if keeper is not None and course.steps % keeper.every == 0:
                        _keep(keeper, course)
                    if course.steps == course.total:
                        break
            course.end_epoch(
                time.perf_counter() - started,
                waited,
                before,
                _validate(model, loaders.validation, course.weights) if loaders.validation else None,
            )
            on_epoch(course.epochs[-1])
    finally:
        model.draw(None)
        if group is not None:
            dist.destroy_process_group(group)
    return course.finish()


class _Course:
    """Where a training stands: the model, its optimiser, the steps taken, and what they added up to."""

    def __init__(self, model: Network, fitting: Fitting, steps_per_epoch: int) -> None:
        self.model = model
        self.fitting = fitting
        self.device = model.device
        self.weights = torch.tensor(fitting.class_weights, device=self.device, dtype=next(model.parameters()).dtype)
        self._steps_per_epoch = steps_per_epoch
        self.total = fitting.updates or steps_per_epoch * fitting.epochs
        self.steps = 0  # taken since the beginning
        self.done = 0  # taken in this epoch
        self.sums = torch.zeros(4, dtype=torch.float64)
        self._since = torch.zeros(4, dtype=torch.float64)  # as sums, since the last point of the curve
        self.curve: list[Point] = []
        self.epochs: list[Epoch] = []
        self.best: tuple[float, int, dict[str, torch.Tensor]] | None = None
        self.resumed: int | None = None
        self._optimiser = _optimiser(model, fitting)

    @property
    def rate(self) -> float:
        return self.fitting.learning_rate * self._share(self.steps)

    def _share(self, step: int) -> float:
        return 1.0 if self.fitting.schedule == "constant" else _rate(step, self.total)

    def step(self, network: nn.Module, pixels: torch.Tensor, targets: torch.Tensor, draw: Draw, world: int) -> None:
        model, weights = self.model, self.weights
        targets = targets.to(self.device)
        inputs = model.to_input(pixels.to(self.device))
        if self.fitting.augment:
            inputs = augmented(inputs, draw)
        inputs = inputs.contiguous(memory_format=torch.channels_last)
        model.draw(draw)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.fitting.precision == "bfloat16"):
            logits = network(inputs)
        logits = logits.to(weights.dtype)
        loss = nn.functional.cross_entropy(model.penalised(logits, targets), targets, weights, reduction="sum")
        figures = _over_all(
            loss.detach(),
            weights[targets].sum(),
            (logits.detach().argmax(1) == targets).sum(),
            torch.tensor(len(targets), device=self.device),
        )
        if not math.isfinite(figures[0]):
            raise TrainingError(
                f"the loss is {float(figures[0])} in epoch {len(self.epochs) + 1}: training diverged; lower "
                f"training.learning_rate (it was {self.fitting.learning_rate})"
            )
        for group in self._optimiser.param_groups:
            group["lr"] = self.rate
        self._optimiser.zero_grad()
        # DDP takes the mean of the processes' gradients; with this factor that is the gradient of the mean over all
        # their rows.
        (loss * (world / float(figures[1]))).backward()  # type: ignore[no-untyped-call]
        if self.fitting.clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), self.fitting.clip)
        self._optimiser.step()
        self.steps += 1
        self.done += 1
        self.sums += figures
        self._since += figures
        if self.steps % CURVE_STEPS == 0 or self.steps == self.total:
            loss_sum, weight, right, rows = self._since.tolist()
            self.curve.append(Point(self.steps, loss_sum / weight, right / rows, self.rate))
            self._since = torch.zeros(4, dtype=torch.float64)

    def end_epoch(self, seconds: float, waited: float, before: float, held: tuple[float, Figures] | None) -> None:
        """Sum the epoch up; `before` are the rows of it that were trained on before the training was stopped."""
        epoch = Epoch(
            number=len(self.epochs) + 1,
            of=-(-self.total // self._steps_per_epoch),
            loss=float(self.sums[0] / self.sums[1]),
            accuracy=float(self.sums[2] / self.sums[3]),
            learning_rate=self.fitting.learning_rate * self._share(self.steps - self.done),
            seconds=seconds,
            images_per_second=(float(self.sums[3]) - before) / seconds,
            waiting=waited / seconds,
            validation_loss=held[0] if held else None,
            validation_accuracy=held[1].accuracy if held else None,
            validation_macro_recall=held[1].macro_recall if held else None,
        )
        self.epochs.append(epoch)
        self.done = 0
        self.sums = torch.zeros(4, dtype=torch.float64)
        # Of equals the later one: it was trained for longer, and at a lower rate.
        if held and (self.best is None or held[1].macro_recall >= self.best[0]):
            state = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}
            self.best = (held[1].macro_recall, epoch.number, state)

    def finish(self) -> History:
        """The history, with the best epoch's weights in the model."""
        if self.best is not None:
            self.model.load_state_dict(self.best[2])
        self.model.eval()
        kept = self.best[1] if self.best else len(self.epochs)
        return History(tuple(self.epochs), kept, tuple(self.curve), self.resumed)

    def checkpoint(self) -> Checkpoint:
        tensors = {_MODEL + name: tensor for name, tensor in self.model.state_dict().items()}
        for number, state in self._optimiser.state_dict()["state"].items():
            tensors |= {f"{_OPTIMISER}{number}.{name}": tensor for name, tensor in state.items()}
        if self.best is not None:
            tensors |= {_BEST + name: tensor for name, tensor in self.best[2].items()}
        return Checkpoint(
            tensors,
            {
                "steps": self.steps,
                "done": self.done,
                "sums": self.sums.tolist(),
                "since": self._since.tolist(),
                "curve": [asdict(point) for point in self.curve],
                "epochs": [asdict(epoch) for epoch in self.epochs],
                "best": self.best[:2] if self.best is not None else None,
            },
        )

    def resume(self, found: Checkpoint) -> None:
        """Go on from a checkpoint of a training with the same settings."""

        def under(prefix: str) -> dict[str, torch.Tensor]:
            return {k.removeprefix(prefix): v for k, v in found.tensors.items() if k.startswith(prefix)}

        position = found.position
        self.model.load_state_dict(under(_MODEL))
        state: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in under(_OPTIMISER).items():
            number, _, what = name.partition(".")
            state.setdefault(int(number), {})[what] = tensor
        groups = self._optimiser.state_dict()["param_groups"]
        self._optimiser.load_state_dict({"state": state, "param_groups": groups})
        # Fused steps go through memory as it lies: what belongs to a weight has to lie as the weight does.
        for parameter, values in self._optimiser.state.items():
            for name, value in values.items():
                if value.shape == parameter.shape:
                    values[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        self.steps = self.resumed = position["steps"]
        self.done = position["done"]
        self.sums = torch.tensor(position["sums"], dtype=torch.float64)
        self._since = torch.tensor(position["since"], dtype=torch.float64)
        self.curve = [Point(**point) for point in position["curve"]]
        self.epochs = [Epoch(**epoch) for epoch in position["epochs"]]
        if position["best"] is not None:
            recall, number = position["best"]
            self.best = (recall, number, {k: v.to(self.device) for k, v in under(_BEST).items()})


def _keep(keeper: Keeper, course: _Course) -> None:
    # Every process has the same weights and the same optimiser; one of them writes.
    if not dist.is_initialized() or dist.get_rank() == 0:
        keeper.write(course.checkpoint())


def _seed_of(seed: int, step: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{step}".encode()).digest()[:7], "big")


def confusion_of(model: Network, source: BatchSource, weights: torch.Tensor) -> tuple[float, NDArray[np.int64]]:
    """The weighted loss and the (true, predicted) counts over this process's share of a source."""
    classes, device = model.classes, model.device
    counts = torch.zeros(classes * classes, dtype=torch.int64, device=device)
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    model.eval()
    with torch.inference_mode(), contextlib.closing(source.epoch(0)) as batches:
        for pixels, targets in batches:
            targets = targets.to(device)
            logits = model(model.to_input(pixels.to(device)))
            sums[0] += nn.functional.cross_entropy(logits, targets, weights, reduction="sum")
            sums[1] += weights[targets].sum()
            counts += torch.bincount(targets * classes + logits.argmax(1), minlength=classes * classes)
    if dist.is_initialized():
        dist.all_reduce(counts)
        dist.all_reduce(sums)
    loss = float(sums[0] / sums[1]) if sums[1] > 0 else math.nan
    return loss, counts.cpu().numpy().reshape(classes, classes)


def _optimiser(model: Network, fitting: Fitting) -> torch.optim.Optimizer:
    parameters, rate, decay = model.parameters(), fitting.learning_rate, fitting.weight_decay
    if fitting.optimiser == "sgd":
        return torch.optim.SGD(parameters, rate, momentum=fitting.momentum, weight_decay=decay, fused=True)
    return torch.optim.AdamW(parameters, rate, weight_decay=decay, fused=True)


def _rate(step: int, total: int) -> float:
    """Share of the learning rate at a step: a linear warm-up, then half a cosine down to nothing."""
    warm = max(1, round(_WARM_UP * total))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))


def _over_all(*values: torch.Tensor) -> torch.Tensor:
    """The values summed over all processes, as float64 on the CPU."""
    stacked = torch.stack([value.to(torch.float64) for value in values])
    if dist.is_initialized():
        dist.all_reduce(stacked)
    return stacked.cpu()


def _validate(model: Network, source: BatchSource, weights: torch.Tensor) -> tuple[float, Figures]:
    loss, confusion = confusion_of(model, source, weights)
    return loss, figures(confusion, [str(number) for number in range(len(confusion))])
