"""Checkpoints of a training in the lake, as safetensors and JSON; nothing is ever unpickled.

A checkpoint is one object whose name holds its digest. Those that are torn or damaged are skipped, and the one before
is the last good one.
"""

import hashlib
import json
from contextlib import suppress
from dataclasses import dataclass

import safetensors.torch

from cbmir_spark import storage
from cbmir_spark.storage import ObjectStore
from cbmir_spark.training.course import Checkpoint

_RETAINED = 2
_POSITION = "position"
_SUFFIX = ".safetensors"


@dataclass(frozen=True)
class CheckpointFolder:
    """The checkpoints of one training, in a folder that only its first process writes to.

    `every` is the number of steps from one checkpoint to the next.
    """

    uri: str
    store: ObjectStore
    every: int

    def newest(self) -> Checkpoint | None:
        """Read the last good checkpoint; None where there is none."""
        for name in reversed(self._names()):
            content = self.store.read_bytes(storage.join(self.uri, name))
            if hashlib.sha256(content).hexdigest() != name.removesuffix(_SUFFIX).partition("-")[2]:
                continue
            with suppress(safetensors.SafetensorError, ValueError, KeyError, TypeError):
                header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
                return Checkpoint(safetensors.torch.load(content), json.loads(header["__metadata__"][_POSITION]))
        return None

    def write(self, checkpoint: Checkpoint) -> None:
        """Add a checkpoint, atomically, and delete all but the newest two."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.tensors.items()}
        content = safetensors.torch.save(tensors, metadata={_POSITION: json.dumps(dict(checkpoint.position))})
        digest = hashlib.sha256(content).hexdigest()
        name = f"{checkpoint.position['steps']:012d}-{digest}{_SUFFIX}"
        self.store.write_bytes(storage.join(self.uri, name), content)
        for old in self._names()[:-_RETAINED]:
            self.store.delete(storage.join(self.uri, old))

    def clear(self) -> None:
        """Delete the folder."""
        self.store.delete_folder(self.uri)

    def _names(self) -> list[str]:
        try:
            _, found = self.store.list_folder(self.uri)
        except FileNotFoundError:
            return []
        return sorted(each.uri.rpartition("/")[2] for each in found if each.uri.endswith(_SUFFIX))
