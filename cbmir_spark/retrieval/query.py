"""What a query is, what a row of a query list may override, and how a query ends."""

from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cbmir_spark.dicom.vocabulary_tables import UNKNOWN
from cbmir_spark.lake import columns as cols


@dataclass(frozen=True)
class HitFilter:
    """Restricts hits by sex, age and year; None restricts nothing. Missing values never match."""

    sex: str | None = None
    age_min: float | None = None
    age_max: float | None = None
    year_min: int | None = None
    year_max: int | None = None

    def columns(self) -> tuple[str, ...]:
        """Name the columns that it compares."""
        compared = {
            cols.SEX: self.sex is not None,
            cols.AGE_YEARS: self.age_min is not None or self.age_max is not None,
            cols.YEAR: self.year_min is not None or self.year_max is not None,
        }
        return tuple(name for name, needed in compared.items() if needed)

    def rejects(self, rows: pa.Table) -> NDArray[np.bool_]:
        """Return an (n,) mask of the rows that do not match."""
        inside = np.ones(len(rows), dtype=bool)
        if self.sex is not None:
            inside &= np.array([value == self.sex for value in rows.column(cols.SEX).to_pylist()], dtype=bool)
        for column, least, most in (
            (cols.AGE_YEARS, self.age_min, self.age_max),
            (cols.YEAR, self.year_min, self.year_max),
        ):
            if least is None and most is None:
                continue
            # A null becomes NaN, which compares false with either limit.
            values = rows.column(column).cast(pa.float64()).to_numpy()
            inside &= (values >= (-np.inf if least is None else least)) & (values <= (np.inf if most is None else most))
        return ~inside


UNRESTRICTED = HitFilter()


class QueryStatus(StrEnum):
    """How a query ends."""

    ANSWERED = "answered"
    NO_CANDIDATES = "no_candidates"
    NOT_FOUND = "not_found"
    UNREADABLE = "unreadable"
    BAD_ROW = "bad_row"


@dataclass(frozen=True)
class QueryOverrides:
    """Settings that one row of a list overrides; None leaves a setting as it is.

    `modality` and `body_part` choose the partitions to search, `hit_filter` restricts the hits in them.
    """

    k: int | None = None
    modality: str | None = None
    body_part: str | None = None
    exclude_same: str | None = None
    unique: str | None = None
    hit_filter: HitFilter = UNRESTRICTED


NO_OVERRIDES = QueryOverrides()


@dataclass(frozen=True)
class QueryRow:
    """A valid row of a query list: the column that names the query, and the value there.

    `frame` is None for the middle one of the indexed frames. `vector` is (D,) float32 where the row brings its own
    instead of naming an image.
    """

    query_id: str
    naming: str
    value: str
    frame: int | None
    overrides: QueryOverrides = NO_OVERRIDES
    vector: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Query:
    """A query as the search takes it: its vector, (D,) float32, and what is known about its image.

    UNKNOWN stands for a modality or body part without a tag. `predicted` is the model's label, UNKNOWN where there is
    none. Without ids nothing is excluded as the same image, series, study or patient.
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
    overrides: QueryOverrides = NO_OVERRIDES


@dataclass(frozen=True)
class Status:
    """How a query ended: the partitions searched, as CT/CHEST, the rows it was compared with, and its hits."""

    query_id: str
    status: QueryStatus
    reason: str | None = None
    partitions: tuple[str, ...] = ()
    candidates: int = 0
    hits: int = 0
