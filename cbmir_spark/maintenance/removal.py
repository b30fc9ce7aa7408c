"""Select the rows to remove by their owners (kind, pseudonym), and count what was removed."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import DataFrame

from cbmir_spark.lake import schemas

Mask = Callable[[Any], Any]
"""Maps an Arrow table or batch to a boolean array: true for the rows to remove."""


@dataclass(frozen=True)
class Removed:
    """Rows and files removed from one place."""

    rows: int = 0
    files: int = 0

    def __add__(self, other: "Removed") -> "Removed":
        return Removed(self.rows + other.rows, self.files + other.files)


def belonging(owners: Iterable[tuple[str, str]]) -> Mask:
    """Mask the rows that belong to one of the owners (kind, pseudonym), by the id columns that they have.

    Runs on the driver or per task.
    """
    by_column: dict[str, list[str]] = {column: [] for column in schemas.OWNERS.values()}
    for kind, pseudonym in owners:
        by_column[schemas.OWNERS[kind]].append(pseudonym)
    masks = {column: is_in(column, values) for column, values in by_column.items()}
    return lambda rows: reduce(pc.or_, [mask(rows) for column, mask in masks.items() if column in rows.schema.names])


def is_in(column: str, values: Sequence[str]) -> Mask:
    """Mask the rows whose column has one of the values."""
    searched = pa.array(values, pa.string())
    return lambda rows: pc.is_in(rows[column], value_set=searched)


def masked(rows: DataFrame, mask: Mask) -> DataFrame:
    """Select the masked rows, in tasks: the plan of a join could show in logs whose rows are searched."""

    def pick(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            yield batch.filter(mask(batch))

    return rows.mapInArrow(pick, rows.schema)
