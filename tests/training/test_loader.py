"""Loaders give every row once an epoch, and every process equal steps; nothing that was planted is unpickled."""

import contextlib
import itertools
import json
import pickle
import sys
import threading
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from cbmir_spark import storage
from cbmir_spark.config import StorageSettings
from cbmir_spark.errors import TrainingError
from cbmir_spark.models import networks
from cbmir_spark.storage import ObjectStore
from cbmir_spark.training import loader as training_loader
from cbmir_spark.training import loop
from cbmir_spark.training.course import Fitting
from cbmir_spark.training.loader import Loader
from cbmir_spark.training.manifest import FORMAT, TEST, TRAIN, VALIDATION, DataFile, Snapshot

LOCAL = StorageSettings(endpoint=None, region="us-east-1", path_style=True, attempts=8)


def write_split(folder: Path, files: list[list[int]]) -> Snapshot:
    """A snapshot whose train split has one file per list, with row groups of the listed sizes; rows are numbered."""
    number, data = 0, []
    (folder / "train").mkdir(parents=True)
    for index, groups in enumerate(files):
        path = f"train/part-{index:05d}.parquet"
        schema = pa.schema([("target", pa.int64()), ("pixels", pa.binary())])
        with pq.ParquetWriter(folder / path, schema) as writer:
            for rows in groups:
                pixels = np.zeros((rows, 65_536), dtype=np.uint8)
                pixels[:, :2] = np.arange(number, number + rows, dtype="<u2").reshape(-1, 1).view(np.uint8)
                targets = [(number + row) % 3 for row in range(rows)]
                writer.write_table(
                    pa.table([targets, [row.tobytes() for row in pixels]], schema=schema), row_group_size=rows
                )
                number += rows
        data.append(DataFile(path, tuple(groups), "-"))
    return Snapshot(
        format=FORMAT,
        digest="d",
        uri=storage.canonical(str(folder)),
        label="body_part",
        classes=("A", "B", "C"),
        possible={},
        preprocessing="px1",
        images={},
        patients={},
        single_patient_classes=(),
        left_out={},
        versions={},
        files={TRAIN: tuple(data), VALIDATION: (), TEST: ()},
    )


def numbers(loader: Loader, epoch: int = 0) -> list[list[int]]:
    """The row numbers of each batch, after a check that each row came with its class."""
    batches = []
    for pixels, targets in loader.epoch(epoch):
        assert pixels.shape[1:] == (256, 256) and len(pixels) == len(targets)
        rows = pixels.reshape(len(pixels), -1)[:, :2].contiguous().numpy().view("<u2").ravel()
        assert [int(row) % 3 for row in rows] == targets.tolist()
        batches.append([int(row) for row in rows])
    return batches


def flat(batches: list[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(batches))


def test_loader_gives_every_row_once_an_epoch_in_even_batches(tmp_path: Path) -> None:
    snapshot = write_split(tmp_path, [[40, 25], [3]])
    loader = Loader(snapshot, TRAIN, ObjectStore(LOCAL), batch_size=16, seed=1)
    batches = numbers(loader)
    assert loader.steps == len(batches) == 5
    assert sorted(map(len, batches)) == [13, 13, 14, 14, 14]
    assert sorted(flat(batches)) == list(range(68))


def test_loader_shuffles_by_seed_and_epoch_and_repeats_itself(tmp_path: Path) -> None:
    snapshot = write_split(tmp_path, [[20] * 6])

    def order(seed: int, epoch: int) -> list[int]:
        return flat(numbers(Loader(snapshot, TRAIN, ObjectStore(LOCAL), batch_size=16, seed=seed), epoch))

    first = order(1, 0)
    assert first == order(1, 0)
    assert first != order(1, 1) and first != order(2, 0)
    # Both the row groups and the rows within them are out of order.
    assert [row // 20 for row in first[::20]] != sorted(row // 20 for row in first[::20])
    assert first[:20] != sorted(first[:20])
    straight = Loader(snapshot, TRAIN, ObjectStore(LOCAL), batch_size=16, seed=1, shuffle=False)
    assert numbers(straight, 0) == numbers(straight, 1)
    # Each batch is put together from four shards, and each of them gives its rows as they lie.
    shards = [[row for row in flat(numbers(straight)) if row // 20 % 4 == shard] for shard in range(4)]
    assert [sorted(rows) for rows in shards] == shards and sum(map(len, shards)) == 120


def test_the_batch_of_a_step_does_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    snapshot = write_split(tmp_path, [[20, 7, 20, 13], [9, 20, 20, 16]])

    def loaders(world: int) -> list[Loader]:
        return [
            Loader(snapshot, TRAIN, ObjectStore(LOCAL), batch_size=16, seed=1, rank=rank, world=world)
            for rank in range(world)
        ]

    (alone,) = loaders(1)
    whole = numbers(alone)
    for world in (2, 4):
        each = loaders(world)
        shares = [numbers(loader) for loader in each]
        for step, batch in enumerate(whole):
            assert flat([share[step] for share in shares]) == batch
            spans = [loader.span(step) for loader in each]
            assert {total for _, total in spans} == {len(batch)} == {alone.span(step)[1]}
            assert [batch[first:][: len(share[step])] for (first, _), share in zip(spans, shares, strict=True)] == [
                share[step] for share in shares
            ]
    # Three processes do not divide four shards; six do, for each process two.
    assert sorted(flat([row for loader in loaders(3) for row in numbers(loader)])) == sorted(flat(whole))


def test_uneven_shards_have_equal_steps_and_lose_no_row(tmp_path: Path) -> None:
    snapshot = write_split(tmp_path, [[100, 37]])
    shards = [Loader(snapshot, TRAIN, ObjectStore(LOCAL), batch_size=46, seed=1, rank=rank, world=2) for rank in (0, 1)]
    assert [loader.rows for loader in shards] == [100, 37]
    batches = [numbers(loader) for loader in shards]
    assert [len(each) for each in batches] == [3, 3] == [loader.steps for loader in shards]
    assert sorted(flat(batches[0]) + flat(batches[1])) == list(range(137))


def _one_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    (Path(folder) / f"{rank}.json").write_text(json.dumps(_losses(Path(folder), rank, 2)))
    dist.destroy_process_group()


def _losses(folder: Path, rank: int, world: int) -> list[float]:
    snapshot = write_split(folder / f"split {rank} of {world}", [[100, 37]])
    loader = Loader(snapshot, TRAIN, ObjectStore(LOCAL), batch_size=46, seed=1, rank=rank, world=world)
    torch.manual_seed(1)
    how = Fitting("sgd", learning_rate=1e-3, weight_decay=0.0, epochs=3, class_weights=(1.0,) * 3, seed=1)
    history = loop.fit(networks.build("alexnet-small", 3), loop.Loaders(loader, None), how)
    return [epoch.loss for epoch in history.epochs]


def test_two_processes_with_uneven_shards_both_come_to_the_end(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_one_of_two, args=(str(tmp_path),), nprocs=2)
    one, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert one == other and len(one) == 3 and np.isfinite(one).all()


def test_no_batch_has_a_single_row(tmp_path: Path) -> None:
    """65 rows in batches of 64 would end in one row, of which batch normalisation knows no variance."""
    loader = Loader(write_split(tmp_path, [[65]]), TRAIN, ObjectStore(LOCAL), batch_size=64, seed=1)
    assert sorted(map(len, numbers(loader))) == [32, 33]


def test_leaving_an_epoch_early_ends_the_readers_threads(tmp_path: Path) -> None:
    loader = Loader(write_split(tmp_path, [[10] * 20]), TRAIN, ObjectStore(LOCAL), batch_size=5, seed=1)
    before = threading.active_count()
    epoch = loader.epoch(0)
    next(epoch)
    assert threading.active_count() > before
    epoch.close()
    assert threading.active_count() == before
    assert len(numbers(loader, 1)) == loader.steps


def test_seed_zero_and_more_processes_than_row_groups_are_refused(tmp_path: Path) -> None:
    snapshot = write_split(tmp_path, [[10]])
    with pytest.raises(TrainingError, match=r"seed 0.*1 up"):
        Loader(snapshot, TRAIN, ObjectStore(LOCAL), batch_size=4, seed=0)
    with pytest.raises(TrainingError, match=r"1 row group\(s\) for 2 processes"):
        Loader(snapshot, TRAIN, ObjectStore(LOCAL), batch_size=4, seed=1, rank=0, world=2)


def test_files_with_fewer_rows_than_the_manifest_says_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_loader, "STALLED_SECONDS", 0.2)
    snapshot = write_split(tmp_path, [[10, 10]])
    other = write_split(tmp_path / "other", [[10, 9]])
    (tmp_path / "train/part-00000.parquet").write_bytes((tmp_path / "other/train/part-00000.parquet").read_bytes())
    assert other.rows(TRAIN) == 19
    with pytest.raises(TrainingError, match=r"gave 9 of 10 rows"):
        numbers(Loader(snapshot, TRAIN, ObjectStore(LOCAL), batch_size=4, seed=1))


class _Hostile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return eval, (f"open({str(self.path)!r}, 'w').close()",)


def test_a_pickle_planted_in_the_folder_is_never_run(tmp_path: Path) -> None:
    """Petastorm unpickles the schema it finds in a folder's `_common_metadata`; it is never given a folder."""
    snapshot = write_split(tmp_path, [[10]])
    bait = tmp_path / "executed"
    schema = pa.schema([("target", pa.int64())]).with_metadata(
        {b"dataset-toolkit.unischema.v1": pickle.dumps(_Hostile(bait))}
    )
    for folder in (tmp_path, tmp_path / "train"):
        pq.write_metadata(schema, folder / "_common_metadata")
    assert len(numbers(Loader(snapshot, TRAIN, ObjectStore(LOCAL), batch_size=5, seed=1))) == 2
    assert not bait.exists()
    # The bait is a real one: a summary file is all it takes.
    summary = SimpleNamespace(common_metadata=pq.read_metadata(tmp_path / "train" / "_common_metadata"))
    with contextlib.suppress(Exception):
        sys.modules["petastorm.etl.dataset_metadata"].get_schema(summary)
    assert bait.exists()
