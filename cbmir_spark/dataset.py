"""Training snapshots, and the Petastorm loaders that read them; the only module that imports petastorm.

A snapshot is TAGS ⋈ PIXELS at pinned Delta versions, labelled, split by patient, and written once:

    <lake>/snapshots/<digest>/{train,validation,test}/part-00000.parquet …   shuffled rows, small row groups
    <lake>/snapshots/<digest>/manifest.json                                  written last: it makes the rest count

Petastorm knows nothing of Delta's log and unpickles what it finds in a dataset's folder, so it is given the
files that the manifest names and never a folder.
"""

import hashlib
import json
import math
import time
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from cbmir_spark import storage
from cbmir_spark import tables as t
from cbmir_spark.config import Choice, DatasetSettings, StorageSettings
from cbmir_spark.errors import TrainingError
from cbmir_spark.fitting import Batch
from cbmir_spark.model import UNKNOWN, LabelKind

with warnings.catch_warnings():
    # distutils and pyarrow's old file systems, at import; nobody here can mend them.
    warnings.simplefilter("ignore")
    from petastorm import make_batch_reader

# The same at each row group read. Only petastorm's own modules are silenced.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"petastorm\.")

FORMAT = 1
MANIFEST = "manifest.json"
TRAIN, VALIDATION, TEST = "train", "validation", "test"
SPLITS = (TRAIN, VALIDATION, TEST)

LABEL = "label"
TARGET = "target"
SPLIT = "split"
_IMAGES = "n"
_KEY = "key"
_PART = "part"
# What a frame belongs to: the split goes by patient, erasure by any of them.
_OWNERS = (t.SERIES_ID, t.STUDY_ID, t.PATIENT_ID)

# A small split is cut finer than `rows_per_group`, so that up to eight processes have something to read.
_LEAST_GROUPS = 8
_GROUPS_PER_FILE = 8
_STALLED_SECONDS = 120.0
# Shards that the batch of a step is put together from, each read by a thread of its own.
_SHARDS = 4

RowGroup = tuple[NDArray[np.uint8], NDArray[np.int64]]


@dataclass(frozen=True)
class DataFile:
    """One Parquet file of a split: its place below the snapshot, and the rows of each row group."""

    path: str
    groups: tuple[int, ...]
    sha256: str


@dataclass(frozen=True)
class Snapshot:
    """What a snapshot's manifest says.

    `possible` names the classes that occur with each modality, `images` counts frames by split and class,
    `lonely` are the classes with a single patient (who is in the train split), `left_out` the labels with
    fewer frames than asked for, `versions` the Delta versions the snapshot was first written from.
    """

    format: int
    digest: str
    uri: str
    label: LabelKind
    classes: tuple[str, ...]
    possible: Mapping[str, tuple[str, ...]]
    preprocessing: str
    images: Mapping[str, Mapping[str, int]]
    patients: Mapping[str, int]
    lonely: tuple[str, ...]
    left_out: Mapping[str, int]
    versions: Mapping[str, int]
    files: Mapping[str, tuple[DataFile, ...]]

    def rows(self, split: str) -> int:
        return sum(sum(file.groups) for file in self.files[split])

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, sort_keys=True) + "\n"

    @staticmethod
    def from_json(text: str | bytes, uri: str) -> "Snapshot":
        """The snapshot of a manifest found in folder `uri` (a lake may have been moved since it was written)."""
        values = json.loads(text)
        if values.get("format") != FORMAT:
            raise TrainingError(
                f"snapshot {uri} has format {values.get('format')!r}, this version reads {FORMAT}: "
                "delete the folder and train again"
            )
        files = {
            split: tuple(DataFile(f["path"], tuple(f["groups"]), f["sha256"]) for f in found)
            for split, found in values["files"].items()
        }
        tuples = {name: tuple(values[name]) for name in ("classes", "lonely")}
        possible = {modality: tuple(labels) for modality, labels in values["possible"].items()}
        return Snapshot(**{**values, **tuples, "uri": uri, "possible": possible, "files": files})


def labelled(tags: DataFrame, label: LabelKind, burned_in: Choice = "exclude") -> Callable[[DataFrame], DataFrame]:
    """PIXELS → the frames that may be learned from, each with its label.

    Only kind `image` (no localizers, screens, whole slides), none in which burned-in text has to be expected unless
    the policy (burned_in.py) includes them, and no UNKNOWN in the label: UNKNOWN is never a class.
    """
    known = F.col(t.BODY_PART) != UNKNOWN
    name: Column = F.col(t.BODY_PART)
    if label == "modality/body_part":
        known &= F.col(t.MODALITY) != UNKNOWN
        name = F.concat_ws("/", t.MODALITY, t.BODY_PART)
    if burned_in == "exclude":
        known &= F.col(t.TEXT_RISK).eqNullSafe(F.lit(False))
    usable = (
        t.widened(tags, t.TAGS)
        .where((F.col(t.KIND) == t.IMAGE_KIND) & known)
        .select(t.IMAGE_ID, t.BATCH, *_OWNERS, t.MODALITY, name.alias(LABEL))
    )

    def apply(pixels: DataFrame) -> DataFrame:
        return pixels.join(usable, on=[t.IMAGE_ID, t.BATCH], how="inner").select(
            t.IMAGE_ID,
            t.FRAME,
            *_OWNERS,
            t.MODALITY,
            LABEL,
            t.PIXEL_DIGEST,
            t.PIXELS_COLUMN,
        )

    return apply


def split_patients(images: pd.DataFrame, test_fraction: float, validation_fraction: float, seed: int) -> dict[str, str]:
    """Which side each patient is on: `train`, `validation` or `test`. Runs on the driver.

    `images` has one row for each patient_id and label. Fractions are of each class's patients, taken in an
    order that only the seed and the ids decide, rarest class first. Train keeps at least one patient of
    every class; a class with two patients or more gets one in test, unless that would empty another class's
    train side; validation is served from three patients on.
    """
    patients: dict[str, set[str]] = {}
    labels: dict[str, set[str]] = {}
    for patient, label in images[[t.PATIENT_ID, LABEL]].drop_duplicates().itertuples(index=False):
        patients.setdefault(label, set()).add(patient)
        labels.setdefault(patient, set()).add(label)
    side: dict[str, str] = {}
    held = dict.fromkeys(patients, 0)

    def may_leave_train(patient: str) -> bool:
        return all(len(patients[label]) - held[label] > 1 for label in labels[patient])

    def hold_out(patient: str, where: str) -> None:
        side[patient] = where
        for label in labels[patient]:
            held[label] += 1

    def order(patient: str) -> str:
        return hashlib.sha256(f"{seed}:{patient}".encode()).hexdigest()

    def has(label: str, where: str) -> bool:
        return any(side.get(patient) == where for patient in patients[label])

    def serves(patient: str, where: str) -> int:
        return sum(not has(label, where) for label in labels[patient])

    for label in sorted(patients, key=lambda label: (len(patients[label]), label)):
        members = sorted(patients[label], key=order)
        wanted = {TEST: 0, VALIDATION: 0}
        if test_fraction > 0:
            wanted[TEST] = max(1, round(test_fraction * len(members)))
        if validation_fraction > 0 and len(members) > 2:
            wanted[VALIDATION] = max(1, round(validation_fraction * len(members)))
        for where, count in wanted.items():
            free = [patient for patient in members if patient not in side]
            if not has(label, where):
                # The first one should also serve other classes that have nobody on this side yet.
                free.sort(key=lambda patient: (-serves(patient, where), order(patient)))
            missing = count - sum(side.get(patient) == where for patient in members)
            for patient in free:
                if missing > 0 and may_leave_train(patient):
                    hold_out(patient, where)
                    missing -= 1
        for patient in members:
            side.setdefault(patient, TRAIN)
    if test_fraction > 0:
        for label in sorted(patients):
            if not has(label, TEST):
                movable = [p for p in sorted(patients[label], key=order) if side[p] == TRAIN and may_leave_train(p)]
                for patient in movable[:1]:
                    hold_out(patient, TEST)
    return side


def snapshot(
    spark: SparkSession,
    lake: t.Lake,
    pinned: t.Published,
    settings: DatasetSettings,
    storage_settings: StorageSettings,
    burned_in: Choice = "exclude",
) -> Snapshot:
    """The snapshot of the pinned versions, written unless the same rows were written before.

    The driver sees one row for each patient and label; frames are sorted and written by tasks. Raises
    TrainingError where nothing can be learned from, there are fewer than two classes, or a split that was asked
    for stays empty.
    """
    tags = t.read(spark, lake.path(t.TAGS), pinned.tags)
    pixels = t.read(spark, lake.path(t.PIXELS), pinned.pixels)
    frames = pixels.transform(labelled(tags, settings.label, burned_in))
    counted: pd.DataFrame = (
        frames.groupBy(t.PATIENT_ID, t.MODALITY, LABEL).agg(F.count(F.lit(1)).alias(_IMAGES)).toPandas()
    )
    if counted.empty:
        raise TrainingError(
            f"lake {lake.uri} has no frame to learn from: every body part is UNKNOWN, or no row is a plain image "
            "without burned-in text; see vocabulary.body_parts and privacy.burned_in in the settings"
        )
    totals = counted.groupby(LABEL)[_IMAGES].sum()
    left_out = {str(label): int(n) for label, n in totals.items() if n < settings.min_images}
    kept = counted[~counted[LABEL].isin(list(left_out))]
    classes = tuple(sorted(kept[LABEL].unique()))
    if len(classes) < 2:
        raise TrainingError(
            f"{len(classes)} class(es) with dataset.min_images={settings.min_images} frames or more"
            f" ({', '.join(classes) or 'none'}); too few: {_listed(left_out)}. Two are needed"
        )
    side = split_patients(kept, settings.test_fraction, settings.validation_fraction, settings.seed)
    kept = kept.assign(**{SPLIT: kept[t.PATIENT_ID].map(side)})
    for name, fraction in ((TEST, settings.test_fraction), (VALIDATION, settings.validation_fraction)):
        if fraction > 0 and name not in set(side.values()):
            raise TrainingError(
                f"the {name} split is empty: no class has enough patients ({len(side)} in all) to hold one back; "
                f"set dataset.{name}_fraction=0 or ingest more patients"
            )
    rows = {name: int(kept.loc[kept[SPLIT] == name, _IMAGES].sum()) for name in SPLITS}
    sided = spark.createDataFrame(pd.DataFrame(sorted(side.items()), columns=[t.PATIENT_ID, SPLIT]))
    chosen = (
        frames.where(F.col(LABEL).isin(list(classes)))
        .join(F.broadcast(sided), on=t.PATIENT_ID, how="inner")
        .withColumn(_KEY, F.sha2(F.concat_ws(":", F.lit(settings.seed), t.IMAGE_ID, t.FRAME), 256))
    )
    digest = _digest(chosen, settings, classes, pinned.preprocessing)
    uri = storage.join(lake.snapshots(), digest)
    manifest = storage.join(uri, MANIFEST)
    if storage.kind(manifest, storage_settings) == "file":
        return Snapshot.from_json(storage.read_bytes(manifest, storage_settings), uri)
    patients_of = kept.groupby(LABEL)[t.PATIENT_ID].nunique()
    written = Snapshot(
        format=FORMAT,
        digest=digest,
        uri=uri,
        label=settings.label,
        classes=classes,
        possible={str(modality): tuple(sorted(group[LABEL].unique())) for modality, group in kept.groupby(t.MODALITY)},
        preprocessing=pinned.preprocessing,
        images={
            name: {str(k): int(n) for k, n in kept[kept[SPLIT] == name].groupby(LABEL)[_IMAGES].sum().items()}
            for name in SPLITS
        },
        patients={name: sum(where == name for where in side.values()) for name in SPLITS},
        lonely=tuple(str(label) for label, n in patients_of.items() if n == 1),
        left_out=left_out,
        versions={"sources": pinned.sources, "tags": pinned.tags, "pixels": pinned.pixels},
        files=_write(chosen, uri, rows, classes, settings.rows_per_group, storage_settings),
    )
    storage.write_bytes(manifest, written.to_json().encode(), storage_settings)
    return written


def erase(
    uri: str, lost: Callable[[DataFrame], DataFrame], spark: SparkSession, settings: StorageSettings
) -> tuple[int, int]:
    """Take frames out of the snapshot in folder `uri`: rows that went, and files that held them.

    `lost` picks them by their ids. Tasks write the files that hold such frames again under new names, the manifest then
    names those, and files that it does not name are removed: until then, and after a kill, the snapshot is the old one,
    whole. Snapshots from before series and study were written to them are known by image and patient alone.
    """
    manifest = storage.join(uri, MANIFEST)
    snapshot = Snapshot.from_json(storage.read_bytes(manifest, settings), uri)
    split_of = {file.path: split for split, files in snapshot.files.items() for file in files}
    rows, written = 0, {}
    if split_of:
        frames = spark.read.parquet(*[storage.join(uri, path) for path in split_of])
        place = F.regexp_extract(F.input_file_name(), "([^/]+/[^/]+)$", 1).alias(_PATH)
        ids = [name for name in (t.IMAGE_ID, *_OWNERS) if name in frames.columns]
        images_of = lost(frames.select(*ids, place)).groupBy(_PATH).agg(F.collect_set(t.IMAGE_ID).alias(t.IMAGE_ID))
        done = images_of.mapInArrow(_eraser(uri, settings), _ERASED)
        written = {row[_PATH]: row for row in done.collect()}
    if written:
        images = {split: dict(counts) for split, counts in snapshot.images.items()}
        for path, row in written.items():
            for label, count in row["lost"].items():
                images[split_of[path]][label] -= count
                rows += count
        files: dict[str, tuple[DataFile, ...]] = {}
        patients: dict[str, int] = {}
        for split, old in snapshot.files.items():
            new = [written.get(file.path, file) for file in old]
            kept = [
                file if isinstance(file, DataFile) else DataFile(file["made"], tuple(file["groups"]), file["sha256"])
                for file in new
                if isinstance(file, DataFile) or file["groups"]
            ]
            files[split] = tuple(kept)
            uris = [storage.join(uri, file.path) for file in kept]
            patients[split] = spark.read.parquet(*uris).select(t.PATIENT_ID).distinct().count() if uris else 0
        snapshot = replace(snapshot, images=images, patients=patients, files=files)
        storage.write_bytes(manifest, snapshot.to_json().encode(), settings)
    named = {storage.join(uri, file.path) for files in snapshot.files.values() for file in files} | {manifest}
    for left in [found.uri for found in storage.list_objects(uri, settings) if found.uri not in named]:
        storage.delete(left, settings)
    return rows, len(written)


_PATH = "path"
_ERASED = f"{_PATH} string, made string, groups array<int>, sha256 string, lost map<string, int>"


def _eraser(uri: str, settings: StorageSettings) -> Callable[[Iterable[pa.RecordBatch]], Iterable[pa.RecordBatch]]:
    """Per task: files and the images to leave out of each → what was written in their place, a row for each file."""

    def erase_from(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            for path, images in zip(batch[_PATH].to_pylist(), batch[t.IMAGE_ID].to_pylist(), strict=True):
                old = pq.ParquetFile(pa.BufferReader(storage.read_bytes(storage.join(uri, path), settings)))
                file = _File()
                lost: Counter[str] = Counter()
                for number in range(old.num_row_groups):
                    group = old.read_row_group(number)
                    gone = pc.is_in(group[t.IMAGE_ID], value_set=pa.array(images, pa.string()))
                    lost.update(group.filter(gone)[LABEL].to_pylist())
                    file.add(group.filter(pc.invert(gone)))
                stem = path.removesuffix(".parquet")
                base, _, times = stem.partition("-erased-")
                made = f"{base}-erased-{int(times or 0) + 1}.parquet"
                groups, sha256 = file.close(storage.join(uri, made), settings)
                yield pa.RecordBatch.from_arrays(
                    [
                        pa.array([path]),
                        pa.array([made]),
                        pa.array([groups], type=pa.list_(pa.int32())),
                        pa.array([sha256]),
                        pa.array([list(lost.items())], type=pa.map_(pa.string(), pa.int32())),
                    ],
                    names=[_PATH, "made", "groups", "sha256", "lost"],
                )

    return erase_from


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
        storage_settings: StorageSettings,
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
        self._storage = storage_settings
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
        urls, filesystem = _petastorm_place(self._files, self._storage)
        reader = make_batch_reader(
            urls,
            schema_fields=[f"^{TARGET}$", f"^{t.PIXELS_COLUMN}$"],
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
                pixels = np.frombuffer(bytearray().join(getattr(group, t.PIXELS_COLUMN)), dtype=np.uint8)
                targets = np.asarray(getattr(group, TARGET), dtype=np.int64)
                seen, since = seen + len(targets), time.monotonic()
                yield pixels.reshape(len(targets), t.SIDE, t.SIDE), targets
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


def _petastorm_place(uris: Sequence[str], settings: StorageSettings) -> tuple[list[str], Any]:
    """The URLs, and the file system where Petastorm cannot find it by itself."""
    if all(storage.is_local(uri) for uri in uris):
        return list(uris), None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        # Only pyarrow's old file systems select the old reader, which is the one that Petastorm knows.
        from pyarrow.filesystem import S3FSWrapper

        wrapped = S3FSWrapper(storage.file_system(settings))
    return [uri.replace("s3a://", "s3://", 1) for uri in uris], wrapped


def _digest(chosen: DataFrame, settings: DatasetSettings, classes: Sequence[str], preprocessing: str) -> str:
    """A name that the rows, their sides and the layout decide; no pixels are read for it.

    Rows are hashed by tasks and the hashes added up, so that their order does not matter.
    """
    row = F.sha2(F.concat_ws("|", SPLIT, LABEL, t.IMAGE_ID, t.FRAME, t.PIXEL_DIGEST), 256)
    words = [
        F.sum(F.conv(F.substring("row", 1 + 15 * word, 15), 16, 10).cast("decimal(20,0)")).alias(f"w{word}")
        for word in range(4)
    ]
    sums = chosen.select(row.alias("row")).agg(F.count(F.lit(1)).alias(_IMAGES), *words).collect()[0]
    said = {
        "format": FORMAT,
        "label": settings.label,
        "classes": list(classes),
        "preprocessing": preprocessing,
        "seed": settings.seed,
        "rows_per_group": settings.rows_per_group,
        "rows": [str(value) for value in sums],
    }
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:32]


def _write(
    chosen: DataFrame,
    uri: str,
    rows: Mapping[str, int],
    classes: Sequence[str],
    rows_per_group: int,
    settings: StorageSettings,
) -> dict[str, tuple[DataFile, ...]]:
    """Write all splits in one pass; a file's rows and bytes do not depend on how Spark cut its tasks."""
    groups = {name: max(-(-n // rows_per_group), min(n, _LEAST_GROUPS)) for name, n in rows.items()}
    group_rows = {name: -(-n // groups[name]) if n else 1 for name, n in rows.items()}
    parts = {name: max(1, -(-count // _GROUPS_PER_FILE)) for name, count in groups.items()}
    # The first 32 bits of the key, as a share of the split's parts.
    head = F.conv(F.substring(_KEY, 1, 8), 16, 10).cast("bigint")
    part = F.coalesce(*(F.when(F.col(SPLIT) == name, F.expr(f"{count}L")) for name, count in parts.items()))
    target = F.array_position(F.array(*(F.lit(name) for name in classes)), F.col(LABEL)) - 1
    storage.delete_folder(uri, settings)
    written = (
        chosen.select(
            SPLIT,
            F.shiftright(head * part, 32).cast("int").alias(_PART),
            _KEY,
            t.IMAGE_ID,
            t.FRAME,
            *_OWNERS,
            t.MODALITY,
            LABEL,
            target.cast("bigint").alias(TARGET),
            t.PIXELS_COLUMN,
        )
        .repartition(sum(parts.values()), SPLIT, _PART)
        .sortWithinPartitions(SPLIT, _PART, _KEY)
        .mapInArrow(
            _part_writer(uri, group_rows, settings),
            f"{SPLIT} string, path string, groups array<int>, sha256 string",
        )
        .collect()
    )
    return {
        name: tuple(
            DataFile(row["path"], tuple(row["groups"]), row["sha256"])
            for row in sorted(written, key=lambda row: str(row["path"]))
            if row[SPLIT] == name
        )
        for name in SPLITS
    }


def _part_writer(
    uri: str, group_rows: Mapping[str, int], settings: StorageSettings
) -> Callable[[Iterable[pa.RecordBatch]], Iterable[pa.RecordBatch]]:
    """Per task: sorted rows in, one Parquet file for each (split, part) out, and a row that describes it."""

    def write(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        open_part: _Part | None = None
        for batch in batches:
            names = list(zip(batch[SPLIT].to_pylist(), batch[_PART].to_pylist(), strict=True))
            start = 0
            while start < len(names):
                end = start
                while end < len(names) and names[end] == names[start]:
                    end += 1
                if open_part is not None and open_part.name != names[start]:
                    yield open_part.close(uri, settings)
                    open_part = None
                if open_part is None:
                    open_part = _Part(names[start], group_rows[names[start][0]])
                open_part.add(batch.slice(start, end - start))
                start = end
        if open_part is not None:
            yield open_part.close(uri, settings)

    return write


class _File:
    """A Parquet file being written in memory, row group by row group."""

    def __init__(self) -> None:
        self._sink = pa.BufferOutputStream()
        self._writer: pq.ParquetWriter | None = None
        self._groups: list[int] = []

    def add(self, rows: pa.Table) -> None:
        """One row group, unless there are no rows."""
        if not len(rows):
            return
        if self._writer is None:
            # Pixels hardly repeat: a dictionary of them is built in vain.
            self._writer = pq.ParquetWriter(self._sink, rows.schema, compression="snappy", use_dictionary=[LABEL])
        self._writer.write_table(rows, row_group_size=len(rows))
        self._groups.append(len(rows))

    def close(self, uri: str, settings: StorageSettings) -> tuple[list[int], str]:
        """Write the file, unless it is empty; the rows of its groups and its digest."""
        if self._writer is None:
            return [], ""
        self._writer.close()
        content = self._sink.getvalue().to_pybytes()
        storage.write_bytes(uri, content, settings)
        return self._groups, hashlib.sha256(content).hexdigest()


class _Part:
    """The file of one split and part, filled in even row groups; in memory, at most a few of them long."""

    def __init__(self, name: tuple[str, int], group_rows: int) -> None:
        self.name = name
        self._group_rows = group_rows
        self._file = _File()
        self._held: list[pa.RecordBatch] = []

    def add(self, batch: pa.RecordBatch) -> None:
        self._held.append(batch)
        rows = pa.Table.from_batches(self._held)
        while len(rows) >= self._group_rows:
            self._write(rows.slice(0, self._group_rows))
            rows = rows.slice(self._group_rows)
        self._held = rows.to_batches()

    def close(self, uri: str, settings: StorageSettings) -> pa.RecordBatch:
        if self._held:
            self._write(pa.Table.from_batches(self._held))
        path = f"{self.name[0]}/part-{self.name[1]:05d}.parquet"
        groups, sha256 = self._file.close(storage.join(uri, path), settings)
        return pa.RecordBatch.from_arrays(
            [
                pa.array([self.name[0]]),
                pa.array([path]),
                pa.array([groups], type=pa.list_(pa.int32())),
                pa.array([sha256]),
            ],
            names=[SPLIT, "path", "groups", "sha256"],
        )

    def _write(self, rows: pa.Table) -> None:
        self._file.add(rows.drop([SPLIT, _PART, _KEY]))


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{label} ({n})" for label, n in sorted(counts.items())) or "none"
