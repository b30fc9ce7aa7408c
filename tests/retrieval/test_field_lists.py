"""Query lists as spreadsheets, pandas and people write them: see ../data/README.md."""

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from cbmir_spark import config
from cbmir_spark.errors import InputError
from cbmir_spark.retrieval.query import QueryRow
from cbmir_spark.retrieval.query_list import QueryList, read_queries
from cbmir_spark.storage import ObjectStore

DATA = Path(__file__).parent.parent / "data" / "field.tar.xz"
UID = "1.2.840.1"
# Part of the error of each list that cannot be used, and how many queries of each other one can.
ERRORS = {
    "utf16.csv": "UTF-8",
    "cp1252.csv": "UTF-8",
    "nul.csv": "NUL",
    "workbook.xlsx.csv": "CSV",
    "lists.parquet": "list",
    "upper_header.csv": "it has Query_ID, SOP_Instance_UID",
}
USABLE = {"excel_uid.csv": 0, "header_only.csv": 0, "int_uids.parquet": 0, "semicolon.csv": 2, "tabs.csv": 2}


def read(path: Path) -> QueryList:
    return read_queries(str(path), ObjectStore(config.load(environ={}).storage))


def usable(found: QueryList) -> list[QueryRow]:
    return [row for row in found.rows if isinstance(row, QueryRow)]


def _lists() -> dict[str, Any]:
    with tarfile.open(DATA) as archive:
        member = archive.extractfile("field/queries.json")
        assert member is not None
        return {each["name"]: each["right"] for each in json.load(member)}


LISTS = _lists()


@pytest.fixture(scope="module")
def field(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("field")
    with tarfile.open(DATA) as archive:
        archive.extractall(folder, filter="data")
    return folder / "field" / "queries"


@pytest.mark.parametrize("name", LISTS)
def test_each_list_is_answered_or_refused_in_one_line(field: Path, name: str) -> None:
    if name in ERRORS:
        with pytest.raises(InputError, match=ERRORS[name]) as error:
            read(field / name)
        assert len(str(error.value).splitlines()) == 1
        return
    right = USABLE.get(name, LISTS[name])
    found = len(usable(read(field / name)))
    # Percent-encoded names are names like any other.
    assert found == (right if isinstance(right, int) else 3)


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("cells", [2, 3, 7])
def test_cells_without_a_name_or_a_value_do_not_count(tmp_path: Path, delimiter: str, ending: str, cells: int) -> None:
    rows = [["", " "], ["query_id", "sop_instance_uid"], [" "], ["q1", f" {UID}"], [], ["q2", UID], [" ", ""]]
    padded = [row + [""] * (cells - len(row)) if row != [] else row for row in rows]
    (tmp_path / "list.csv").write_bytes(ending.join(delimiter.join(row) for row in padded).encode())
    found = usable(read(tmp_path / "list.csv"))
    assert [(row.query_id, row.value) for row in found] == [("q1", UID), ("q2", UID)]


def test_a_cell_beyond_the_header_is_no_padding(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text(f"query_id,sop_instance_uid,\nq1,{UID},,x\nq2,{UID},x\nq3,{UID}\nq4\n")
    assert [row.query_id for row in usable(read(tmp_path / "list.csv"))] == ["q2", "q3"]


@pytest.mark.parametrize("name", ["one\ntwo.dcm", "one\r\ntwo.dcm", "a\tb.dcm"])
def test_a_file_may_have_a_line_break_in_its_name(tmp_path: Path, name: str) -> None:
    (tmp_path / "list.csv").write_bytes(f'query_id,uri,frame\nq1,"/archive/{name}", 0.0 \n'.encode())
    (row,) = usable(read(tmp_path / "list.csv"))
    assert (row.value, row.frame) == (f"/archive/{name}", 0)


def test_other_control_characters_are_no_part_of_a_name(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_bytes(b"query_id,uri\nq1,/archive/\x1b[31m.dcm\n")
    assert usable(read(tmp_path / "list.csv")) == []
