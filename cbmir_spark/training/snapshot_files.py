"""Write a snapshot's Parquet files, and erase rows of them."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from cbmir_spark import storage
from cbmir_spark.lake import columns as cols
from cbmir_spark.storage import ObjectStore
from cbmir_spark.training.manifest import (
    GROUPS_PER_FILE,
    KEY,
    LABEL,
    LEAST_GROUPS,
    MANIFEST,
    OWNERS,
    PART,
    SPLIT,
    SPLITS,
    TARGET,
    DataFile,
    Snapshot,
)


def erase(uri: str, lost: Callable[[DataFrame], DataFrame], spark: SparkSession, store: ObjectStore) -> tuple[int, int]:
    """Remove frames from the snapshot in folder `uri`; the numbers of rows removed and of files rewritten.

    `lost` selects them by their ids. Tasks rewrite the affected files under new names, then the manifest names those,
    then unnamed files are deleted: until the manifest is written, and after a kill, the snapshot is the old one.
    Snapshots of older versions have the ids of image and patient alone.
    """
    manifest = storage.join(uri, MANIFEST)
    snapshot = Snapshot.from_json(store.read_bytes(manifest), uri)
    split_of = {file.path: split for split, files in snapshot.files.items() for file in files}
    rows, written = 0, {}
    if split_of:
        frames = spark.read.parquet(*[storage.join(uri, path) for path in split_of])
        place = F.regexp_extract(F.input_file_name(), "([^/]+/[^/]+)$", 1).alias(_PATH)
        ids = [name for name in (cols.IMAGE_ID, *OWNERS) if name in frames.columns]
        images_of = (
            lost(frames.select(*ids, place)).groupBy(_PATH).agg(F.collect_set(cols.IMAGE_ID).alias(cols.IMAGE_ID))
        )
        erased = images_of.mapInArrow(_eraser(uri, store), _ERASED)
        written = {row[_PATH]: row for row in erased.collect()}
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
            remaining = [
                file if isinstance(file, DataFile) else DataFile(file["made"], tuple(file["groups"]), file["sha256"])
                for file in new
                if isinstance(file, DataFile) or file["groups"]
            ]
            files[split] = tuple(remaining)
            uris = [storage.join(uri, file.path) for file in remaining]
            patients[split] = spark.read.parquet(*uris).select(cols.PATIENT_ID).distinct().count() if uris else 0
        snapshot = replace(snapshot, images=images, patients=patients, files=files)
        store.write_bytes(manifest, snapshot.to_json().encode())
    named = {storage.join(uri, file.path) for files in snapshot.files.values() for file in files} | {manifest}
    for left in [found.uri for found in store.list_objects(uri) if found.uri not in named]:
        store.delete(left)
    return rows, len(written)


_PATH = "path"
_ERASED = f"{_PATH} string, made string, groups array<int>, sha256 string, lost map<string, int>"


def _eraser(uri: str, store: ObjectStore) -> Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    """Per task: files and the images to remove from each → a row for each file that replaces one."""

    def erase_from(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            for path, images in zip(batch[_PATH].to_pylist(), batch[cols.IMAGE_ID].to_pylist(), strict=True):
                old = pq.ParquetFile(pa.BufferReader(store.read_bytes(storage.join(uri, path))))
                file = _File()
                lost: Counter[str] = Counter()
                for number in range(old.num_row_groups):
                    group = old.read_row_group(number)
                    gone = pc.is_in(group[cols.IMAGE_ID], value_set=pa.array(images, pa.string()))
                    lost.update(group.filter(gone)[LABEL].to_pylist())
                    file.add(group.filter(pc.invert(gone)))
                stem = path.removesuffix(".parquet")
                base, _, times = stem.partition("-erased-")
                made = f"{base}-erased-{int(times or 0) + 1}.parquet"
                groups, sha256 = file.close(storage.join(uri, made), store)
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


def write_files(
    chosen: DataFrame,
    uri: str,
    rows: Mapping[str, int],
    classes: Sequence[str],
    rows_per_group: int,
    store: ObjectStore,
) -> dict[str, tuple[DataFile, ...]]:
    """Write all splits in one pass; the files' bytes do not depend on how Spark partitions its tasks."""
    groups = {name: max(-(-n // rows_per_group), min(n, LEAST_GROUPS)) for name, n in rows.items()}
    group_rows = {name: -(-n // groups[name]) if n else 1 for name, n in rows.items()}
    parts = {name: max(1, -(-count // GROUPS_PER_FILE)) for name, count in groups.items()}
    # The first 32 bits of the key, as a share of the split's parts.
    head = F.conv(F.substring(KEY, 1, 8), 16, 10).cast("bigint")
    part = F.coalesce(*(F.when(F.col(SPLIT) == name, F.expr(f"{count}L")) for name, count in parts.items()))
    target = F.array_position(F.array(*(F.lit(name) for name in classes)), F.col(LABEL)) - 1
    store.delete_folder(uri)
    written = (
        chosen.select(
            SPLIT,
            F.shiftright(head * part, 32).cast("int").alias(PART),
            KEY,
            cols.IMAGE_ID,
            cols.FRAME,
            *OWNERS,
            cols.MODALITY,
            LABEL,
            target.cast("bigint").alias(TARGET),
            cols.PIXELS_COLUMN,
        )
        .repartition(sum(parts.values()), SPLIT, PART)
        .sortWithinPartitions(SPLIT, PART, KEY)
        .mapInArrow(
            _part_writer(uri, group_rows, store),
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
    uri: str, group_rows: Mapping[str, int], store: ObjectStore
) -> Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    """Per task: sorted rows → one Parquet file for each (split, part), and a row that describes it."""

    def write(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        open_part: _Part | None = None
        for batch in batches:
            names = list(zip(batch[SPLIT].to_pylist(), batch[PART].to_pylist(), strict=True))
            start = 0
            while start < len(names):
                end = start
                while end < len(names) and names[end] == names[start]:
                    end += 1
                if open_part is not None and open_part.name != names[start]:
                    yield open_part.close(uri, store)
                    open_part = None
                if open_part is None:
                    open_part = _Part(names[start], group_rows[names[start][0]])
                open_part.add(batch.slice(start, end - start))
                start = end
        if open_part is not None:
            yield open_part.close(uri, store)

    return write


class _File:
    """A Parquet file being written in memory, row group by row group."""

    def __init__(self) -> None:
        self._sink = pa.BufferOutputStream()
        self._writer: pq.ParquetWriter | None = None
        self._groups: list[int] = []

    def add(self, rows: pa.Table) -> None:
        """Append one row group, unless there are no rows."""
        if not len(rows):
            return
        if self._writer is None:
            # Pixels rarely repeat, so a dictionary of them would be wasted.
            self._writer = pq.ParquetWriter(self._sink, rows.schema, compression="snappy", use_dictionary=[LABEL])
        self._writer.write_table(rows, row_group_size=len(rows))
        self._groups.append(len(rows))

    def close(self, uri: str, store: ObjectStore) -> tuple[list[int], str]:
        """Write the file, unless it is empty; the rows of its groups, and its SHA-256."""
        if self._writer is None:
            return [], ""
        self._writer.close()
        content = self._sink.getvalue().to_pybytes()
        store.write_bytes(uri, content)
        return self._groups, hashlib.sha256(content).hexdigest()


class _Part:
    """The file of one split and part, written in even row groups; buffers a few of them in memory."""

    def __init__(self, name: tuple[str, int], group_rows: int) -> None:
        self.name = name
        self._group_rows = group_rows
        self._file = _File()
        self._buffered: list[pa.RecordBatch] = []

    def add(self, batch: pa.RecordBatch) -> None:
        self._buffered.append(batch)
        rows = pa.Table.from_batches(self._buffered)
        while len(rows) >= self._group_rows:
            self._write(rows.slice(0, self._group_rows))
            rows = rows.slice(self._group_rows)
        self._buffered = rows.to_batches()

    def close(self, uri: str, store: ObjectStore) -> pa.RecordBatch:
        if self._buffered:
            self._write(pa.Table.from_batches(self._buffered))
        path = f"{self.name[0]}/part-{self.name[1]:05d}.parquet"
        groups, sha256 = self._file.close(storage.join(uri, path), store)
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
        self._file.add(rows.drop([SPLIT, PART, KEY]))
