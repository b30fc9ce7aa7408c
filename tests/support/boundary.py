"""Count what a job asks of Delta and of storage on the driver, where our code leaves itself.

The plain functions do the work; each call is counted on its way. What tasks ask is not seen.
"""

import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from delta.tables import DeltaTable
from py4j.java_gateway import JavaMember
from pyspark.sql.readwriter import DataFrameReader, DataFrameWriter

from cbmir_spark.storage import ObjectStore


@dataclass
class Counts:
    """Calls by path, of opened tables by (path, version) and of storage by (method, URI)."""

    opened: Counter[tuple[str, int | None]] = field(default_factory=Counter)
    """`spark.read.format("delta").load`; the version is None for the newest one."""
    handles: Counter[str] = field(default_factory=Counter)
    """`DeltaTable.forPath`"""
    checks: Counter[str] = field(default_factory=Counter)
    """`DeltaTable.isDeltaTable`"""
    histories: Counter[str] = field(default_factory=Counter)
    """`DeltaTable.history`"""
    log_lookups: Counter[str] = field(default_factory=Counter)
    """`DeltaLog.forTable`, by py4j"""
    writes: Counter[str] = field(default_factory=Counter)
    """`DataFrameWriter.save` and `.parquet`"""
    objects: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Methods of ObjectStore"""

    def storage(self, *methods: str) -> int:
        """Calls of some methods of ObjectStore, whatever the URI."""
        return sum(count for (method, _), count in self.objects.items() if method in methods)


@contextmanager
def counted() -> Iterator[Counts]:
    """Count while the block runs. A call within a call of the same kind is counted too."""
    counts = Counts()
    paths: dict[int, tuple[DeltaTable, str]] = {}
    readers: dict[int, tuple[DataFrameReader, dict[str, Any]]] = {}
    plain_for_path, plain_is_table = DeltaTable.forPath.__func__, DeltaTable.isDeltaTable.__func__
    plain_history, plain_call = DeltaTable.history, JavaMember.__call__
    plain_format, plain_option, plain_load = DataFrameReader.format, DataFrameReader.option, DataFrameReader.load

    def for_path(cls: type, spark: Any, path: str, *more: Any, **named: Any) -> DeltaTable:
        counts.handles[path] += 1
        table = plain_for_path(cls, spark, path, *more, **named)
        # The reference prevents that another table gets the same id.
        paths[id(table)] = (table, path)
        return table

    def is_delta_table(cls: type, spark: Any, path: str) -> bool:
        counts.checks[path] += 1
        return bool(plain_is_table(cls, spark, path))

    def history(self: DeltaTable, *more: Any, **named: Any) -> Any:
        counts.histories[paths[id(self)][1] if id(self) in paths else ""] += 1
        return plain_history(self, *more, **named)

    def format_(self: DataFrameReader, source: str) -> DataFrameReader:
        readers[id(self)] = (self, {"format": source})
        return plain_format(self, source)

    def option(self: DataFrameReader, key: str, value: Any) -> DataFrameReader:
        if id(self) in readers:
            readers[id(self)][1][key] = value
        return plain_option(self, key, value)

    def load(self: DataFrameReader, path: Any = None, *more: Any, **named: Any) -> Any:
        given = readers.get(id(self), (self, {}))[1]
        if given.get("format") == "delta":
            counts.opened[str(path), given.get("versionAsOf")] += 1
        return plain_load(self, path, *more, **named)

    def call(self: JavaMember, *arguments: Any) -> Any:
        if self.name == "forTable":
            counts.log_lookups[str(arguments[-1])] += 1
        return plain_call(self, *arguments)

    def writer(plain: Callable[..., Any]) -> Callable[..., Any]:
        def write(self: DataFrameWriter, path: Any = None, *more: Any, **named: Any) -> Any:
            counts.writes[str(path)] += 1
            return plain(self, path, *more, **named)

        return write

    def method(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        def look(self: ObjectStore, uri: str = "", *more: Any, **named: Any) -> Any:
            counts.objects[name, uri] += 1
            return plain(self, uri, *more, **named)

        return look

    hooks: list[tuple[type, str, Any]] = [
        (DeltaTable, "forPath", classmethod(for_path)),
        (DeltaTable, "isDeltaTable", classmethod(is_delta_table)),
        (DeltaTable, "history", history),
        (JavaMember, "__call__", call),
        (DataFrameReader, "format", format_),
        (DataFrameReader, "option", option),
        (DataFrameReader, "load", load),
        (DataFrameWriter, "save", writer(DataFrameWriter.save)),
        (DataFrameWriter, "parquet", writer(DataFrameWriter.parquet)),
    ]
    for name, plain in inspect.getmembers(ObjectStore, inspect.isfunction):
        parameters = list(inspect.signature(plain).parameters)
        if not name.startswith("_") and parameters[1:2] == ["uri"]:
            hooks.append((ObjectStore, name, method(name, plain)))
    with pytest.MonkeyPatch.context() as patched:
        for owner, name, hook in hooks:
            patched.setattr(owner, name, hook)
        yield counts
