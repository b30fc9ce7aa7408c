"""Query lists from Python: data frames, image ids, files, vectors and `Query` objects. Runs on the driver."""

import csv
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import PurePath
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cbmir_spark import storage
from cbmir_spark.errors import InputError
from cbmir_spark.lake import columns as cols
from cbmir_spark.retrieval.query import QueryRow
from cbmir_spark.retrieval.query_list import VECTOR, QueryList, check, check_unique, is_image_id, text_rows


@dataclass(frozen=True)
class Query:
    """One query for `Lake.search`, by one of image_id, sop_instance_uid, series_id, series_instance_uid or uri.

    The other fields override the search's settings for this query alone, as the columns of a query list do.
    """

    query_id: str
    image_id: str | None = None
    sop_instance_uid: str | None = None
    series_id: str | None = None
    series_instance_uid: str | None = None
    uri: str | None = None
    frame: int | None = None
    k: int | None = None
    modality: str | None = None
    body_part: str | None = None
    sex: str | None = None
    age_min: float | None = None
    age_max: float | None = None
    year_min: int | None = None
    year_max: int | None = None
    exclude_same: str | None = None
    unique: str | None = None


def from_any(queries: Any, level: str) -> QueryList | str | None:
    """Check whatever `Lake.search` takes; the path of a list is returned as it is, None stays None.

    Raises InputError for anything else, and for queries that cannot be used as a whole.
    """
    if queries is None or isinstance(queries, str | os.PathLike):
        path = None if queries is None else os.fspath(queries)
        if path is not None and PurePath(path).suffix.lower() in (".dcm", ".dicom"):
            return from_files([path], level)
        return path
    if isinstance(queries, np.ndarray):
        return from_vectors(queries, level)
    if isinstance(queries, pa.Table):
        return from_table(queries, level)
    if hasattr(queries, "toArrow"):
        return from_table(queries.toArrow(), level)
    if hasattr(queries, "to_arrow"):
        return from_table(queries.to_arrow(), level)
    if hasattr(queries, "iloc") and hasattr(queries, "columns"):
        return from_pandas(queries, level)
    if isinstance(queries, Sequence) and not isinstance(queries, bytes):
        return _from_sequence(queries, level)
    raise InputError(
        f"queries are {type(queries).__name__}: give a path, a pandas, Spark or Arrow table, a list of image ids, "
        "paths or Query, or an (n, D) array of vectors"
    )


def _from_sequence(queries: Sequence[Any], level: str) -> QueryList:
    if all(isinstance(each, Query) for each in queries) and queries:
        return from_queries(queries, level)
    if not all(isinstance(each, str | os.PathLike) for each in queries):
        kinds = ", ".join(sorted({type(each).__name__ for each in queries}))
        raise InputError(f"the list of queries holds {kinds}: give image ids, paths or Query objects alone")
    texts = [os.fspath(each) for each in queries]
    named = [is_image_id(text) for text in texts]
    if all(named):
        return from_images(texts, level)
    if any(named):
        raise InputError(f"the list of queries mixes image ids and paths (such as {texts[named.index(False)]!r})")
    return from_files(texts, level)


def from_table(table: pa.Table, level: str = "image") -> QueryList:
    """Check the rows of an Arrow table that has the columns of a query list."""
    columns = table.schema.names
    try:
        check_unique(columns)
        rows = text_rows(table)
    except (pa.ArrowException, csv.Error) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"the queries cannot be read as a query list: {reason}") from None
    return check(columns, rows, level, "the query list")


def from_pandas(frame: Any, level: str = "image") -> QueryList:
    """Check the rows of a pandas frame that has the columns of a query list; NaN is an empty cell."""
    try:
        table = pa.Table.from_pandas(frame, preserve_index=False)
    except (pa.ArrowException, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"the queries cannot be read as a query list: {reason}") from None
    return from_table(table, level)


def from_queries(queries: Sequence[Query], level: str = "image") -> QueryList:
    """Check queries given as objects."""
    rows = [{name: str(value) for name, value in vars(query).items() if value is not None} for query in queries]
    return check([field.name for field in fields(Query)], rows, level, "the list of queries")


def from_images(image_ids: Sequence[str], level: str = "image") -> QueryList:
    """Query by image ids; each id is its query's query_id."""
    rows = [{cols.QUERY_ID: each, cols.IMAGE_ID: each} for each in image_ids]
    return check([cols.QUERY_ID, cols.IMAGE_ID], rows, level, "the list of image ids")


def from_files(uris: Sequence[str], level: str = "image") -> QueryList:
    """Query by .dcm files; query ids are file-1, file-2, …, since a file's name may identify a patient.

    Raises InputError at level series.
    """
    _images_only("files", level)
    rows = [{cols.QUERY_ID: f"file-{number}", cols.URI: uri} for number, uri in enumerate(uris, start=1)]
    checked = check([cols.QUERY_ID, cols.URI], rows, "image", "the list of files")
    folders = {storage.canonical(row.value).rpartition("/")[0] for row in checked.rows if isinstance(row, QueryRow)}
    return replace(checked, folders=tuple(sorted(folders)))


def from_vectors(vectors: NDArray[Any], level: str = "image") -> QueryList:
    """Query by (n, D) vectors of the index's model; query ids are vector-1, vector-2, …

    Raises InputError for another shape, for NaN or infinity, for vectors of zeros, and at level series.
    """
    _images_only("vectors", level)
    if vectors.ndim != 2 or not np.issubdtype(vectors.dtype, np.number) or np.iscomplexobj(vectors):
        raise InputError(
            f"query vectors must be real numbers of shape (n, D), not {vectors.dtype} of shape {vectors.shape}"
        )
    with np.errstate(over="ignore"):
        values = np.ascontiguousarray(vectors, dtype=np.float32)
    for problem, found in (
        ("NaN or infinity", ~np.isfinite(values).all(axis=1)),
        ("only zeros", ~values.any(axis=1)),
    ):
        if found.any():
            raise InputError(
                f"query vector {int(np.argmax(found)) + 1} of {len(values)} contains {problem}: leave it out"
            )
    return QueryList(
        tuple(
            QueryRow(f"vector-{number}", VECTOR, "", None, vector=vector)
            for number, vector in enumerate(values, start=1)
        ),
        ignored=(),
    )


def _images_only(kind: str, level: str) -> None:
    if level == "series":
        raise InputError(f"{kind} cannot name series: give image ids or Query objects, or search at level image")
