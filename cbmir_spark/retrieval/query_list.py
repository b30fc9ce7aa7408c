"""Read and check query lists; see query_sources.py for lists that are no file. Runs on the driver.

A row that cannot be used becomes a status and costs no other row its answer.
"""

import csv
import io
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet

from cbmir_spark import storage
from cbmir_spark.config import MOST_HITS, RetrievalSettings
from cbmir_spark.dicom import vocabulary_tables
from cbmir_spark.errors import InputError
from cbmir_spark.lake import columns as cols
from cbmir_spark.retrieval.query import HitFilter, QueryOverrides, QueryRow, QueryStatus, Status
from cbmir_spark.storage import ObjectStore

SOP_INSTANCE_UID = "sop_instance_uid"
SERIES_INSTANCE_UID = "series_instance_uid"
# Columns that may name the query of a row, at each level.
NAMING = {
    "image": (cols.URI, cols.IMAGE_ID, SOP_INSTANCE_UID),
    "series": (cols.SERIES_ID, SERIES_INSTANCE_UID, cols.IMAGE_ID, SOP_INSTANCE_UID),
}
# How rows that bring a vector name it.
VECTOR = "vector"
K, EXCLUDE_SAME, UNIQUE = "k", "exclude_same", "unique"
AGE_MIN, AGE_MAX, YEAR_MIN, YEAR_MAX = "age_min", "age_max", "year_min", "year_max"
# Columns by which a row overrides settings.
OVERRIDES = (K, cols.MODALITY, cols.BODY_PART, cols.SEX, AGE_MIN, AGE_MAX, YEAR_MIN, YEAR_MAX, EXCLUDE_SAME, UNIQUE)
# Columns that a query list may have at any level; others are ignored.
_COLUMNS = frozenset({cols.QUERY_ID, cols.FRAME, *itertools.chain(*NAMING.values()), *OVERRIDES})
# No identifier or path is longer.
LONGEST_CELL = 4096

_PSEUDONYM = re.compile(r"[0-9a-f]{32}")
_UID = re.compile(r"[0-9.]{1,64}")
_FRAME_NUMBER = re.compile(r"[0-9]{1,9}([.,]0+)?")
# Parquet may store whole numbers as floats.
_WHOLE = re.compile(r"[0-9]{1,6}(\.0)?")
_AGE = re.compile(r"[0-9]{1,3}(\.[0-9]{1,6})?")


@dataclass(frozen=True)
class QueryList:
    """Rows of a list in its order: valid ones, and the statuses of the others.

    `ignored` are columns that a query list does not have, `folders` those of files that were listed in code.
    """

    rows: tuple[QueryRow | Status, ...]
    ignored: tuple[str, ...]
    folders: tuple[str, ...] = ()


def read_queries(uri: str, store: ObjectStore, level: str = "image") -> QueryList:
    """Read a CSV or Parquet query list.

    Each row has `query_id` and one of the level's NAMING columns; `frame` (images only) and the OVERRIDES columns are
    optional. Raises InputError where the list itself cannot be used, naming the missing columns and those there are.
    """
    try:
        content = store.read_bytes(storage.canonical(uri))
    except OSError as error:
        raise InputError(
            f"query list {uri}: {error.strerror or 'cannot be read'}; give a CSV or Parquet file"
        ) from None
    try:
        columns, rows = _parquet_rows(content) if content[:4] == b"PAR1" else _csv_rows(content)
    except (pa.ArrowException, csv.Error, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"query list {uri} cannot be read as CSV (in UTF-8) or Parquet: {reason}") from None
    return check(columns, rows, level, f"query list {uri}")


def check(columns: Sequence[str], rows: Sequence[Mapping[str, str]], level: str, source: str) -> QueryList:
    """Check rows of text cells, empty ones left out. `source` names the list in an InputError about its columns."""
    missing = [] if cols.QUERY_ID in columns else [cols.QUERY_ID]
    naming = NAMING[level]
    missing += [] if set(naming) & set(columns) else [f"one of {', '.join(naming)}"]
    if missing:
        present = ", ".join(name[:64] for name in columns[:20]) or "nothing"
        raise InputError(f"{source} lacks column {' and '.join(missing)}; it has {present}")
    times = Counter(row.get(cols.QUERY_ID) for row in rows)
    checked = [_checked(number, row, times[row.get(cols.QUERY_ID)], naming) for number, row in enumerate(rows, start=1)]
    known = {cols.QUERY_ID, cols.FRAME, *naming, *OVERRIDES}
    return QueryList(tuple(checked), tuple(name for name in columns if name not in known))


# Where a CSV row with more cells than the header has their number.
_CELLS = "\0cells"


def _csv_rows(content: bytes) -> tuple[list[str], list[dict[str, str]]]:
    """Return the column names, and the cells of each row that are not blank.

    Columns without a name and rows without a cell, which spreadsheets write, do not count.
    """
    if b"\0" in content:
        raise csv.Error("it contains NUL characters; save it as UTF-8")
    before = csv.field_size_limit(len(content) + 1)
    try:
        text = content.decode("utf-8-sig")
        lines = list(_lines(text, _delimiter(text)))
    finally:
        csv.field_size_limit(before)
    columns = [name.strip() for name in lines[0]] if lines else []
    named = [name for name in columns if name]
    check_unique(named)
    rows = []
    for cells in lines[1:]:
        row = {name: cell for name, cell in zip(columns, cells, strict=False) if name and cell.strip()}
        # Spreadsheets leave out blank cells at the end of a row.
        if any(cell.strip() for cell in cells[len(columns) :]):
            row[_CELLS] = str(len(cells))
        rows.append(row)
    return named, rows


def _lines(text: str, delimiter: str) -> Iterator[list[str]]:
    """Yield the rows that have a cell with something in it."""
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    return (cells for cells in rows if any(cell.strip() for cell in cells))


def _delimiter(text: str) -> str:
    """Return the delimiter by which the header has a query_id: spreadsheets of some languages write semicolons."""
    for delimiter in ",;\t":
        if cols.QUERY_ID in map(str.strip, next(_lines(text, delimiter), [])):
            return delimiter
    return ","


def _parquet_rows(content: bytes) -> tuple[list[str], list[dict[str, str]]]:
    columns = pa.parquet.read_schema(io.BytesIO(content)).names
    check_unique(columns)
    wanted = [name for name in columns if name in _COLUMNS]
    table = pa.parquet.read_table(io.BytesIO(content), columns=wanted)
    return columns, text_rows(table)


def text_rows(table: pa.Table) -> list[dict[str, str]]:
    """Return the cells that are not empty of each row, as text, of the columns that a query list may have."""
    table = table.select([name for name in table.column_names if name in _COLUMNS])
    text = table.cast(pa.schema([(name, pa.string()) for name in table.column_names]))
    return [{name: cell for name, cell in row.items() if cell and cell.strip()} for row in text.to_pylist()]


def check_unique(columns: Sequence[str]) -> None:
    twice = [name[:64] for name, times in Counter(columns).items() if times > 1]
    if twice:
        raise csv.Error(f"column {twice[0]} occurs more than once")


def _checked(number: int, row: Mapping[str, str], times: int, names: Sequence[str]) -> QueryRow | Status:
    query_id, frame = row.get(cols.QUERY_ID, ""), row[cols.FRAME].strip() if cols.FRAME in row else None
    given = {name: row[name] for name in names if name in row}
    problem = None
    if _CELLS in row:
        problem = f"row {number} has {row[_CELLS]} cells, more than the header"
    elif not query_id:
        problem = f"row {number} has no query_id"
    elif len(query_id) > LONGEST_CELL:
        problem = f"row {number} has a query_id of {len(query_id)} characters"
    elif times > 1:
        problem = f"query_id occurs {times} times"
    elif len(given) != 1:
        problem = f"{' and '.join(given) or 'none'} of {', '.join(names)} given; give exactly one"
    elif frame is not None and not _FRAME_NUMBER.fullmatch(frame):
        problem = "frame is not a number from 0"
    if problem is None:
        naming, value = next(iter(given.items()))
        problem = _unfit(naming, value.strip())
    if problem is None:
        overrides = _overrides({name: row[name].strip() for name in OVERRIDES if name in row})
        if isinstance(overrides, QueryOverrides):
            frame_number = None if frame is None else int(re.split("[.,]", frame)[0])
            return QueryRow(query_id, naming, value.strip(), frame_number, overrides)
        problem = overrides
    return Status(query_id[:LONGEST_CELL], QueryStatus.BAD_ROW, problem)


def _overrides(cells: Mapping[str, str]) -> QueryOverrides | str:
    """Parse what a row overrides, or say what is wrong with it."""
    for name, words in (
        (cols.MODALITY, vocabulary_tables.MODALITIES),
        (cols.BODY_PART, frozenset(vocabulary_tables.BODY_PARTS)),
        (cols.SEX, frozenset("FMO")),
        (EXCLUDE_SAME, frozenset(RetrievalSettings.choices(EXCLUDE_SAME))),
        (UNIQUE, frozenset(RetrievalSettings.choices(UNIQUE))),
    ):
        if name in cells and cells[name] not in words:
            choices = f"; choose one of {', '.join(sorted(words))}" if len(words) < 10 else "; see `cbmir vocabulary`"
            return f"{name} {_quoted(cells[name])} is not a known value{choices}"
    numbers: dict[str, float] = {}
    for name, most in ((K, MOST_HITS), (AGE_MIN, 200), (AGE_MAX, 200), (YEAR_MIN, 9999), (YEAR_MAX, 9999)):
        if name not in cells:
            continue
        pattern = _AGE if name in (AGE_MIN, AGE_MAX) else _WHOLE
        if not pattern.fullmatch(cells[name]) or not (name == K) <= float(cells[name]) <= most:
            return f"{name} {_quoted(cells[name])} is not a number from {int(name == K)} to {most}"
        numbers[name] = float(cells[name])
    for least, greatest in ((AGE_MIN, AGE_MAX), (YEAR_MIN, YEAR_MAX)):
        if numbers.get(least, -math.inf) > numbers.get(greatest, math.inf):
            return f"{least} is above {greatest}"
    return QueryOverrides(
        k=int(numbers[K]) if K in numbers else None,
        modality=cells.get(cols.MODALITY),
        body_part=cells.get(cols.BODY_PART),
        exclude_same=cells.get(EXCLUDE_SAME),
        unique=cells.get(UNIQUE),
        hit_filter=HitFilter(
            sex=cells.get(cols.SEX),
            age_min=numbers.get(AGE_MIN),
            age_max=numbers.get(AGE_MAX),
            year_min=int(numbers[YEAR_MIN]) if YEAR_MIN in numbers else None,
            year_max=int(numbers[YEAR_MAX]) if YEAR_MAX in numbers else None,
        ),
    )


def is_image_id(text: str) -> bool:
    """Tell whether a text has the form of an image id: 32 hexadecimal digits."""
    return _PSEUDONYM.fullmatch(text) is not None


def _quoted(cell: str) -> str:
    """Quote a cell for an error: short, and without terminal control characters."""
    return repr(cell[:32])


def _unfit(naming: str, value: str) -> str | None:
    """Say why a cell cannot name an image; None where it can."""
    if naming in (cols.IMAGE_ID, cols.SERIES_ID):
        return None if _PSEUDONYM.fullmatch(value) else f"{naming} is not 32 hexadecimal digits"
    if naming in (SOP_INSTANCE_UID, SERIES_INSTANCE_UID):
        return None if _UID.fullmatch(value) else f"{naming} is not a UID"
    # A file's name may contain line breaks.
    if len(value) > LONGEST_CELL or not "".join(value.splitlines()).replace("\t", "").isprintable():
        return "uri is too long or holds control characters"
    try:
        usable = storage.is_native(storage.canonical(value))
    except InputError:
        usable = False
    if not usable:
        return "uri has a scheme that is not supported; use a path, file: or s3a:"
    return None
