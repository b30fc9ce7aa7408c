"""Read a snapshot's row groups through Petastorm, shuffled and sharded."""

import hashlib
import math
import time
from collections.abc import Generator
from contextlib import ExitStack, closing

import numpy as np
import torch
from numpy.typing import NDArray

from cbmir_spark import storage
from cbmir_spark.errors import TrainingError
from cbmir_spark.lake import columns as cols
from cbmir_spark.storage import ObjectStore
from cbmir_spark.training.loop import Batch
from cbmir_spark.training.manifest import TARGET, Snapshot
from cbmir_spark.training.petastorm_reader import Files, open_reader

# Without a row for so long, a reader is taken for one that has ended too early.
STALLED_SECONDS = 120.0
# Shards that each batch consists of, where there are enough row groups; each is read by one thread.
_SHARDS = 4

RowGroup = tuple[NDArray[np.uint8], NDArray[np.int64]]


class Loader:
    """One process's share of a split, as (uint8 (n, 256, 256), int64 (n,)) batches of pixels and class numbers.

    Row groups go to shards in turn, and shards to processes. Each shard contributes to every step, as evenly as its
    rows allow, and the batch of a step is the contributions of all shards in their order. So an epoch gives each row
    once, no process runs out before another, and the batch of a step is the same for any number of processes that
    divides the number of shards. A process has at least two rows of a batch, since batch normalisation needs them. Each
    epoch opens fresh readers, since Petastorm cannot restart one in mid-epoch, and closes them however it ends.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        split: str,
        store: ObjectStore,
        *,
        batch_size: int,
        seed: int,
        shuffle: bool = True,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """Plan the shards; reads nothing yet. `batch_size` is that of a step, over all `world` processes.

        Raises TrainingError for a seed below 1, and for more processes than row groups.
        """
        if seed < 1:
            raise TrainingError(f"seed {seed}: give one from 1 up; Petastorm takes 0 as no seed")
        files = snapshot.files[split]
        groups = [rows for file in files for rows in file.groups]
        if len(groups) < world:
            raise TrainingError(
                f"the {split} split has {len(groups)} row group(s) for {world} processes: "
                "lower training.processes or dataset.rows_per_group"
            )
        self._shards = _shards(len(groups), world)
        # Petastorm assigns row groups in this way; `_row_groups` checks the sums.
        shares = [sum(groups[shard :: self._shards]) for shard in range(self._shards)]
        self.steps = max(1, min(-(-sum(shares) // batch_size), min(shares) // 2))
        self._rows_of_steps = [_even(share, self.steps) for share in shares]
        each = self._shards // world
        self._local_shards = range(rank * each, (rank + 1) * each)
        self.rows = sum(shares[shard] for shard in self._local_shards)
        self._files = Files([storage.join(snapshot.uri, file.path) for file in files], store)
        self._seed, self._shuffle = seed, shuffle

    def span(self, step: int) -> tuple[int, int]:
        """Locate this process's rows in the batch of a step: the first of them, and the rows of the whole batch."""
        sizes = [shard[step] for shard in self._rows_of_steps]
        return sum(sizes[: self._local_shards.start]), sum(sizes)

    def epoch(self, number: int) -> Generator[Batch, None, None]:
        """Give the batches of one epoch; the same seed and epoch give the same batches in the same order.

        Raises TrainingError where a file is missing or damaged, or they have fewer or more rows than the manifest says.
        """
        with ExitStack() as readers:
            parts = []
            for shard in self._local_shards:
                parts.append(self._part(number, shard))
                readers.enter_context(closing(parts[-1]))
            for _ in range(self.steps):
                pixels, targets = zip(*(next(part) for part in parts), strict=True)
                yield torch.from_numpy(np.concatenate(pixels)), torch.from_numpy(np.concatenate(targets))

    def _part(self, number: int, shard: int) -> Generator[RowGroup, None, None]:
        """Give one shard's rows of each step."""
        buffered: list[RowGroup] = []
        waiting = 0
        with closing(self._row_groups(number, shard)) as groups:
            for size in self._rows_of_steps[shard]:
                while waiting < size:
                    buffered.append(next(groups))
                    waiting += len(buffered[-1][1])
                part, buffered = _take(buffered, size)
                waiting -= size
                yield part

    def _row_groups(self, epoch: int, shard: int) -> Generator[RowGroup, None, None]:
        reader = open_reader(
            self._files,
            schema_fields=[f"^{TARGET}$", f"^{cols.PIXELS_COLUMN}$"],
            reader_pool_type="thread",
            # One worker gives row groups in a fixed order; several race at the start of each epoch.
            workers_count=1,
            # Row groups read ahead; one of the default 256 rows takes 16 MB.
            results_queue_size=5,
            shuffle_row_groups=self._shuffle,
            shuffle_rows=self._shuffle,
            seed=_epoch_seed(self._seed, epoch) if self._shuffle else None,
            num_epochs=1,
            cur_shard=shard,
            shard_count=self._shards,
        )
        seen, since, expected = 0, time.monotonic(), sum(self._rows_of_steps[shard])
        try:
            while seen < expected:
                try:
                    group = next(reader)
                except StopIteration:
                    # Petastorm may report the end before its threads have started: it checks first whether all
                    # work is finished and then whether all was assigned, and both can be true in turn.
                    if time.monotonic() - since > STALLED_SECONDS:
                        raise TrainingError(
                            f"the snapshot gave {seen} of {expected} rows: its files are not those of the manifest"
                        ) from None
                    time.sleep(0.01)
                    continue
                pixels = np.frombuffer(bytearray().join(getattr(group, cols.PIXELS_COLUMN)), dtype=np.uint8)
                targets = np.asarray(getattr(group, TARGET), dtype=np.int64)
                seen, since = seen + len(targets), time.monotonic()
                yield pixels.reshape(len(targets), cols.SIDE, cols.SIDE), targets
            if seen > expected:
                raise TrainingError(f"the snapshot gave {seen} rows, its manifest says {expected}")
        finally:
            # Not as a context manager: its exit prints a line.
            reader.stop()
            reader.join()


def _shards(groups: int, world: int) -> int:
    """Choose the number of shards: the same for one, two and four processes, where there are enough row groups."""
    fixed = next(count for count in (_SHARDS, 2, 1) if count <= groups)
    shared = math.lcm(fixed, world)
    return shared if shared <= groups else world


def _even(rows: int, steps: int) -> list[int]:
    even, more = divmod(rows, steps)
    return [even + 1] * more + [even] * (steps - more)


def _take(buffered: list[RowGroup], size: int) -> tuple[RowGroup, list[RowGroup]]:
    """Split off the first `size` rows."""
    pixels, targets, rest = [], [], []
    for group_pixels, group_targets in buffered:
        cut = min(size, len(group_targets))
        if cut:
            pixels.append(group_pixels[:cut])
            targets.append(group_targets[:cut])
        if cut < len(group_targets):
            rest.append((group_pixels[cut:], group_targets[cut:]))
        size -= cut
    return (np.concatenate(pixels), np.concatenate(targets)), rest


def _epoch_seed(seed: int, epoch: int) -> int:
    """Derive the seed of an epoch, never 0."""
    return 1 + int.from_bytes(hashlib.sha256(f"{seed}:{epoch}".encode()).digest()[:4], "big") // 2
