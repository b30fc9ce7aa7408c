"""Read a snapshot's row groups through Petastorm, shuffled and sharded."""

import hashlib
import math
import time
import warnings
from collections.abc import Generator, Sequence
from contextlib import ExitStack, closing
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cbmir_spark import storage
from cbmir_spark.errors import TrainingError
from cbmir_spark.lake import columns as cols
from cbmir_spark.storage import ObjectStore
from cbmir_spark.training.loop import Batch
from cbmir_spark.training.manifest import TARGET, Snapshot

_STALLED_SECONDS = 120.0
# Shards that the batch of a step is put together from, each read by a thread of its own.
_SHARDS = 4

with warnings.catch_warnings():
    # distutils and pyarrow's old file systems, at import.
    warnings.simplefilter("ignore")
    from petastorm import make_batch_reader

# The same at each row group read. Only petastorm's own modules are silenced.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"petastorm\.")

RowGroup = tuple[NDArray[np.uint8], NDArray[np.int64]]


class Loader:
    """One process's share of a split, as (uint8 (n, 256, 256), int64 (n,)) batches of pixels and class numbers.

    Row groups are dealt out to shards in turn, and shards to processes; every shard is cut into the same number of
    batches of even size, and the batch of a step is what all shards give to it, in their order. So no row is dropped,
    none is seen twice in an epoch, no process waits for one that has run out, and the batch of a step is the same for
    any number of processes that divides the number of shards. A process has two rows at least, as batch normalisation
    needs. Each epoch opens fresh readers (Petastorm cannot begin again in mid-epoch) and closes them on every way out.
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
        """`batch_size` is that of a step, over all `world` processes."""
        if seed < 1:
            raise TrainingError(f"seed {seed}: give one from 1 up; Petastorm takes 0 for no seed")
        files = snapshot.files[split]
        groups = [rows for file in files for rows in file.groups]
        if len(groups) < world:
            raise TrainingError(
                f"the {split} split has {len(groups)} row group(s) for {world} processes: "
                "lower training.processes or dataset.rows_per_group"
            )
        self._shards = _shards(len(groups), world)
        # Petastorm's rule of who reads what; `_row_groups` checks that it was kept.
        shares = [sum(groups[shard :: self._shards]) for shard in range(self._shards)]
        self.steps = max(1, min(-(-sum(shares) // batch_size), min(shares) // 2))
        self._sizes = [_even(share, self.steps) for share in shares]
        each = self._shards // world
        self._own = range(rank * each, (rank + 1) * each)
        self.rows = sum(shares[shard] for shard in self._own)
        self._files = [storage.join(snapshot.uri, file.path) for file in files]
        self._store = store
        self._seed, self._shuffle = seed, shuffle

    def span(self, step: int) -> tuple[int, int]:
        """Where this process's rows begin in the whole batch of a step, and how many rows that batch has."""
        sizes = [shard[step] for shard in self._sizes]
        return sum(sizes[: self._own.start]), sum(sizes)

    def epoch(self, number: int) -> Generator[Batch, None, None]:
        """The batches of one epoch; the same seed and epoch give the same batches in the same order.

        Raises TrainingError where the files do not hold the rows that the manifest promises.
        """
        with ExitStack() as readers:
            parts = []
            for shard in self._own:
                parts.append(self._part(number, shard))
                readers.enter_context(closing(parts[-1]))
            for _ in range(self.steps):
                pixels, targets = zip(*(next(part) for part in parts), strict=True)
                yield torch.from_numpy(np.concatenate(pixels)), torch.from_numpy(np.concatenate(targets))

    def _part(self, number: int, shard: int) -> Generator[RowGroup, None, None]:
        """What one shard gives to each step."""
        held: list[RowGroup] = []
        waiting = 0
        with closing(self._row_groups(number, shard)) as groups:
            for size in self._sizes[shard]:
                while waiting < size:
                    held.append(next(groups))
                    waiting += len(held[-1][1])
                part, held = _take(held, size)
                waiting -= size
                yield part

    def _row_groups(self, epoch: int, shard: int) -> Generator[RowGroup, None, None]:
        urls, filesystem = _petastorm_place(self._files, self._store)
        reader = make_batch_reader(
            urls,
            schema_fields=[f"^{TARGET}$", f"^{cols.PIXELS_COLUMN}$"],
            reader_pool_type="thread",
            # With one worker row groups come in one order; more of them race at the start of each epoch.
            workers_count=1,
            # Row groups read ahead, 16 MB each with the usual 256 rows.
            results_queue_size=5,
            shuffle_row_groups=self._shuffle,
            shuffle_rows=self._shuffle,
            seed=_epoch_seed(self._seed, epoch) if self._shuffle else None,
            num_epochs=1,
            cur_shard=shard,
            shard_count=self._shards,
            filesystem=filesystem,
        )
        seen, since, promised = 0, time.monotonic(), sum(self._sizes[shard])
        try:
            while seen < promised:
                try:
                    group = next(reader)
                except StopIteration:
                    # Petastorm may say that it is done before its threads have begun: it asks first whether
                    # all work is done and then whether all was handed out, and both can be true in turn.
                    if time.monotonic() - since > _STALLED_SECONDS:
                        raise TrainingError(
                            f"the snapshot gave {seen} of {promised} rows: its files are not those of the manifest"
                        ) from None
                    time.sleep(0.01)
                    continue
                pixels = np.frombuffer(bytearray().join(getattr(group, cols.PIXELS_COLUMN)), dtype=np.uint8)
                targets = np.asarray(getattr(group, TARGET), dtype=np.int64)
                seen, since = seen + len(targets), time.monotonic()
                yield pixels.reshape(len(targets), cols.SIDE, cols.SIDE), targets
            if seen > promised:
                raise TrainingError(f"the snapshot gave {seen} rows, its manifest says {promised}")
        finally:
            # Not as a context manager: its exit prints a line.
            reader.stop()
            reader.join()


def _shards(groups: int, world: int) -> int:
    """Into how many shards row groups are dealt out: the same for one, two and four processes, if there are enough."""
    fixed = next(count for count in (_SHARDS, 2, 1) if count <= groups)
    shared = math.lcm(fixed, world)
    return shared if shared <= groups else world


def _even(rows: int, steps: int) -> list[int]:
    even, more = divmod(rows, steps)
    return [even + 1] * more + [even] * (steps - more)


def _take(held: list[RowGroup], size: int) -> tuple[RowGroup, list[RowGroup]]:
    """The first `size` rows of what is held, and the rest."""
    pixels, targets, rest = [], [], []
    for group_pixels, group_targets in held:
        cut = min(size, len(group_targets))
        if cut:
            pixels.append(group_pixels[:cut])
            targets.append(group_targets[:cut])
        if cut < len(group_targets):
            rest.append((group_pixels[cut:], group_targets[cut:]))
        size -= cut
    return (np.concatenate(pixels), np.concatenate(targets)), rest


def _epoch_seed(seed: int, epoch: int) -> int:
    """A seed of its own for each epoch, never 0."""
    return 1 + int.from_bytes(hashlib.sha256(f"{seed}:{epoch}".encode()).digest()[:4], "big") // 2


def _petastorm_place(uris: Sequence[str], store: ObjectStore) -> tuple[list[str], Any]:
    """The URLs, and the file system where Petastorm cannot find it by itself."""
    if all(storage.is_local(uri) for uri in uris):
        return list(uris), None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        # Only pyarrow's old file systems select the old reader, which is the one that Petastorm knows.
        from pyarrow.filesystem import S3FSWrapper

        wrapped = S3FSWrapper(store.file_system())
    return [uri.replace("s3a://", "s3://", 1) for uri in uris], wrapped
