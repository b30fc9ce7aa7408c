"""What a query is, what a row of a list may ask for, and how a query ends."""

from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cbmir_spark.dicom.vocabulary_tables import UNKNOWN
from cbmir_spark.lake import columns as cols


@dataclass(frozen=True)
class Within:
    """What the rows that a query meets must have; None: anything. A row that does not say has nothing."""

    sex: str | None = None
    age_min: float | None = None
    age_max: float | None = None
    year_min: int | None = None
    year_max: int | None = None

    def columns(self) -> tuple[str, ...]:
        """The columns that it looks at."""
        asked = {
            cols.SEX: self.sex is not None,
            cols.AGE_YEARS: self.age_min is not None or self.age_max is not None,
            cols.YEAR: self.year_min is not None or self.year_max is not None,
        }
        return tuple(name for name, needed in asked.items() if needed)

    def bars(self, rows: pa.Table) -> NDArray[np.bool_]:
        """(n,) mask of the rows that are not within."""
        inside = np.ones(len(rows), dtype=bool)
        if self.sex is not None:
            inside &= np.array([value == self.sex for value in rows.column(cols.SEX).to_pylist()], dtype=bool)
        for column, least, most in (
            (cols.AGE_YEARS, self.age_min, self.age_max),
            (cols.YEAR, self.year_min, self.year_max),
        ):
            if least is None and most is None:
                continue
            # What is null becomes not-a-number, which is neither above nor below anything.
            values = rows.column(column).cast(pa.float64()).to_numpy()
            inside &= (values >= (-np.inf if least is None else least)) & (values <= (np.inf if most is None else most))
        return ~inside


ANYTHING = Within()


class Answered(StrEnum):
    """What became of a query."""

    ANSWERED = "answered"
    NO_CANDIDATES = "no_candidates"
    NOT_FOUND = "not_found"
    UNREADABLE = "unreadable"
    BAD_ROW = "bad_row"


@dataclass(frozen=True)
class Own:
    """What one row of a list asks for otherwise than the settings do; None: as they do.

    `modality` and `body_part` say which partitions are searched, `within` what rows must have there.
    """

    k: int | None = None
    modality: str | None = None
    body_part: str | None = None
    exclude_same: str | None = None
    unique: str | None = None
    within: Within = ANYTHING


AS_SET = Own()


@dataclass(frozen=True)
class Wanted:
    """One row of a query list that can be looked for; `frame` is None for the middle one of those indexed."""

    query_id: str
    naming: str
    value: str
    frame: int | None
    own: Own = AS_SET


@dataclass(frozen=True)
class Query:
    """A query as the search takes it: its vector, (D,) float32, and what is known of its image.

    UNKNOWN stands for a modality or body part that the tags do not give. `predicted` is the model's label, UNKNOWN
    where it has none. Without ids nothing is excluded as being the same.
    """

    query_id: str
    vector: NDArray[np.float32]
    modality: str = UNKNOWN
    body_part: str = UNKNOWN
    predicted: str = UNKNOWN
    probability: float = 0.0
    image_id: str | None = None
    series_id: str | None = None
    study_id: str | None = None
    patient_id: str | None = None
    frame: int | None = None
    own: Own = AS_SET


@dataclass(frozen=True)
class Status:
    """A query's end: the partitions searched, as CT/CHEST, the rows it was compared with, and its hits."""

    query_id: str
    status: Answered
    reason: str | None = None
    partitions: tuple[str, ...] = ()
    candidates: int = 0
    hits: int = 0
