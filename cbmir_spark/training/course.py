"""The state of a training between two steps: weights, optimiser, sums; saved to and restored from checkpoints."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from cbmir_spark.errors import TrainingError
from cbmir_spark.models.layers import Draw
from cbmir_spark.models.networks import Network
from cbmir_spark.training.augment import augment_batch
from cbmir_spark.training.history import Epoch, History, Point
from cbmir_spark.training.metrics import ClassificationFigures

_WARM_UP = 0.05
# Steps from one point of the learning curve to the next.
CURVE_STEPS = 50
# Prefixes of a checkpoint's tensors.
_MODEL, _OPTIMISER, _BEST = "model.", "optimiser.", "best."


@dataclass(frozen=True)
class Fitting:
    """How a network is fitted, as plain values: they travel to other processes and into MLflow.

    A training is resumed only from checkpoints of the same values, whose digest includes the names of the fields.
    """

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
class Checkpoint:
    """All that the rest of a training depends on: tensors by name, and its position as plain JSON values."""

    tensors: Mapping[str, torch.Tensor]
    position: Mapping[str, Any]


@dataclass(frozen=True)
class Validation:
    """The weighted loss on the validation split, and its figures."""

    loss: float
    figures: ClassificationFigures


class Course:
    """A training in progress: the model, its optimiser, the steps taken, and the sums over them."""

    def __init__(self, model: Network, fitting: Fitting, steps_per_epoch: int) -> None:
        self.model = model
        self.fitting = fitting
        self.device = model.device
        self.weights = torch.tensor(fitting.class_weights, device=self.device, dtype=next(model.parameters()).dtype)
        self._steps_per_epoch = steps_per_epoch
        self.total = fitting.updates or steps_per_epoch * fitting.epochs
        self.steps = 0  # since the beginning
        self.steps_of_epoch = 0
        # Loss, weights, correct predictions and rows of this epoch, and the same since the last point of the curve.
        self._sums = torch.zeros(4, dtype=torch.float64)
        self._since_point = torch.zeros(4, dtype=torch.float64)
        self._curve: list[Point] = []
        self.epochs: list[Epoch] = []
        self._best: tuple[float, int, dict[str, torch.Tensor]] | None = None
        self._resumed: int | None = None
        self._optimiser = _optimiser(model, fitting)

    @property
    def rows_of_epoch(self) -> float:
        """Rows of this epoch trained on so far, over all processes."""
        return float(self._sums[3])

    @property
    def rate(self) -> float:
        return self._rate_at(self.steps)

    def _rate_at(self, step: int) -> float:
        share = 1.0 if self.fitting.schedule == "constant" else _share_of_rate(step, self.total)
        return self.fitting.learning_rate * share

    def step(self, network: nn.Module, pixels: torch.Tensor, targets: torch.Tensor, draw: Draw, world: int) -> None:
        """Take one step with this process's rows; `network` is the model as it was wrapped for `world` processes."""
        model, weights = self.model, self.weights
        targets = targets.to(self.device)
        inputs = model.to_input(pixels.to(self.device))
        if self.fitting.augment:
            inputs = augment_batch(inputs, draw)
        inputs = inputs.contiguous(memory_format=torch.channels_last)
        model.set_draw(draw)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.fitting.precision == "bfloat16"):
            logits = network(inputs)
        logits = logits.to(weights.dtype)
        loss = nn.functional.cross_entropy(model.with_margin(logits, targets), targets, weights, reduction="sum")
        sums = _sum_over_processes(
            loss.detach(),
            weights[targets].sum(),
            (logits.detach().argmax(1) == targets).sum(),
            torch.tensor(len(targets), device=self.device),
        )
        if not math.isfinite(sums[0]):
            raise TrainingError(
                f"the loss is {float(sums[0])} in epoch {len(self.epochs) + 1}: training diverged; lower "
                f"training.learning_rate (it was {self.fitting.learning_rate})"
            )
        for group in self._optimiser.param_groups:
            group["lr"] = self.rate
        self._optimiser.zero_grad()
        # DDP averages the gradients of the processes; this factor makes that the gradient of the mean over all rows.
        (loss * (world / float(sums[1]))).backward()  # type: ignore[no-untyped-call]
        if self.fitting.clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), self.fitting.clip)
        self._optimiser.step()
        self.steps += 1
        self.steps_of_epoch += 1
        self._sums += sums
        self._since_point += sums
        if self.steps % CURVE_STEPS == 0 or self.steps == self.total:
            loss_sum, weight, right, rows = self._since_point.tolist()
            self._curve.append(Point(self.steps, loss_sum / weight, right / rows, self.rate))
            self._since_point = torch.zeros(4, dtype=torch.float64)

    def end_epoch(self, seconds: float, waited: float, rows_before: float, validation: Validation | None) -> Epoch:
        """Sum the epoch up.

        `seconds`, and `waited` of them for batches, count from where this process started or resumed; `rows_before`
        are the epoch's rows that it was resumed after.
        """
        figures = validation.figures if validation else None
        epoch = Epoch(
            number=len(self.epochs) + 1,
            of=-(-self.total // self._steps_per_epoch),
            loss=float(self._sums[0] / self._sums[1]),
            accuracy=float(self._sums[2] / self._sums[3]),
            learning_rate=self._rate_at(self.steps - self.steps_of_epoch),
            seconds=seconds,
            images_per_second=(self.rows_of_epoch - rows_before) / seconds,
            waiting=waited / seconds,
            validation_loss=validation.loss if validation else None,
            validation_accuracy=figures.accuracy if figures else None,
            validation_macro_recall=figures.macro_recall if figures else None,
        )
        self.epochs.append(epoch)
        self.steps_of_epoch = 0
        self._sums = torch.zeros(4, dtype=torch.float64)
        # The later one of equals: it was trained for longer, and at a lower rate.
        if figures and (self._best is None or figures.macro_recall >= self._best[0]):
            state = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}
            self._best = (figures.macro_recall, epoch.number, state)
        return epoch

    def finish(self) -> History:
        """Put the best epoch's weights into the model; the history."""
        if self._best is not None:
            self.model.load_state_dict(self._best[2])
        self.model.eval()
        best = self._best[1] if self._best else len(self.epochs)
        return History(tuple(self.epochs), best, tuple(self._curve), self._resumed)

    def checkpoint(self) -> Checkpoint:
        """The state as tensors and plain values, for `resume`."""
        tensors = {_MODEL + name: tensor for name, tensor in self.model.state_dict().items()}
        for number, state in self._optimiser.state_dict()["state"].items():
            tensors |= {f"{_OPTIMISER}{number}.{name}": tensor for name, tensor in state.items()}
        if self._best is not None:
            tensors |= {_BEST + name: tensor for name, tensor in self._best[2].items()}
        return Checkpoint(
            tensors,
            {
                "steps": self.steps,
                "done": self.steps_of_epoch,
                "sums": self._sums.tolist(),
                "since": self._since_point.tolist(),
                "curve": [asdict(point) for point in self._curve],
                "epochs": [asdict(epoch) for epoch in self.epochs],
                "best": self._best[:2] if self._best is not None else None,
            },
        )

    def resume(self, found: Checkpoint) -> None:
        """Continue from a checkpoint of a training with the same settings."""

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
        # Fused steps go through memory in order: a weight's state needs the memory layout of the weight.
        for parameter, values in self._optimiser.state.items():
            for name, value in values.items():
                if value.shape == parameter.shape:
                    values[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        self.steps = self._resumed = position["steps"]
        self.steps_of_epoch = position["done"]
        self._sums = torch.tensor(position["sums"], dtype=torch.float64)
        self._since_point = torch.tensor(position["since"], dtype=torch.float64)
        self._curve = [Point(**point) for point in position["curve"]]
        self.epochs = [Epoch(**epoch) for epoch in position["epochs"]]
        if position["best"] is not None:
            recall, number = position["best"]
            self._best = (recall, number, {k: v.to(self.device) for k, v in under(_BEST).items()})


def _optimiser(model: Network, fitting: Fitting) -> torch.optim.Optimizer:
    parameters, rate, decay = model.parameters(), fitting.learning_rate, fitting.weight_decay
    if fitting.optimiser == "sgd":
        return torch.optim.SGD(parameters, rate, momentum=fitting.momentum, weight_decay=decay, fused=True)
    return torch.optim.AdamW(parameters, rate, weight_decay=decay, fused=True)


def _share_of_rate(step: int, total: int) -> float:
    """A linear warm-up, then half a cosine down to nothing."""
    warm = max(1, round(_WARM_UP * total))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))


def _sum_over_processes(*values: torch.Tensor) -> torch.Tensor:
    """Sum each value over all processes, as float64 on the CPU."""
    stacked = torch.stack([value.to(torch.float64) for value in values])
    if dist.is_initialized():
        dist.all_reduce(stacked)
    return stacked.cpu()
