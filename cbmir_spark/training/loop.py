"""The training loop: torch alone, so that it runs wherever there is a device and batches to feed it.

A step is the same whatever the number of processes that share it: its rows, its random numbers, its loss and the
statistics of its normalisation are those of the whole batch, of which each process computes its rows.
"""

import contextlib
import hashlib
import math
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cbmir_spark.models.layers import Draw, synchronise
from cbmir_spark.models.networks import Network
from cbmir_spark.training.course import Checkpoint, Course, Fitting, Validation
from cbmir_spark.training.history import Epoch, History
from cbmir_spark.training.metrics import classification_figures

# Pixels, uint8 (n, 256, 256), and class numbers, int64 (n,).
Batch = tuple[torch.Tensor, torch.Tensor]


class BatchSource(Protocol):
    """What `fit` reads: a `loader.Loader`, or anything with its steps, spans and epochs."""

    rows: int
    steps: int

    def span(self, step: int) -> tuple[int, int]:
        """Locate this process's rows in the batch of a step: the first of them, and the rows of the whole batch."""

    def epoch(self, number: int) -> Generator[Batch, None, None]:
        """Give this process's batches of one epoch."""


class CheckpointStore(Protocol):
    """Where `fit` saves checkpoints and finds the last good one: a `checkpoints.CheckpointFolder`, or the like."""

    @property
    def every(self) -> int:
        """Steps from one checkpoint to the next."""

    def newest(self) -> Checkpoint | None:
        """Read the last good checkpoint."""

    def write(self, checkpoint: Checkpoint) -> None:
        """Add a checkpoint."""


@dataclass(frozen=True)
class Loaders:
    """What one process trains on, and validates each epoch on; without validation the last epoch is the best."""

    train: BatchSource
    validation: BatchSource | None


def class_weights(images: Sequence[int]) -> tuple[float, ...]:
    """Weight the loss of each class inversely to its images, with mean 1 over all images."""
    present = sum(n > 0 for n in images)
    total = sum(images)
    return tuple(total / (present * n) if n else 0.0 for n in images)


def fit(
    model: Network,
    loaders: Loaders,
    fitting: Fitting,
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
    checkpoints: CheckpointStore | None = None,
) -> History:
    """Train the model in place, on its device, together with the other processes of the default group, if any.

    The loss of a step is the class-weighted mean over its whole batch, whatever the number of processes, and the
    random numbers of a step follow from seed and step alone. So the same batches give the same curve, and on one CPU
    process a training that resumes from a checkpoint ends in the same weights as one that was never stopped. With a
    validation source the model gets the weights of the epoch with the best macro recall. Raises TrainingError as soon
    as a loss is not a number; the last good checkpoint stays.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    # Convolutions are fastest in this order, on CPUs (half as fast again for AlexNet) as on GPUs.
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    course = Course(model, fitting, loaders.train.steps)
    if checkpoints is not None and (found := checkpoints.newest()) is not None:
        course.resume(found)
        for epoch in course.epochs:
            on_epoch(epoch)
    group = synchronise(model) if world > 1 else None
    network: nn.Module = DistributedDataParallel(model) if world > 1 else model
    if fitting.compile:
        network = torch.compile(network)  # type: ignore[assignment]
    generator = torch.Generator(device=course.device)
    try:
        # A checkpoint of an epoch's last step leaves that epoch to be summed up.
        while course.steps < course.total or course.steps_of_epoch:
            number = len(course.epochs)
            started, waited = time.perf_counter(), 0.0
            resumed_after, rows_before = course.steps_of_epoch, course.rows_of_epoch
            model.train()
            with contextlib.closing(loaders.train.epoch(number)) as batches:
                for step in range(loaders.train.steps):
                    asked = time.perf_counter()
                    pixels, targets = next(batches)
                    if step < resumed_after:
                        continue
                    if course.steps == course.total:
                        break
                    waited += time.perf_counter() - asked
                    generator.manual_seed(_seed_of(fitting.seed, course.steps))
                    course.step(network, pixels, targets, Draw(generator, *loaders.train.span(step)), world)
                    # All processes have the same state; one of them saves it.
                    if checkpoints is not None and course.steps % checkpoints.every == 0 and _is_first():
                        checkpoints.write(course.checkpoint())
                    if course.steps == course.total:
                        break
            seconds = time.perf_counter() - started
            validation = _validate(model, loaders.validation, course.weights) if loaders.validation else None
            on_epoch(course.end_epoch(seconds, waited, rows_before, validation))
    finally:
        model.set_draw(None)
        if group is not None:
            dist.destroy_process_group(group)
    return course.finish()


def confusion_of(model: Network, source: BatchSource, weights: torch.Tensor) -> tuple[float, NDArray[np.int64]]:
    """Classify a source, all processes together; the weighted loss and the counts by (true, predicted) class."""
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


def _validate(model: Network, source: BatchSource, weights: torch.Tensor) -> Validation:
    loss, confusion = confusion_of(model, source, weights)
    return Validation(loss, classification_figures(confusion, [str(number) for number in range(len(confusion))]))


def _is_first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _seed_of(seed: int, step: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{step}".encode()).digest()[:7], "big")
