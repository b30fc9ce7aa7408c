"""Snapshots split by patient and written once; loaders that give every row once and every process equal steps."""

import contextlib
import hashlib
import itertools
import json
import os
import pickle
import random
import threading
from collections import Counter
from datetime import timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pydicom
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from pydicom.data import get_testdata_file
from pyspark.sql import SparkSession

from cbmir_spark import storage
from cbmir_spark.config import Settings, StorageSettings
from cbmir_spark.errors import TrainingError
from cbmir_spark.ingest import job as ingest_job
from cbmir_spark.lake import columns as cols
from cbmir_spark.lake import delta, publication, schemas
from cbmir_spark.lake.paths import LakePaths
from cbmir_spark.models import networks
from cbmir_spark.storage import ObjectStore
from cbmir_spark.training import loader as training_loader
from cbmir_spark.training import loop
from cbmir_spark.training import snapshot as snapshots
from cbmir_spark.training.loader import Loader
from cbmir_spark.training.manifest import FORMAT, TEST, TRAIN, VALIDATION, DataFile, Snapshot
from cbmir_spark.training.split import split_patients
from tests.support.archives import at
from tests.support.tiny_lake import Drawn, draw, pseudonym, publish

LOCAL = StorageSettings(endpoint=None, region="us-east-1", path_style=True, attempts=8)


def images_of(patients: dict[str, list[str]]) -> pd.DataFrame:
    rows = [(patient, label, 3) for label, members in patients.items() for patient in members]
    return pd.DataFrame(rows, columns=["patient_id", "label", "n"])


# The split


def test_split_takes_the_asked_share_of_each_class_and_keeps_lonely_patients_in_train() -> None:
    patients = {"CT/CHEST": [f"a{i}" for i in range(20)], "MR/HEAD": [f"b{i}" for i in range(10)], "US/LIVER": ["c"]}
    side = split_patients(images_of(patients), test_fraction=0.3, validation_fraction=0.1, seed=1)
    count = {label: Counter(side[p] for p in members) for label, members in patients.items()}
    assert count["CT/CHEST"] == {TEST: 6, VALIDATION: 2, TRAIN: 12}
    assert count["MR/HEAD"] == {TEST: 3, VALIDATION: 1, TRAIN: 6}
    assert count["US/LIVER"] == {TRAIN: 1}


def test_split_depends_on_seed_and_ids_alone() -> None:
    frame = images_of({"A": [f"p{i}" for i in range(30)], "B": [f"p{i}" for i in range(20, 50)]})
    shuffled = frame.sample(frac=1.0, random_state=3)
    assert split_patients(frame, 0.3, 0.0, 1) == split_patients(shuffled, 0.3, 0.0, 1)
    assert split_patients(frame, 0.3, 0.0, 1) != split_patients(frame, 0.3, 0.0, 2)


@pytest.mark.parametrize("seed", range(1, 41))
def test_split_keeps_every_class_in_train_and_in_test_wherever_one_move_could(seed: int) -> None:
    """Random overlaps of classes: patients may have several labels, as with CT of chest and abdomen."""
    draws = random.Random(seed)
    names = [f"p{i}" for i in range(draws.randint(2, 12))]
    patients = {label: draws.sample(names, draws.randint(1, min(4, len(names)))) for label in "ABCDE"}
    side = split_patients(images_of(patients), 0.3, 0.15, seed)
    assert set(side) == {p for members in patients.values() for p in members}
    in_train = {label: {p for p in members if side[p] == TRAIN} for label, members in patients.items()}
    assert all(in_train.values())
    for label, members in patients.items():
        if len(members) > 1 and not any(side[p] == TEST for p in members):
            # Each patient who could serve is the last one in train of some class.
            for p in in_train[label]:
                assert any(in_train[other] == {p} for other, who in patients.items() if p in who)


def test_split_first_takes_who_serves_several_classes() -> None:
    """Both classes share one patient: whichever is looked at first, one test patient can serve both."""
    side = split_patients(images_of({"A": ["both", "a"], "B": ["both", "b"]}), 0.3, 0.0, 1)
    assert side == {"both": TEST, "a": TRAIN, "b": TRAIN}


# The loader


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
        lonely=(),
        left_out={},
        versions={},
        files={TRAIN: tuple(data), VALIDATION: (), TEST: ()},
    )


def numbers(loader: Loader, epoch: int = 0) -> list[list[int]]:
    """The row numbers of each batch, after a check that each row came with its own class."""
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
    assert [len(own) for own in batches] == [3, 3] == [loader.steps for loader in shards]
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
    how = loop.Fitting("sgd", learning_rate=1e-3, weight_decay=0.0, epochs=3, class_weights=(1.0,) * 3, seed=1)
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
    monkeypatch.setattr(training_loader, "_STALLED_SECONDS", 0.2)
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
    # The bait is a real one: a folder is all it takes.
    with contextlib.suppress(Exception):
        training_loader.make_batch_reader((tmp_path / "train").as_uri())
    assert bait.exists()


# The snapshot


def some_images() -> list[Drawn]:
    plain = [
        Drawn(f"{modality}{part}{patient}{number}", f"{modality}{part}{patient}", modality, part)
        for modality, part, patients in (("CT", "CHEST", 4), ("MR", "HEAD", 3), ("US", "LIVER", 1))
        for patient in range(patients)
        for number in range(3)
    ]
    kept_out = [
        Drawn("burned", "x", "CT", "CHEST", burned_in="YES", text_risk=True),
        Drawn("of an older row", "x", "CT", "CHEST", burned_in="UNKNOWN", text_risk=None),
        Drawn("scout", "x", "CT", "CHEST", kind="localizer"),
        Drawn("untagged", "x", "MR", "UNKNOWN"),
        Drawn("rare", "x", "CT", "KNEE"),
    ]
    return [*plain, Drawn("volume", "CTCHEST0", "CT", "CHEST", frames=5), *kept_out]


@pytest.fixture(scope="module")
def lake_and_settings(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> tuple[LakePaths, Settings]:
    from cbmir_spark import config

    folder = tmp_path_factory.mktemp("lake")
    overrides = [f"lake.uri={folder / 'lake'}", "dataset.min_images=3", "dataset.rows_per_group=4", *SPLIT]
    settings = config.load(overrides=overrides, environ={})
    return publish(spark, settings, some_images()), settings


SPLIT = ("dataset.test_fraction=0.3", "dataset.validation_fraction=0")


def make(spark: SparkSession, lake: LakePaths, settings: Settings) -> Snapshot:
    return snapshots.snapshot(
        spark, lake, publication.require_published(spark, lake), settings.dataset, ObjectStore(settings.storage)
    )


def content(snapshot: Snapshot, split: str) -> pd.DataFrame:
    folder = Path(storage.local_path(snapshot.uri))
    return pd.concat([pq.read_table(folder / file.path).to_pandas() for file in snapshot.files[split]])


def test_snapshot_holds_every_usable_frame_once_and_no_patient_twice(
    spark: SparkSession, lake_and_settings: tuple[LakePaths, Settings]
) -> None:
    snapshot = make(spark, *lake_and_settings)
    assert snapshot.classes == ("CT/CHEST", "MR/HEAD", "US/LIVER")
    assert snapshot.possible == {"CT": ("CT/CHEST",), "MR": ("MR/HEAD",), "US": ("US/LIVER",)}
    assert snapshot.lonely == ("US/LIVER",) and snapshot.left_out == {"CT/KNEE": 1}
    train, test = content(snapshot, TRAIN), content(snapshot, TEST)
    assert not set(train.patient_id) & set(test.patient_id)
    assert set(test.label) == {"CT/CHEST", "MR/HEAD"}
    rows = pd.concat([train, test])
    expected = {
        (pseudonym(image.name), frame): draw(image, frame).tobytes()
        for image in some_images()[:-5]
        for frame in range(image.frames)
    }
    assert len(rows) == len(expected) == snapshot.rows(TRAIN) + snapshot.rows(TEST)
    assert {(row.image_id, row.frame): row.pixels for row in rows.itertuples()} == expected
    assert all(snapshot.classes[row.target] == row.label for row in rows.itertuples())
    # Rows lie in random order: a row group is a fair sample, not one class.
    assert any(a != b for a, b in zip(train.label, sorted(train.label), strict=True))


def test_rows_of_older_lakes_are_left_out_unless_the_policy_includes_them(
    spark: SparkSession, lake_and_settings: tuple[LakePaths, Settings]
) -> None:
    lake, _ = lake_and_settings
    pinned = publication.require_published(spark, lake)
    pixels = delta.read(spark, lake.path(schemas.PIXELS), pinned.pixels)
    tags = delta.read(spark, lake.path(schemas.TAGS), pinned.tags)
    older = tags.drop(cols.TEXT_RISK)
    assert pixels.transform(snapshots.labelled(older, "body_part")).isEmpty()
    included = pixels.transform(snapshots.labelled(older, "body_part", "include")).count()
    assert included == pixels.transform(snapshots.labelled(tags, "body_part", "include")).count()
    assert included == pixels.transform(snapshots.labelled(tags, "body_part")).count() + 2


def test_snapshot_manifest_says_what_the_files_hold(
    spark: SparkSession, lake_and_settings: tuple[LakePaths, Settings]
) -> None:
    snapshot = make(spark, *lake_and_settings)
    folder = Path(storage.local_path(snapshot.uri))
    for split in (TRAIN, TEST):
        for file in snapshot.files[split]:
            footer = pq.read_metadata(folder / file.path)
            groups = [footer.row_group(i).num_rows for i in range(footer.num_row_groups)]
            assert groups == list(file.groups) and max(groups) <= 4
        assert sum(snapshot.images[split].values()) == snapshot.rows(split)
    assert Snapshot.from_json((folder / "manifest.json").read_bytes(), snapshot.uri) == snapshot


def test_snapshot_is_written_once_and_found_again(
    spark: SparkSession, lake_and_settings: tuple[LakePaths, Settings]
) -> None:
    lake, settings = lake_and_settings
    first = make(spark, lake, settings)
    folder = Path(storage.local_path(first.uri))
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    # A batch with nothing to learn from moves the Delta versions and leaves the rows as they are.
    publish(spark, settings, [Drawn("late scout", "y", "CT", "CHEST", kind="localizer")], batch=2)
    again = make(spark, lake, settings)
    assert again == first
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before


def test_an_unfinished_snapshot_is_written_again_to_the_same_bytes(
    spark: SparkSession, lake_and_settings: tuple[LakePaths, Settings]
) -> None:
    first = make(spark, *lake_and_settings)
    folder = Path(storage.local_path(first.uri))
    (folder / "manifest.json").unlink()
    (folder / "train" / "part-00099.parquet").write_bytes(b"left by a killed job")
    again = make(spark, *lake_and_settings)
    assert again.files == first.files
    assert not (folder / "train" / "part-00099.parquet").exists()


def test_snapshot_errors_name_the_cause(
    spark: SparkSession, lake_and_settings: tuple[LakePaths, Settings], tmp_path: Path
) -> None:
    lake, settings = lake_and_settings

    def ask(where: LakePaths, **changes: object) -> None:
        chosen = settings.model_copy(update={"dataset": settings.dataset.model_copy(update=changes)})
        make(spark, where, chosen)

    with pytest.raises(TrainingError, match=r"1 class\(es\).*\(CT/CHEST\).*MR/HEAD \(9\).*Two are needed"):
        ask(lake, min_images=10)
    with pytest.raises(TrainingError, match=r"0 class\(es\).*\(none\).*US/LIVER \(3\)"):
        ask(lake, min_images=100)
    small = settings.model_copy(update={"lake": settings.lake.model_copy(update={"uri": str(tmp_path / "lake")})})
    own = publish(spark, small, [Drawn(name, name, "CT", "UNKNOWN") for name in "abc"])
    with pytest.raises(TrainingError, match="every body part is UNKNOWN"):
        ask(own)
    publish(spark, small, [Drawn("d", "d", "CT", "CHEST"), Drawn("e", "e", "MR", "HEAD")], batch=2)
    with pytest.raises(TrainingError, match="the test split is empty: no class has enough patients"):
        ask(own, min_images=1)
    with pytest.raises(TrainingError, match=r"validation split is empty.*validation_fraction=0"):
        ask(own, min_images=1, test_fraction=0.0, validation_fraction=0.2)


# After an update of the lake


def write_slice(archive: Path, number: int, part: str, turned: int = 0, hour: int = 1) -> Path:
    """An image of patient `number` in four, whose pixels are like no other's; `turned` makes others of them."""
    image = pydicom.dcmread(str(get_testdata_file("CT_small.dcm")))
    image.PatientID, image.BodyPartExamined = f"patient {number % 4}", part
    image.StudyInstanceUID, image.SeriesInstanceUID = f"1.2.3.{number % 4}", f"1.2.3.{number % 4}.{len(part)}"
    image.SOPInstanceUID = image.file_meta.MediaStorageSOPInstanceUID = f"1.2.3.4.{len(part)}.{number}"
    image.PixelData = np.roll(image.pixel_array, 8 * number + turned + len(part), axis=1).tobytes()
    path = archive / part / f"{number}.dcm"
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save_as(path)
    os.utime(path, (at(hour).timestamp(),) * 2)
    return path


def digests(snapshot: Snapshot) -> list[str]:
    """Of the pixels of every row that the loaders of both splits give."""
    found = []
    for split in (TRAIN, TEST):
        for pixels, _ in Loader(snapshot, split, ObjectStore(LOCAL), batch_size=4, seed=1).epoch(0):
            found += [hashlib.sha256(row.tobytes()).hexdigest() for row in pixels.numpy()]
    return sorted(found)


def test_rows_of_files_that_delta_removed_are_in_no_snapshot_and_in_no_batch(
    spark: SparkSession, tmp_path: Path
) -> None:
    """Their files stay in the table's folder, where whoever reads folders finds them."""
    from cbmir_spark import config

    archive = tmp_path / "archive"
    for number in range(8):
        for part in ("CHEST", "HEAD"):
            write_slice(archive, number, part)
    own = [f"lake.uri={tmp_path / 'lake'}", f"ingest.archive={archive}"]
    settings = config.load(overrides=[*own, "dataset.min_images=2", "dataset.rows_per_group=2", *SPLIT], environ={})
    ingest_job.run(spark, settings)
    lake = LakePaths.of(settings.lake)
    before = digests(make(spark, lake, settings))
    assert len(set(before)) == 16

    write_slice(archive, 1, "CHEST", turned=64, hour=30)
    (archive / "HEAD" / "2.dcm").unlink()
    report = ingest_job.run(spark, settings)
    assert (report.read, report.deleted) == (1, 1)
    pinned = publication.require_published(spark, lake)
    pixels = delta.read(spark, lake.path(schemas.PIXELS), pinned.pixels)
    live = sorted(row[cols.PIXEL_DIGEST] for row in pixels.select(cols.PIXEL_DIGEST).collect())
    named = {storage.local_path(uri) for uri in delta.live_files(spark, lake.path(schemas.PIXELS), pinned.pixels)}
    removed = {str(file) for file in Path(storage.local_path(lake.path(schemas.PIXELS))).rglob("*.parquet")} - named
    left = {digest for file in removed for digest in pq.read_table(file)[cols.PIXEL_DIGEST].to_pylist()}
    dead = left - set(live)
    assert len(dead) == 2 and dead < set(before), "nothing to be read by mistake"

    snapshot = make(spark, lake, settings)
    assert digests(snapshot) == live and len(live) == 15
    rows = pd.concat([content(snapshot, split) for split in (TRAIN, TEST)])
    assert sorted(hashlib.sha256(row).hexdigest() for row in rows.pixels) == live
    ids = [row[cols.IMAGE_ID] for row in pixels.select(cols.IMAGE_ID).collect()]
    assert sorted(rows.image_id) == sorted(ids)
