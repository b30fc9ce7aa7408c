"""CSV that spreadsheets open and do not run."""

import csv
import io

import pyarrow as pa
import pytest

from cbmir_spark.retrieval import csv_export

HOSTILE = [
    "=1+1",
    "+1",
    "-1",
    "@SUM(A1)",
    "|calc",
    "%0A=1",
    " =1+1",
    "\t=1+1",
    "\r=1",
    "\n=cmd|' /C calc'!A0",
    "\u200b=1",
    "\ufeff=1",
    "\u202e=1",
    "\uff1d1+1",
    "\uff0b1",
    "\uff0d1",
    "\uff20A1",
    "\u00a0=1",
    "\x00=1",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_what_could_be_a_formula_is_text(text: str) -> None:
    made = csv_export.harmless(text)
    assert made.startswith("'")
    assert not set(made) & {chr(code) for code in range(32)}


@pytest.mark.parametrize("text", ["a=1", "CT/CHEST", "1.2.840", "naïve", "", "'=1", "(=1)"])
def test_what_could_not_is_left_as_it_is(text: str) -> None:
    assert csv_export.harmless(text) == text


def test_rows_read_back() -> None:
    rows = pa.table(
        {
            "query_id": ['a,"b"\r\nc', "=1", None],
            "distance": [0.1, 1e-17, None],
            "rank": [1, 2, None],
            "partitions": [["CT/CHEST", "MR/HEAD"], [], None],
        }
    )
    text = csv_export.as_csv(rows).decode("utf-8")
    read = list(csv.reader(io.StringIO(text, newline="")))
    assert read == [
        ["query_id", "distance", "rank", "partitions"],
        ['a,"b"  c', "0.1", "1", "CT/CHEST MR/HEAD"],
        ["'=1", "1e-17", "2", ""],
        ["", "", "", ""],
    ]
