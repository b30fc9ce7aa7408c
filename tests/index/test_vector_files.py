"""Vectors by their place in Parquet files, against Arrow's own reading of the same files."""

import dataclasses
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyspark.sql import SparkSession
from pyspark.sql.types import ArrayType, FloatType, LongType, StructField, StructType

from cbmir_spark import storage
from cbmir_spark.config import StorageSettings
from cbmir_spark.errors import TableError
from cbmir_spark.index import arrays, vector_files
from cbmir_spark.index.byte_sources import merge
from cbmir_spark.index.layout import FEATURES
from cbmir_spark.index.parquet_pages import page_values
from cbmir_spark.index.vector_files import DataFile, Floats, OpenFiles, VectorFile
from cbmir_spark.lake import delta
from cbmir_spark.storage import ObjectStore
from tests.conftest import REPO
from tests.support.tiny_lake import live_files

LOCAL = StorageSettings(endpoint=None, region="us-east-1", path_style=True, attempts=2)
PLAIN: dict[str, Any] = {"compression": "none", "use_dictionary": False, "data_page_size": 2**30}
SIDE_BY_SIDE = {
    "as the index": PLAIN,
    "pages of version 2": PLAIN | {"data_page_version": "2.0"},
    "page index": PLAIN | {"write_page_index": True},
}
DECODED = {
    "compressed": PLAIN | {"compression": "lz4"},
    "compressed pages of version 2": PLAIN | {"compression": "snappy", "data_page_version": "2.0"},
    "with a dictionary": PLAIN | {"use_dictionary": True},
    "several pages": PLAIN | {"data_page_size": 512, "write_batch_size": 8},
    "bytes split": PLAIN | {"column_encoding": {"vector.list.element": "BYTE_STREAM_SPLIT"}},
    "without statistics": PLAIN | {"write_statistics": False},
}


def opened(path: Path) -> VectorFile:
    return VectorFile(
        DataFile(0, storage.canonical(str(path)), ("CT", "CHEST"), path.stat().st_size), ObjectStore(LOCAL)
    )


def written(path: Path, vectors: np.ndarray[Any, Any], how: dict[str, Any], rows: int = 7) -> None:
    number = pa.array(np.arange(len(vectors)), pa.int64())
    pq.write_table(pa.table({"number": number, "vector": arrays.vector_column(vectors)}), path, rows, **how)


@pytest.mark.parametrize("how", [*SIDE_BY_SIDE, *DECODED])
def test_vectors_are_those_that_arrow_reads(tmp_path: Path, how: str) -> None:
    random = np.random.default_rng(1)
    vectors = np.round(random.standard_normal((100, 33)), 1).astype(np.float32)
    vectors[3] = 0
    written(tmp_path / "a.parquet", vectors, (SIDE_BY_SIDE | DECODED)[how])
    with opened(tmp_path / "a.parquet") as file:
        assert (file.vectors("vector", [0, 2, 14], 33) == vectors[[*range(7), *range(14, 21), 98, 99]]).all()
        out = np.full((9, 33), 7, np.float32)
        assert file.vectors("vector", [1], 33, out).base is not None
        assert (out[:7] == vectors[7:14]).all() and (out[7:] == 7).all()
        found = np.empty((4, 33), np.float32)
        before = file.read
        file.some_vectors("vector", np.array([0, 0, 5, 14]), np.array([6, 1, 0, 1]), found)
        assert (found == vectors[[6, 1, 35, 99]]).all()
        assert (file.read - before).vectors == 4
        # Bytes of four vectors, or of all the row groups that they are in.
        assert ((file.read - before).bytes == 4 * 4 * 33) is (how in SIDE_BY_SIDE)
        assert file.table([0, 14], ["number"]).column("number").to_pylist() == [*range(7), 98, 99]


def test_a_vector_that_is_null_or_of_another_length_is_not_read_by_its_place(tmp_path: Path) -> None:
    for name, lists in {"null": [[1.0, None], [3.0, 4.0]], "short": [[1.0], [3.0, 4.0]]}.items():
        column = pa.array(lists, pa.list_(pa.float32()))
        pq.write_table(pa.table({"vector": column}), tmp_path / name, **PLAIN)
        with opened(tmp_path / name) as file, pytest.raises((TableError, pa.ArrowInvalid)):
            file.vectors("vector", [0], 2)


def test_what_spark_writes_for_the_index_is_read_by_place(spark: SparkSession, tmp_path: Path) -> None:
    """The table's write settings and the reader agree, for appended rows and for those that a MERGE rewrites."""
    schema = StructType(
        [StructField("number", LongType(), False), StructField("vector", ArrayType(FloatType(), False), False)]
    )
    table = dataclasses.replace(FEATURES, schema=schema, partitioned_by=(), constraints={})

    def made() -> Floats:
        return np.random.default_rng(2).standard_normal((1500, 4096), np.float32)

    def rows(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        every = made()
        for batch in batches:
            vectors = arrays.vector_column(every[batch.column(0).to_numpy()])
            yield pa.RecordBatch.from_arrays([batch.column(0), vectors], names=schema.names)

    def files_at(version: int) -> list[Path]:
        return [Path(storage.local_path(uri)) for uri in live_files(spark, path, version)]

    path = storage.canonical(str(tmp_path / "written"))
    delta.ensure(spark, table, path)
    appended = delta.append(spark.range(0, 1500, 1, 1).mapInArrow(rows, schema), table, path)
    vectors = made()
    (one,) = files_at(appended)
    with opened(one) as file:
        found = np.empty((2, 4096), np.float32)
        file.some_vectors("vector", np.array([0, 1]), np.array([5, 0]), found)
        assert file.read.bytes == 2 * 4 * 4096
        # A row group is as big as the write settings say, where the writer looks at all.
        assert 400 < file.rows_of(0) < 700
        assert (found == vectors[[5, file.rows_of(0)]]).all()
        everything = [number for batch in file.batches(0, 1, 100) for number in batch]
        assert (file.vectors("vector", everything, 4096) == vectors).all()
    gone = spark.createDataFrame([(number,) for number in (0, 3, 1499)], "number long")
    left: set[int] = set()
    for each in files_at(delta.delete_rows(spark, table, path, gone, "true")):
        with opened(each) as file:
            everything = [number for batch in file.batches(0, 1, 100) for number in batch]
            numbers = file.table(everything, ["number"]).column("number").to_numpy()
            before, found = file.read.bytes, np.empty((1, 4096), np.float32)
            file.some_vectors("vector", np.array([0]), np.array([7]), found)
            assert file.read.bytes - before == 4 * 4096
            assert (found == vectors[numbers[7]]).all()
        left |= set(numbers.tolist())
    assert left == set(range(1500)) - {0, 3, 1499}


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can be advised")
def test_what_is_read_of_a_local_file_is_prefetched_and_little_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors = np.random.default_rng(5).standard_normal((4000, 64)).astype(np.float32)
    written(tmp_path / "a.parquet", vectors, PLAIN, 1000)
    advised: list[tuple[int, int]] = []

    def advise(_: int, offset: int, size: int, what: int) -> None:
        assert what == os.POSIX_FADV_WILLNEED
        advised.append((offset, size))

    monkeypatch.setattr(os, "posix_fadvise", advise)
    with opened(tmp_path / "a.parquet") as file:
        file.table([1, 2], ["number"])
        assert sum(size for _, size in advised) == file.read.bytes
        advised.clear()
        found = np.empty((3, 64), np.float32)
        file.some_vectors("vector", np.array([3, 0, 0]), np.array([7, 900, 5]), found)
    # Its own page's header first, of the biggest row group; each vector, 256 bytes, by itself.
    assert [size for _, size in advised[1:]] == [256, 256, 256]
    content = (tmp_path / "a.parquet").read_bytes()
    prefetched = [np.frombuffer(content[offset : offset + size], np.float32) for offset, size in advised[1:]]
    assert np.array_equal(prefetched, vectors[[5, 900, 3007]])


def test_a_page_that_ends_within_a_vector_is_not_taken_for_the_only_one() -> None:
    """What follows the first page is shorter than a vector, as a header is. pyarrow 14 wrote the file."""
    vectors = (np.arange(7 * 33, dtype=np.float32) / 8).reshape(7, 33)
    with opened(REPO / "tests" / "data" / "page_within_vector.parquet") as file:
        assert (file.vectors("vector", [0], 33) == vectors).all()
        assert file.read.bytes > vectors.nbytes
        found = np.empty((2, 33), np.float32)
        file.some_vectors("vector", np.array([0, 0]), np.array([6, 2]), found)
        assert (found == vectors[[6, 2]]).all()


def test_a_few_files_are_open_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vector_files, "OPEN_FILES", 2)
    vectors = np.random.default_rng(4).standard_normal((5, 3, 8)).astype(np.float32)
    files = {}
    for number, part in enumerate(vectors):
        path = tmp_path / f"{number}.parquet"
        written(path, part, PLAIN)
        files[number] = DataFile(number, storage.canonical(str(path)), ("CT", "CHEST"), path.stat().st_size)
    found = np.empty((1, 8), np.float32)
    before = len(os.listdir("/proc/self/fd"))
    with OpenFiles(files, ObjectStore(LOCAL)) as several:
        for number in (0, 1, 0, 2, 3, 4, 0):
            several[number].some_vectors("vector", np.array([0]), np.array([2]), found)
            assert (found == vectors[number, 2]).all()
        assert len(os.listdir("/proc/self/fd")) <= before + 4
        assert several.read.vectors == 7
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("header", "values"),
    [
        (bytes([0x15, 0x00, 0x15, 0x80, 0x02, 0x15, 0x80, 0x02, 0x2C, 0x15, 0x40, 0x15, 0x00]), 32),
        # With a checksum, and of version 2.
        (bytes([0x15, 0x00, 0x15, 0x08, 0x15, 0x08, 0x15, 0xFF, 0xFF, 0x03, 0x1C, 0x15, 0x02]), 1),
        (bytes([0x15, 0x06, 0x15, 0x08, 0x15, 0x08, 0x5C, 0x15, 0x02, 0x15, 0x00]), 1),
        (bytes([0x15, 0x00, 0x15, 0x80, 0x02, 0x15, 0x80, 0x01, 0x2C, 0x15, 0x40]), None),  # compressed
        (bytes([0x15, 0x04, 0x15, 0x08, 0x15, 0x08, 0x4C, 0x15, 0x40]), None),  # a dictionary
        (bytes([0x15, 0x06, 0x15, 0x08, 0x15, 0x08, 0x2C, 0x15, 0x40]), None),  # a type with another's header
        (bytes([0x15, 0x00, 0x16, 0x08, 0x15, 0x08]), None),  # no number of 32 bits
        (bytes([0x15, 0x80]), None),  # cut
        (b"PAR1PAR1PAR1", None),
        (b"", None),
    ],
)
def test_how_many_values_a_page_header_tells(header: bytes, values: int | None) -> None:
    assert page_values(header) == values


def test_near_ranges_are_one_request() -> None:
    near, far = 2**16, 2**20
    assert merge([(0, 10), (10 + near, 10), (far, 5)]) == [(0, 20 + near), (far, 5)]
    assert merge([(0, 2**22), (2**22, 1)]) == [(0, 2**22), (2**22, 1)]
    assert merge([]) == []
