"""Tables as CSV that a spreadsheet opens without running anything. No Spark; runs on the driver."""

import csv
import io
import unicodedata

import pyarrow as pa

# What a spreadsheet takes for the start of a formula or a command.
_STARTS = ("=", "+", "-", "@", "|", "%")


FOLDER = "csv"


def name_of(uri: str) -> str:
    """The CSV file that stands for a Parquet file of a result: hits-00000.csv for …/hits/part-00000.parquet."""
    folder, name = uri.split("/")[-2:]
    return f"{folder}-{name.removeprefix('part-').removesuffix('.parquet')}.csv"


def as_csv(rows: pa.Table) -> bytes:
    """Rows as UTF-8 CSV with a header: text quoted and made `harmless`, lists joined by blanks, nulls empty."""
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\r\n")
    writer.writerow(rows.schema.names)
    for row in zip(*(column.to_pylist() for column in rows.columns), strict=True):
        writer.writerow([_cell(value) for value in row])
    return buffer.getvalue().encode("utf-8")


def harmless(text: str) -> str:
    """Text that no spreadsheet computes: an apostrophe goes before what could start a formula.

    Spreadsheets pass over blanks and characters that are not shown before they look, and take full-width signs for
    plain ones; control characters could end the cell, so they become blanks.
    """
    flat = "".join(" " if unicodedata.category(character) == "Cc" else character for character in text)
    shown = (character for character in flat if unicodedata.category(character)[0] not in "CZ")
    first = unicodedata.normalize("NFKC", next(shown, ""))
    return f"'{flat}" if first.startswith(_STARTS) else flat


def _cell(value: object) -> object:
    if value is None:
        return ""
    if isinstance(value, list):
        return harmless(" ".join(str(each) for each in value))
    return harmless(value) if isinstance(value, str) else value
