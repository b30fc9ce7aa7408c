"""Answers without the rows of the forgotten, whichever version wrote them; without Spark."""

import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cbmir_spark import config, storage
from cbmir_spark.lake import columns as cols
from cbmir_spark.lake import schemas
from cbmir_spark.lake.paths import LakePaths
from cbmir_spark.maintenance import erase_files, removal
from cbmir_spark.maintenance.removal import Removed
from cbmir_spark.retrieval import csv_export
from cbmir_spark.storage import ObjectStore
from tests.support.kills import Killed, dying


def test_a_page_of_answers_that_do_not_say_what_was_asked_goes_if_it_is_older(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without Spark: what answers hold is read and written by the driver."""
    store = ObjectStore(config.load(environ={}).storage)
    lake = LakePaths(storage.canonical(str(tmp_path)), storage.canonical(str(tmp_path / "vault")))
    hit = dict.fromkeys(schemas.RESULTS_HITS.schema.names, "x") | {cols.RANK: 1, cols.IMAGE_ID: "b" * 32}
    for name, asked in (("old", None), ("new", "c" * 32), ("of the forgotten", "a" * 32)):
        folder = tmp_path / "results" / name
        for table, rows in (
            (schemas.RESULTS_HITS, [hit | {cols.QUERY_ID: "q"}, hit | {cols.QUERY_ID: "r"}]),
            (schemas.RESULTS_STATUSES, [{cols.QUERY_ID: "q"}, {cols.QUERY_ID: "r"}]),
            (
                schemas.RESULTS_QUERIES,
                [{cols.QUERY_ID: "q", cols.IMAGE_ID: asked}, {cols.QUERY_ID: "r", cols.IMAGE_ID: "d" * 32}],
            ),
        ):
            if table is not schemas.RESULTS_QUERIES or asked is not None:
                (folder / table.name).mkdir(parents=True)
                pq.write_table(pa.Table.from_pylist(rows), folder / table.name / "part-00000.parquet")
                (folder / table.name / ".part-00000.parquet.crc").touch()
        (folder / "gallery.html").write_text("pictures")
        for table_name in ("hits", "statuses"):
            rows_shown = pq.read_table(folder / table_name / "part-00000.parquet")
            (folder / "csv").mkdir(exist_ok=True)
            (folder / "csv" / f"{table_name}-00000.csv").write_bytes(csv_export.as_csv(rows_shown))
    (tmp_path / "evaluation" / "run").mkdir(parents=True)
    (tmp_path / "evaluation" / "run" / "report.html").write_text("figures")

    def pages() -> dict[str, str]:
        return {path.parent.name: path.read_text() for path in tmp_path.glob("*/*/*.html")}

    mask = removal.belonging([("image", "a" * 32), ("patient", "e" * 32)])
    before = {"old": "pictures", "new": "pictures", "of the forgotten": "pictures", "run": "figures"}
    rows, files = erase_files.erase_answers(lake, removal.belonging([]), 0.0, store)
    assert (rows.rows, files.files, pages()) == (0, 0, before)
    # Killed before a single row is dropped, it has rewritten the CSV files: the rows still show what is left to do.
    # The first thing to go, before new content is written, is Hadoop's checksum.
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(ObjectStore, "delete", dying(ObjectStore.delete, 1))
        erase_files.erase_answers(lake, mask, 0.0, store)
    sheet = (tmp_path / "results" / "of the forgotten" / "csv" / "hits-00000.csv").read_text()
    assert '"r"' in sheet and '"q"' not in sheet
    (tmp_path / "results" / "of the forgotten" / "gallery.html").write_text("pictures")
    rows, files = erase_files.erase_answers(lake, mask, 0.0, store)
    assert (rows.rows, rows.files, files.files) == (3, 3, 3)
    for name, left in (("new", ['"q"', '"r"']), ("of the forgotten", ['"r"'])):
        for sheet in (tmp_path / "results" / name / "csv").iterdir():
            lines = sheet.read_text().splitlines()
            place = lines[0].split(",").index('"query_id"')
            assert [line.split(",")[place] for line in lines[1:]] == left
    assert pages() == before | {"of the forgotten": erase_files.NOTE}
    for table in (schemas.RESULTS_HITS, schemas.RESULTS_STATUSES, schemas.RESULTS_QUERIES):
        folder = tmp_path / "results" / "of the forgotten" / table.name
        assert pq.read_table(folder / "part-00000.parquet")[cols.QUERY_ID].to_pylist() == ["r"]
        assert not (folder / ".part-00000.parquet.crc").exists()
    # The tombstone is newer than a page that may have shown anything.
    rows, files = erase_files.erase_answers(lake, mask, time.time() + 60, store)
    assert (rows.rows, files.files) == (0, 1)
    assert pages() == before | {"of the forgotten": erase_files.NOTE, "old": erase_files.NOTE}
    assert erase_files.erase_answers(lake, mask, time.time() + 60, store) == (Removed(), Removed())
