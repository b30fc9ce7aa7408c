"""Run Petastorm's batch reader, over the files that a snapshot names, on any pyarrow and numpy.

Petastorm 0.13.1 is written for names that pyarrow dropped after version 14 and numpy in version 2. Of pyarrow's old
classes its reader uses a list of files, their footers and their row groups, which this module gives it; shuffling,
sharding, threads and queues stay Petastorm's own. Nothing in numpy or pyarrow changes: only Petastorm's modules see
the replacements, and only for files opened here.

Petastorm also unpickles what it finds in a dataset's folder. These datasets have no folder, so nothing is found.
"""

import importlib
import importlib.metadata
import sys
import threading
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cbmir_spark import extras, storage
from cbmir_spark.errors import EnvironmentProblem, TrainingError
from cbmir_spark.storage import ObjectStore
from cbmir_spark.storage.uri import S3A

# The release whose internals this module replaces, and the tests compare with.
VERSION = "0.13.1"

_READER, _METADATA, _WORKER, _UNISCHEMA = (
    f"petastorm.{name}" for name in ("reader", "etl.dataset_metadata", "arrow_reader_worker", "unischema")
)
# Imported by Petastorm for HDFS and for writing datasets, never called by its reader of given files.
_IMPORTED_IN_VAIN = {
    "petastorm.hdfs.namenode": ("HdfsConnector", "HdfsNamenodeResolver"),
    "pyarrow.filesystem": ("LocalFileSystem",),
}
_LOCK = threading.Lock()


def open_reader(files: "Files", **options: Any) -> Any:
    """Open Petastorm's batch reader over Parquet files, in their order; `options` are its own.

    Runs per training process. Raises EnvironmentProblem if Petastorm is missing or another release, and TrainingError,
    as the reader does later, for a file that is missing or damaged.
    """
    return _petastorm().make_batch_reader(files.urls, filesystem=files, **options)


class Files:
    """Parquet files by canonical URI, as the file system of any number of Petastorm's readers.

    They know the files by number, so that no path is parsed as a URL. Footers are read once for all readers and stay in
    memory: a few kilobytes per file.
    """

    def __init__(self, uris: Sequence[str], store: ObjectStore) -> None:
        self._store = store
        self._files = {f"/{number}": File(uri, self) for number, uri in enumerate(uris)}

    @cached_property
    def object_storage(self) -> Any:
        """One s3fs file system for all threads: fsspec may build, and retain, another one for each that asks."""
        return self._store.file_system(ahead=False)

    @property
    def urls(self) -> list[str]:
        """A URL for each file, in order."""
        return [f"file://{path}" for path in self._files]

    def open(self, path: str) -> "File":
        """Find a file; reads nothing yet."""
        return self._files[path]


class File:
    """One Parquet file, opened for each read, so that none stays open behind an abandoned reader."""

    def __init__(self, uri: str, files: Files) -> None:
        self._uri, self._files = uri, files
        self._footer: pq.FileMetaData | None = None
        self._details: dict[str, Any] | None = None

    def footer(self) -> pq.FileMetaData:
        """The file's metadata; read once."""
        if self._footer is None:
            with self._opened() as file:
                self._footer = file.metadata
        return self._footer

    def read(self, row_group: int, columns: Collection[str]) -> pa.Table:
        """Read columns of one row group."""
        with self._opened() as file:
            return file.read_row_group(row_group, columns=sorted(columns))

    @contextmanager
    def _opened(self) -> Iterator[pq.ParquetFile]:
        try:
            with self._input() as source, pq.ParquetFile(source, metadata=self._footer, pre_buffer=True) as file:
                yield file
        except (OSError, pa.ArrowInvalid) as error:
            if not _is_of_the_file(error):
                raise
            raise TrainingError(
                f"{self._uri} is missing or damaged: delete the snapshot that it belongs to and train again"
            ) from error

    def _input(self) -> pa.NativeFile:
        if storage.is_local(self._uri):
            return pa.OSFile(storage.local_path(self._uri))
        size = self._details["size"] if self._details else None
        file = self._files.object_storage.open(self._uri.removeprefix(S3A), "rb", size=size)
        if self._details:
            # Without them it would ask the storage again, for each row group.
            file.details = self._details
        self._details = file.details
        return pa.PythonFile(file, mode="r")


def _is_of_the_file(error: Exception) -> bool:
    """True where the file is at fault, rather than the disk, the network or the permissions."""
    # pyarrow raises what it cannot decode as ArrowInvalid, or as a plain OSError without a number.
    return isinstance(error, pa.ArrowInvalid | FileNotFoundError) or (type(error) is OSError and error.errno is None)


class _Dataset:
    """pyarrow's old ParquetDataset, as far as Petastorm's reader uses it: no partitions and no summary files."""

    partitions = metadata = common_metadata = None

    def __init__(self, paths: Sequence[str], files: Files) -> None:
        self.fs = files
        self.pieces = [_Piece(path, files) for path in paths]


class _Piece:
    """pyarrow's old ParquetDatasetPiece: a file, or one row group of it."""

    partition_keys = ()

    def __init__(self, path: str, files: Files, row_group: int | None = None) -> None:
        self.path, self.row_group = path, row_group
        self._file = files.open(path)

    def get_metadata(self) -> pq.FileMetaData:
        return self._file.footer()

    def read(self, columns: Collection[str], partitions: None = None) -> pa.Table:
        assert self.row_group is not None
        return self._file.read(self.row_group, columns)


class _Parquet:
    """`pyarrow.parquet` for Petastorm's modules: replaces the old classes for Files, and for nothing else."""

    def __getattr__(self, name: str) -> Any:
        return getattr(pq, name)

    @staticmethod
    def ParquetDataset(paths: Any, filesystem: Any = None, **options: Any) -> Any:
        if isinstance(filesystem, Files):
            return _Dataset(paths, filesystem)
        return pq.ParquetDataset(paths, filesystem=filesystem, **options)

    @staticmethod
    def ParquetDatasetPiece(path: str, open_file_func: Any, row_group: int, **options: Any) -> Any:
        files = getattr(open_file_func, "__self__", None)
        if isinstance(files, Files):
            return _Piece(path, files, row_group)
        return pq.ParquetDatasetPiece(path, open_file_func=open_file_func, row_group=row_group, **options)

    @staticmethod
    def ParquetFile(source: Any, **options: Any) -> Any:
        # Petastorm's worker opens the file of each piece, but reads the piece.
        return source if isinstance(source, File) else pq.ParquetFile(source, **options)


class _Numpy:
    """numpy for Petastorm's modules, with the two names that numpy 2 dropped."""

    unicode_, string_ = np.str_, np.bytes_

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)


def _petastorm() -> ModuleType:
    """Import Petastorm and give its modules the replacements, once per process."""
    with _LOCK:
        found = sys.modules.get(_READER)
        if found is not None and isinstance(found.pq, _Parquet):
            return found
        extras.require(extras.TRAIN, "train")
        version = importlib.metadata.version("petastorm")
        if version != VERSION:
            raise EnvironmentProblem(
                f"petastorm {version} is installed, training works with {VERSION}: pip install petastorm=={VERSION}"
            )
        with _import_stubs(), warnings.catch_warnings():
            # Of invalid escapes in its own sources, where they are compiled first.
            warnings.simplefilter("ignore")
            reader, metadata, worker, unischema = map(
                importlib.import_module, (_READER, _METADATA, _WORKER, _UNISCHEMA)
            )
        parquet, numpy = _Parquet(), _Numpy()
        worker.ParquetFile = parquet.ParquetFile  # type: ignore[attr-defined]
        for module in (worker, unischema):
            module.np = numpy  # type: ignore[attr-defined]
        for module in (worker, metadata, reader):
            module.pq = parquet  # type: ignore[attr-defined]
        return reader


@contextmanager
def _import_stubs() -> Iterator[None]:
    """Put empty classes where Petastorm imports what it does not need here, for the duration of the block."""
    before = {name: sys.modules.get(name) for name in _IMPORTED_IN_VAIN}
    for name, classes in _IMPORTED_IN_VAIN.items():
        stub = ModuleType(name)
        for each in classes:
            setattr(stub, each, type(each, (), {}))
        sys.modules[name] = stub
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
