"""Figures of a training: its epochs, its learning curve, and how it ended."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


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
        """Name the figures as MLflow's metrics; those that were not measured are left out."""
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
    """The learning curve at a step: means over the steps since the previous point."""

    step: int
    loss: float
    accuracy: float
    learning_rate: float


@dataclass(frozen=True)
class History:
    """Every epoch and point of the curve.

    `best_epoch` is the number of the epoch whose weights the model has, `resumed` the step of the checkpoint that the
    training started from, None if it started from the beginning.
    """

    epochs: tuple[Epoch, ...]
    best_epoch: int
    curve: tuple[Point, ...] = ()
    resumed: int | None = None

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> "History":
        """Undo `dataclasses.asdict`."""
        epochs = tuple(Epoch(**epoch) for epoch in values["epochs"])
        curve = tuple(Point(**point) for point in values["curve"])
        return cls(epochs, values["best_epoch"], curve, values["resumed"])
