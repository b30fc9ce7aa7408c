"""Run a training in this process, or in several through Spark's TorchDistributor. Runs on the driver."""

import contextlib
import io
import logging
import os
import re
from collections.abc import Callable, Iterator
from typing import Any, cast

import safetensors.torch
from pyspark.sql import SparkSession

from cbmir_spark.config import TrainingSettings
from cbmir_spark.errors import ConfigError, TrainingError
from cbmir_spark.models.networks import Network, build
from cbmir_spark.training.history import Epoch, History
from cbmir_spark.training.task import TrainingTask, device_of, fit_task, train_process


def fit_distributed(
    spark: SparkSession, task: TrainingTask, settings: TrainingSettings, on_epoch: Callable[[Epoch], None]
) -> tuple[Network, History]:
    """Train in `training.processes` processes; the model comes back on the CPU, in evaluation mode.

    One process trains here, unless it needs a GPU of a cluster: those belong to the executors. A training whose
    processes die is started again up to `training.attempts` times. Raises TrainingError with the cause, ConfigError
    where Spark does not assign the GPUs that the settings ask for.
    """
    local = (spark.sparkContext.master or "").startswith("local")
    if settings.processes == 1 and (local or not settings.use_gpu):
        model, history = fit_task(task, device_of(task), on_epoch=on_epoch)
        return model.cpu(), history
    amount = "spark.driver.resource.gpu.amount" if local else "spark.task.resource.gpu.amount"
    if settings.use_gpu and not spark.conf.get(amount, None):
        raise ConfigError(
            f"training.use_gpu is true, but {amount} is not set, so Spark gives no GPU to a training process: see "
            "GPUs in deploy/README.md"
        )
    result = _run_processes(task, settings, local)
    model = build(task.preset, len(task.fitting.class_weights))
    model.load_state_dict(safetensors.torch.load(result["weights"]))
    history = History.from_values(result["history"])
    for epoch in history.epochs:
        on_epoch(epoch)
    return model.eval(), history


def _run_processes(task: TrainingTask, settings: TrainingSettings, local: bool) -> dict[str, Any]:
    from pyspark.ml.torch.distributor import TorchDistributor

    threads = max(1, (os.cpu_count() or 1) // settings.processes) if local else None
    # Its constructor sets the level of its logger.
    distributor = TorchDistributor(settings.processes, local_mode=local, use_gpu=settings.use_gpu)
    with _quiet():
        for attempt in range(1, settings.attempts + 1):
            # It prints the output of its processes, and only that names the cause of a failure.
            printed = io.StringIO()
            try:
                with contextlib.redirect_stdout(printed):
                    return cast(dict[str, Any], distributor.run(train_process, task.to_values(), threads))
            except RuntimeError as error:
                cause, ours = _cause(printed.getvalue() + str(error))
                # Our own errors would come again; a process that died may survive the next time.
                if ours or attempt == settings.attempts:
                    raise TrainingError(cause) from error
    raise AssertionError("training.attempts is at least 1")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence TorchDistributor, which logs each start and end."""
    logger = logging.getLogger("TorchDistributor")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


def _cause(text: str) -> tuple[str, bool]:
    """Find the line of TorchDistributor's output that says why a process ended, and whether it is an error of ours."""
    ours = re.findall(r"cbmir_spark\.errors\.\w+: (.+)", text)
    errors = re.findall(r"^(?:\[rank\d+\]:\s*)?(\w[\w.]*(?:Error|Exception): .+)$", text, flags=re.MULTILINE)
    lines = text.strip().splitlines() or ["no output"]
    return f"a training process failed: {(ours or errors or lines)[-1].strip()}", bool(ours)
