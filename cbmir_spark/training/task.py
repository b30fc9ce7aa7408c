"""What every process of a training is given, and what it does with it. Without Spark and MLflow.

TorchDistributor starts `train_process` on executors, or beside the driver with a local master.
"""

import contextlib
import hashlib
import json
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from cbmir_spark import storage
from cbmir_spark.config import StorageSettings
from cbmir_spark.errors import EnvironmentProblem
from cbmir_spark.models.networks import Network, build
from cbmir_spark.storage import ObjectStore
from cbmir_spark.training.allocator import retain_freed_memory
from cbmir_spark.training.checkpoints import CheckpointFolder
from cbmir_spark.training.course import Fitting
from cbmir_spark.training.history import Epoch, History
from cbmir_spark.training.loader import Loader
from cbmir_spark.training.loop import Loaders, fit
from cbmir_spark.training.manifest import TRAIN, VALIDATION, Snapshot

# Rows of a split that `features` reads. Snapshots are written shuffled, so the first rows are a fair sample.
_FEATURE_ROWS = 20_000


@dataclass(frozen=True)
class TrainingTask:
    """One training of one network on one snapshot.

    `batch_size` is that of a step, over all processes. `checkpoints_root` is the folder of all trainings' checkpoints;
    without `checkpoint_steps` none are written.
    """

    snapshot: Snapshot
    store: ObjectStore
    preset: str
    fitting: Fitting
    batch_size: int
    data_seed: int
    use_gpu: bool
    checkpoints_root: str
    checkpoint_steps: int | None

    @property
    def course_id(self) -> str:
        """Name all trainings that take the same steps, so that one resumes from the checkpoints of another."""
        values = [self.snapshot.to_json(), self.preset, asdict(self.fitting), self.batch_size, self.data_seed]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]

    @property
    def checkpoints(self) -> CheckpointFolder:
        """The folder of this training's checkpoints."""
        uri = storage.join(self.checkpoints_root, self.course_id)
        return CheckpointFolder(uri, self.store, self.checkpoint_steps or 0)

    def loader(self, split: str, *, shuffle: bool = True, rank: int = 0, world: int = 1) -> Loader:
        """Read a split, or one process's share of it."""
        return Loader(
            self.snapshot,
            split,
            self.store,
            batch_size=self.batch_size,
            seed=self.data_seed,
            shuffle=shuffle,
            rank=rank,
            world=world,
        )

    def to_values(self) -> dict[str, Any]:
        """Describe the task in plain values, which other processes can unpickle without our modules."""
        return {
            "snapshot": self.snapshot.to_json(),
            "uri": self.snapshot.uri,
            "storage": self.store.settings.model_dump(),
            "preset": self.preset,
            "fitting": asdict(self.fitting),
            "batch_size": self.batch_size,
            "data_seed": self.data_seed,
            "use_gpu": self.use_gpu,
            "checkpoints_root": self.checkpoints_root,
            "checkpoint_steps": self.checkpoint_steps,
        }

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> "TrainingTask":
        """Undo `to_values`."""
        return cls(
            snapshot=Snapshot.from_json(values["snapshot"], values["uri"]),
            store=ObjectStore(StorageSettings(**values["storage"])),
            preset=values["preset"],
            fitting=Fitting(**{**values["fitting"], "class_weights": tuple(values["fitting"]["class_weights"])}),
            batch_size=values["batch_size"],
            data_seed=values["data_seed"],
            use_gpu=values["use_gpu"],
            checkpoints_root=values["checkpoints_root"],
            checkpoint_steps=values["checkpoint_steps"],
        )


def device_of(task: TrainingTask) -> torch.device:
    """Choose the CPU, or this process's GPU: TorchDistributor makes only those of its Spark task visible.

    Raises EnvironmentProblem where the task wants a GPU and torch finds none.
    """
    if not task.use_gpu:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise EnvironmentProblem(
            f"training.use_gpu is true, but torch finds no GPU on {platform.node()}; set it to false, or run "
            "`nvidia-smi` and `cbmir doctor` there to see what is missing"
        )
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def fit_task(
    task: TrainingTask,
    device: torch.device,
    rank: int = 0,
    world: int = 1,
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
) -> tuple[Network, History]:
    """Build the network, and train it as one of `world` processes. Raises TrainingError as `loop.fit` does."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(task.fitting.seed)
        model = build(task.preset, len(task.snapshot.classes)).to(device)
    validation = None
    if task.snapshot.rows(VALIDATION):
        validation = task.loader(VALIDATION, shuffle=False, rank=rank, world=world)
    loaders = Loaders(task.loader(TRAIN, rank=rank, world=world), validation)
    checkpoints = task.checkpoints if task.checkpoint_steps else None
    with retain_freed_memory():
        return model, fit(model, loaders, task.fitting, on_epoch, checkpoints)


def train_process(values: Mapping[str, Any], threads: int | None) -> dict[str, Any]:
    """Train as one of several processes, started by TorchDistributor, which returns the first one's result.

    Takes the task's `to_values`; returns the weights as safetensors and the history as plain values.
    """
    task = TrainingTask.from_values(values)
    device = device_of(task)
    if threads:
        torch.set_num_threads(threads)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        model, history = fit_task(task, device, dist.get_rank(), dist.get_world_size())
        state = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
        return {"weights": safetensors.torch.save(state), "history": asdict(history)}
    finally:
        dist.destroy_process_group()


def features(task: TrainingTask, model: Network, split: str) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Embed the first rows of a split, 20,000 at most; (n, D) vectors and (n,) class numbers."""
    model.eval()
    vectors: list[NDArray[np.float32]] = []
    labels: list[NDArray[np.int64]] = []
    seen = 0
    with contextlib.closing(task.loader(split, shuffle=False).epoch(0)) as batches:
        for pixels, targets in batches:
            with torch.inference_mode():
                vectors.append(model.embed(model.to_input(pixels)).numpy())
            labels.append(targets.numpy())
            seen += len(pixels)
            if seen >= _FEATURE_ROWS:
                break
    return np.concatenate(vectors), np.concatenate(labels)
