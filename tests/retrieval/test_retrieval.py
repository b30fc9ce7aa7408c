"""Which partitions a query meets, what becomes of the rows of a list, and what a run leaves behind."""

import csv
import http.server
import io
import os
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pydicom
import pytest
from pydicom.data import get_testdata_file
from pydicom.uid import UID
from pyspark.sql import SparkSession

from cbmir_spark import config, storage
from cbmir_spark.cli import views
from cbmir_spark.config import RetrievalSettings, Settings
from cbmir_spark.errors import InputError, ModelError
from cbmir_spark.index import job as index_job
from cbmir_spark.index.vector_files import VectorFile
from cbmir_spark.ingest import job as ingest_job
from cbmir_spark.ingest import parse
from cbmir_spark.lake import columns as cols
from cbmir_spark.lake import delta, pseudonyms, schemas
from cbmir_spark.lake.paths import LakePaths
from cbmir_spark.retrieval import answer as answers
from cbmir_spark.retrieval import job as retrieval_job
from cbmir_spark.retrieval import plan
from cbmir_spark.retrieval.query import Query, QueryRow, QueryStatus, Status
from cbmir_spark.retrieval.query_list import QueryList, read_queries
from cbmir_spark.storage import ObjectStore
from tests.conftest import MakeSettings
from tests.support.browser import RUN, dom_in_browser
from tests.support.models import open_index, save_model

pytestmark = pytest.mark.slow

PLACES = [("CT", "CHEST"), ("CT", "HEAD"), ("CT", "UNKNOWN"), ("MR", "BRAIN"), ("MR", "UNKNOWN"), ("US", "LIVER")]


def options(**values: Any) -> RetrievalSettings:
    return config.load(environ={}).retrieval.replace(**values)


EXISTING = {*PLACES, ("US", "CHEST")}


@pytest.mark.parametrize(
    ("query", "values", "expected"),
    [
        ({"modality": "CT", "body_part": "CHEST"}, {}, {("CT", "CHEST")}),
        ({"modality": "CT", "body_part": "CHEST"}, {"unknown": "include"}, {("CT", "CHEST"), ("CT", "UNKNOWN")}),
        # Untagged: the predicted class where it is sure, else the modality.
        ({"modality": "CT", "predicted": "CT/HEAD", "probability": 0.5}, {}, {("CT", "HEAD")}),
        ({"modality": "CT", "predicted": "HEAD", "probability": 0.5}, {}, {("CT", "HEAD")}),
        ({"modality": "CT", "predicted": "CT/HEAD", "probability": 0.4}, {}, {("CT", "CHEST"), ("CT", "HEAD")}),
        ({"modality": "CT"}, {}, {("CT", "CHEST"), ("CT", "HEAD")}),
        # Predicted: the tag does not count; without a class the modality is searched.
        (
            {"modality": "CT", "body_part": "CHEST", "predicted": "CT/HEAD", "probability": 0.9},
            {"prefilter": "predicted"},
            {("CT", "HEAD")},
        ),
        ({"modality": "US", "body_part": "CHEST"}, {"prefilter": "predicted"}, {("US", "CHEST"), ("US", "LIVER")}),
        ({"modality": "MR", "body_part": "BRAIN"}, {"prefilter": "modality"}, {("MR", "BRAIN")}),
        (
            {"modality": "MR", "body_part": "BRAIN"},
            {"prefilter": "modality", "unknown": "include"},
            {("MR", "BRAIN"), ("MR", "UNKNOWN")},
        ),
        # No modality: the predicted class's, or any.
        ({"body_part": "CHEST"}, {}, {("CT", "CHEST"), ("US", "CHEST")}),
        ({"predicted": "US/CHEST", "probability": 1.0}, {"prefilter": "modality"}, {("US", "CHEST"), ("US", "LIVER")}),
        ({}, {"prefilter": "none", "unknown": "include"}, EXISTING),
        ({}, {"prefilter": "none"}, {place for place in EXISTING if place[1] != "UNKNOWN"}),
        ({"modality": "CT", "body_part": "KNEE"}, {}, set()),
    ],
)
def test_plan(query: dict[str, Any], values: dict[str, Any], expected: set[tuple[str, str]]) -> None:
    made = Query("q", np.zeros(1, dtype=np.float32), **query)
    assert plan.plan(made, options(**values), EXISTING) == expected


# --- query lists ---

ID = "0" * 32


def read(tmp_path: Path, text: str | bytes, name: str = "q.csv") -> QueryList:
    path = tmp_path / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_queries(str(path), ObjectStore(config.load(environ={}).storage))


def test_a_list_keeps_every_row_good_or_bad(tmp_path: Path) -> None:
    found = read(
        tmp_path,
        "\ufeffquery_id,uri,image_id,sop_instance_uid,frame,note\r\n"
        f"a,,{ID},,,x\r\n"
        "b,,,1.2.3,7,\r\n"
        'c,"scan, one.dcm",,,,\r\n'
        "\r\n"
        "d,,,,,\r\n"
        f"e,x.dcm,{ID},,,\r\n"
        "f,,ABC,,,\r\n"
        "g,,,1.2.x,,\r\n"
        "h,http://host/x.dcm,,,,\r\n"
        f"i,,{ID},,first,\r\n"
        f",,{ID},,,\r\n"
        f"twice,,{ID},,,\r\n"
        f"twice,,{ID},,,\r\n"
        f"short,,{ID}\r\n"
        f"more,,{ID},,,,x\r\n"
        f"{'long' * 2000},,{ID},,,\r\n"
        f"k,{'x' * 5000},,,,\r\n"
        "l,a\x07b.dcm,,,,\r\n",
    )
    assert found.ignored == ("note",)
    good = [row for row in found.rows if isinstance(row, QueryRow)]
    assert good == [
        QueryRow("a", "image_id", ID, None),
        QueryRow("b", "sop_instance_uid", "1.2.3", 7),
        QueryRow("c", "uri", "scan, one.dcm", None),
        QueryRow("short", "image_id", ID, None),
    ]
    bad = [row for row in found.rows if isinstance(row, Status)]
    assert len(found.rows) == 17
    assert {row.status for row in bad} == {QueryStatus.BAD_ROW}
    reasons = [(row.query_id[:5], row.reason) for row in bad]
    for (name, reason), words in zip(
        reasons,
        [
            ("d", "none of"),
            ("e", "uri and image_id"),
            ("f", "32 hexadecimal"),
            ("g", "not a UID"),
            ("h", "scheme"),
            ("i", "frame is not a number"),
            ("", "no query_id"),
            ("twice", "2 times"),
            ("twice", "2 times"),
            ("more", "7 cells"),
            ("longl", "8000 characters"),
            ("k", "too long"),
            ("l", "control characters"),
        ],
        strict=True,
    ):
        assert name == words[0]
        assert words[1] in (reason or "")


def test_a_parquet_list_may_hold_numbers(tmp_path: Path) -> None:
    path = tmp_path / "q.parquet"
    table = pa.table({"query_id": [1, 2], "image_id": [ID, None], "frame": [3, None], "uri": [None, "a.dcm"]})
    pa.parquet.write_table(table, path)
    found = read_queries(str(path), ObjectStore(config.load(environ={}).storage))
    assert found.rows == (QueryRow("1", "image_id", ID, 3), QueryRow("2", "uri", "a.dcm", None))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"id,path\n1,a.dcm\n", "lacks column query_id and one of uri, image_id, sop_instance_uid; it has id, path"),
        (b"query_id,path\n1,a.dcm\n", "lacks column one of uri.*; it has query_id, path"),
        (b"uri\na.dcm\n", "lacks column query_id; it has uri"),
        (b"", "lacks column query_id.*; it has nothing"),
        (b"query_id,uri,uri\n1,a,b\n", "uri occurs more than once"),
        (b"query_id,uri\n1,\xff\xfe\n", "cannot be read as CSV .in UTF-8."),
        (b"PAR1 but not really", "cannot be read as CSV .in UTF-8. or Parquet"),
    ],
)
def test_a_list_that_cannot_be_used_is_refused_in_one_line(tmp_path: Path, text: bytes, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        read(tmp_path, text)
    assert "\n" not in str(caught.value)


def test_a_list_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        read_queries(str(tmp_path / "none.csv"), ObjectStore(config.load(environ={}).storage))


# --- the job, on real files ---


@pytest.fixture(scope="module")
def archive(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Real DICOM files, ingested and indexed by the small network with fresh weights."""
    folder = tmp_path_factory.mktemp("archive")
    (folder / "dcm").mkdir()
    for name in ("CT_small.dcm", "MR_small.dcm", "examples_palette.dcm"):
        shutil.copy(str(get_testdata_file(name)), folder / "dcm" / name)
    template = pydicom.dcmread(folder / "dcm" / "CT_small.dcm")
    for number in range(3):
        template.SOPInstanceUID = template.file_meta.MediaStorageSOPInstanceUID = UID(f"1.2.3.{number}")
        template.SeriesInstanceUID = UID(f"1.2.4.{number}")
        template.PixelData = np.roll(template.pixel_array, 8 * number + 8).tobytes()
        template.save_as(folder / "dcm" / f"more{number}.dcm")
    (folder / "dcm" / "note.txt").write_text("not an image")
    shutil.copy(folder / "dcm" / "MR_small.dcm", folder / "outside.dcm")
    (folder / "dcm" / "link.dcm").symlink_to(folder / "outside.dcm")
    settings = config.load(
        overrides=[
            f"lake.uri={folder / 'lake'}",
            f"ingest.archive={folder / 'dcm'}",
            f"index.model={folder / 'model'}",
            f"retrieval.model={folder / 'model'}",
            f"retrieval.queries={folder / 'queries.csv'}",
            "retrieval.unknown=include",
            "retrieval.prefilter=none",
            "retrieval.k=3",
        ],
        environ={},
    )
    save_model(folder / "model", preprocessing=parse.preprocessing_of(settings.pixels).version)
    ingest_job.run(spark, settings)
    index_job.run(spark, settings)
    return settings


def with_retrieval(settings: Settings, **values: Any) -> Settings:
    return settings.override({"retrieval": values})


def results(spark: SparkSession, out: str) -> tuple[list[Any], dict[str, Any]]:
    hits = spark.read.parquet(f"{out}/hits")
    statuses = spark.read.parquet(f"{out}/statuses")
    assert hits.schema.names == schemas.RESULTS_HITS.schema.names
    assert statuses.schema.names == schemas.RESULTS_STATUSES.schema.names
    return hits.orderBy(cols.QUERY_ID, cols.RANK).collect(), {row[cols.QUERY_ID]: row for row in statuses.collect()}


def test_a_list_of_files_ids_and_mistakes_is_answered_row_by_row(
    spark: SparkSession, archive: Settings, tmp_path: Path
) -> None:
    dcm = Path(str(archive.ingest.archive))
    uid = str(pydicom.dcmread(dcm / "more1.dcm").SOPInstanceUID)
    names = pseudonyms.load(archive.privacy, LakePaths.of(archive.lake).vault_folder)
    image = names.image(uid)
    lines = [
        "query_id,uri,image_id,sop_instance_uid,frame",
        f"file,{dcm / 'more1.dcm'},,,",
        f"image,,{image},,",
        f"uid,,,{uid},0",
        f"frame,,{image},,4",
        f"stranger,,{ID},,",
        f"outside,{dcm.parent / 'outside.dcm'},,,",
        f"link,{dcm / 'link.dcm'},,,",
        f"dots,{dcm}/../outside.dcm,,,",
        "passwd,file:///etc/passwd,,,",
        f"text,{dcm / 'note.txt'},,,",
        f"gone,{dcm / 'none.dcm'},,,",
        f"folder,{dcm / 'sub'},,,",
        "empty,,,,",
    ]
    (dcm / "sub").mkdir(exist_ok=True)
    queries = tmp_path / "queries.csv"
    queries.write_text("\n".join(lines) + "\n")
    out = tmp_path / "out"
    settings = with_retrieval(archive, queries=str(queries), out=str(out))
    report = retrieval_job.run(spark, settings)
    hits, statuses = results(spark, report.out)

    assert len(statuses) == len(lines) - 1 == report.queries
    assert (report.answered, report.empty, report.failed) == (3, 0, 10)
    expected = {
        "frame": ("not_found", "frame 4 is not indexed"),
        "stranger": ("not_found", "not in the index"),
        "outside": ("bad_row", "neither in the ingested archive"),
        "link": ("bad_row", "neither in the ingested archive"),
        "dots": ("bad_row", "neither in the ingested archive"),
        "passwd": ("bad_row", "neither in the ingested archive"),
        "text": ("unreadable", "NOT_DICOM"),
        "gone": ("not_found", "no such object"),
        "folder": ("not_found", "no such object"),
        "empty": ("bad_row", "none of"),
    }
    for name, (status, reason) in expected.items():
        assert statuses[name][cols.STATUS] == status, statuses[name]
        assert reason in statuses[name][cols.REASON]
        assert statuses[name][cols.PARTITIONS] == []
    # The same image by its file, its id and its UID: the same vector, and so the same hits to the last bit.
    by_query: dict[str, list[tuple[Any, ...]]] = {}
    for hit in hits:
        by_query.setdefault(hit[cols.QUERY_ID], []).append(tuple(hit)[1:])
    assert by_query["file"] == by_query["image"] == by_query["uid"]
    assert len(by_query["file"]) == 3
    assert image not in {hit[2] for hit in by_query["file"]}
    assert report.partitions_searched == report.partitions > 1
    assert report.files_read == report.files and 0 < report.bytes_read < 2 * report.bytes
    assert report.gallery is not None
    assert ObjectStore(archive.storage).kind(report.gallery) == "file"
    runs = delta.read(spark, LakePaths.of(archive.lake).path(schemas.RUNS)).where("job = 'retrieve'").collect()
    assert runs[-1]["counts"]["bad_row"] == 5

    with pytest.raises(InputError, match="is not empty"):
        retrieval_job.run(spark, settings)


def test_a_list_without_rows_has_an_answer_without_rows(spark: SparkSession, archive: Settings, tmp_path: Path) -> None:
    listed = tmp_path / "queries.csv"
    listed.write_text("query_id,image_id\n")
    report = retrieval_job.run(spark, with_retrieval(archive, queries=str(listed), out=str(tmp_path / "out")))
    assert results(spark, report.out) == ([], {})
    assert (report.queries, report.files_read) == (0, 0)


def test_the_index_lies_so_that_vectors_are_read_by_their_place(spark: SparkSession, archive: Settings) -> None:
    index = open_index(spark, archive)
    dimensions = {cols.VECTOR: index.manifest.embedding_dim, cols.PROJECTION: index.manifest.projection_dim}
    base = answers.base_of(index, ObjectStore(archive.storage))
    assert len(base.files) > 1
    for file in base.files:
        for column, dimension in dimensions.items():
            with VectorFile(file, ObjectStore(archive.storage)) as opened:
                one = np.empty((1, dimension), np.float32)
                opened.some_vectors(column, np.array([0]), np.array([0]), one)
                assert opened.read.bytes == 4 * dimension
                assert (one == opened.vectors(column, [0], dimension)[0]).all()


def test_a_list_of_series_is_answered_with_series(spark: SparkSession, archive: Settings, tmp_path: Path) -> None:
    dcm = Path(str(archive.ingest.archive))
    header = pydicom.dcmread(dcm / "more1.dcm")
    names = pseudonyms.load(archive.privacy, LakePaths.of(archive.lake).vault_folder)
    image, uid = names.image(str(header.SOPInstanceUID)), str(header.SeriesInstanceUID)
    series = names.of_kind("series", uid)
    lines = [
        "query_id,series_id,series_instance_uid,image_id,sop_instance_uid,k",
        f"series,{series},,,,",
        f"uid,,{uid},,,",
        f"image,,,{image},,",
        f"sop,,,,{header.SOPInstanceUID},",
        f"two,{series},,,,2",
        f"stranger,{ID},,,,",
        f"strange image,,,{ID},,",
        "no pseudonym,CT,,,,",
        f"both,{series},,{image},,",
    ]
    listed = tmp_path / "queries.csv"
    listed.write_text("\n".join(lines) + "\n")
    settings = with_retrieval(archive, queries=str(listed), out=str(tmp_path / "out"), level="series")
    report = retrieval_job.run(spark, settings)
    hits, statuses = results(spark, report.out)
    assert (report.answered, report.empty, report.failed) == (5, 0, 4)
    reasons = {
        name: (row[cols.STATUS], row[cols.REASON]) for name, row in statuses.items() if row[cols.STATUS] != "answered"
    }
    assert {name: status for name, (status, _) in reasons.items()} == {
        "stranger": "not_found",
        "strange image": "not_found",
        "no pseudonym": "bad_row",
        "both": "bad_row",
    }
    assert "the series is not in the index" in reasons["stranger"][1]
    assert "the image is not in the index" in reasons["strange image"][1]
    assert "series_id is not 32 hexadecimal digits" in reasons["no pseudonym"][1]
    by_query: dict[str, list[tuple[Any, ...]]] = {}
    for hit in hits:
        by_query.setdefault(hit[cols.QUERY_ID], []).append(tuple(hit)[1:])
    assert by_query["series"] == by_query["uid"] == by_query["image"] == by_query["sop"]
    assert by_query["two"] == by_query["series"][:2]
    found = [hit[cols.SERIES_ID] for hit in hits if hit[cols.QUERY_ID] == "series"]
    assert len(set(found)) == len(found) == 3 and series not in found
    assert report.gallery is not None and report.files_read == report.files
    (what,) = spark.read.parquet(f"{report.out}/queries").where("query_id = 'uid'").collect()
    assert (what[cols.IMAGE_ID], what[cols.SERIES_ID]) == (image, series)


def test_a_list_of_series_cannot_name_files(archive: Settings, tmp_path: Path) -> None:
    listed = tmp_path / "queries.csv"
    listed.write_text("query_id,uri\nq,a.dcm\n")
    with pytest.raises(InputError, match="lacks column one of series_id, series_instance_uid, image_id"):
        read_queries(str(listed), ObjectStore(archive.storage), "series")


def test_a_file_that_ingest_has_read_may_be_asked_about_without_naming_its_archive(
    spark: SparkSession, archive: Settings, tmp_path: Path
) -> None:
    dcm = Path(str(archive.ingest.archive))
    listed = tmp_path / "queries.csv"
    listed.write_text(f"query_id,uri\nknown,{dcm / 'more1.dcm'}\nlink,{dcm / 'link.dcm'}\nnew,{dcm / 'none.dcm'}\n")
    settings = with_retrieval(archive, queries=str(listed), out=str(tmp_path / "out"))
    nameless = settings.override({"ingest.archive": None})
    _, statuses = results(spark, retrieval_job.run(spark, nameless).out)
    found = {name: row[cols.STATUS] for name, row in statuses.items()}
    assert found == {"known": "answered", "link": "bad_row", "new": "bad_row"}


def test_files_are_refused_where_the_settings_make_other_pixels(
    spark: SparkSession, archive: Settings, tmp_path: Path
) -> None:
    queries = tmp_path / "q.csv"
    queries.write_text(f"query_id,uri\na,{archive.ingest.archive}/MR_small.dcm\n")
    stretched = with_retrieval(archive, queries=str(queries), out=str(tmp_path / "out")).override(
        {"pixels.aspect": "stretch"}
    )
    with pytest.raises(ModelError, match=r"px\d+-stretch.*px\d+-keep"):
        retrieval_job.run(spark, stretched)
    assert not (tmp_path / "out").exists()


def test_without_a_list_or_an_index_the_error_says_so(
    spark: SparkSession, make_settings: MakeSettings, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="--queries FILE"):
        retrieval_job.run(spark, make_settings())
    queries = tmp_path / "q.csv"
    queries.write_text(f"query_id,image_id\na,{ID}\n")
    with pytest.raises(ModelError, match="run `cbmir train`"):
        retrieval_job.run(spark, make_settings(f"retrieval.queries={queries}"))


# --- lists that somebody means harm with ---


class Asked(http.server.BaseHTTPRequestHandler):
    """A web server that counts who comes."""

    paths: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.paths.append(self.path)
        self.send_error(404)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def web() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Asked)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def paths_that_lead_out(dcm: Path, forbidden: Path, web: str) -> list[str]:
    """Sixty ways to name what no query may open; `forbidden` is a pipe that nobody writes to, beside the archive."""
    out, name = str(forbidden), forbidden.name
    links = {
        "to_file": forbidden,
        "to_folder": forbidden.parent,
        "to_passwd": Path("/etc/passwd"),
        "to_root": Path("/"),
        "to_itself": dcm / "to_itself",
    }
    for link, target in links.items():
        if not (dcm / link).is_symlink():
            (dcm / link).symlink_to(target)
    (dcm / "to_link").unlink(missing_ok=True)
    (dcm / "to_link").symlink_to(dcm / "to_file")
    sibling = dcm.parent / f"{dcm.name}-other"
    sibling.mkdir(exist_ok=True)
    if not (sibling / name).exists():
        os.mkfifo(sibling / name)
    return [
        out,
        f"file:{out}",
        f"file://{out}",
        f"file:///{out}",
        f"file:////{out}",
        f"file://localhost{out}",
        *(
            f"{dcm}/../{name}",
            f"{dcm}/./../{name}",
            f"{dcm}/x/../../{name}",
            f"{dcm}//..//{name}",
            f"{dcm}/..//./{name}",
        ),
        *(
            f"file://{dcm}/../{name}",
            f"{dcm}/%2e%2e/{name}",
            f"{dcm}/..%2f{name}",
            f"{dcm}/..\\{name}",
            f"{dcm}\\..\\{name}",
        ),
        f"{dcm}/\u2025/{name}",
        f"{dcm}/\uff0e\uff0e/{name}",
        f"{dcm}/..;/{name}",
        f"{dcm}/.../{name}",
        f"../{name}",
        *(
            f"{dcm}/to_file",
            f"{dcm}/to_folder/{name}",
            f"{dcm}/to_link",
            f"{dcm}/to_passwd",
            f"{dcm}/to_root/etc/passwd",
        ),
        f"{dcm}/to_itself",
        f"{sibling}/{name}",
        f"{dcm}-other/./{name}",
        f"{dcm}/more1.dcm/../../{name}",
        f"{dcm}/ /../../{name}",
        f"file:{dcm}/to_folder/./{name}",
        f"{dcm.parent}/*.dcm",
        f"{dcm}/[a-z]*",
        "/etc/passwd",
        "file:///etc/passwd",
        "/proc/self/environ",
        "/proc/self/fd/0",
        "/dev/zero",
        "/dev/stdin",
        "~/.aws/credentials",
        "~root/.ssh/id_rsa",
        "$HOME/.bashrc",
        "/etc/passwd\x00.dcm",
        "/etc/passwd\n",
        "`id`",
        f"http://{web}/a.dcm",
        f"https://{web}/a.dcm",
        f"ftp://{web}/a.dcm",
        f"//{web}/a.dcm",
        f"\\\\{web}\\a.dcm",
        "s3a://other-bucket/a.dcm",
        "s3://other-bucket/a.dcm",
        "s3n://b/../a.dcm",
        "gs://b/a.dcm",
        "hdfs://h/a.dcm",
        *(
            f"jar:file:{out}!/a",
            "javascript:alert(1)",
            "data:application/dicom;base64,AAAA",
            "${jndi:ldap://127.0.0.1/a}",
        ),
        "x" * 10_000,
        "/" + "a/" * 3000,
    ]


@pytest.mark.timeout(120)
def test_sixty_paths_that_lead_out_are_answered_and_nothing_there_is_opened(
    spark: SparkSession, archive: Settings, tmp_path: Path, web: str
) -> None:
    dcm = Path(str(archive.ingest.archive))
    # Whoever opens a pipe that nobody writes to waits until the test has run out of time.
    forbidden = dcm.parent / "forbidden.dcm"
    if not forbidden.exists():
        os.mkfifo(forbidden)
    payloads = paths_that_lead_out(dcm, forbidden, web)
    assert len(set(payloads)) == len(payloads) >= 60
    rows = {"query_id": [f"p{n}" for n in range(len(payloads))] + ["good"], "uri": [*payloads, f"{dcm}/more1.dcm"]}
    queries = tmp_path / "q.parquet"
    pyarrow.parquet.write_table(pa.table(rows), queries)
    report = retrieval_job.run(spark, with_retrieval(archive, queries=str(queries), out=str(tmp_path / "out")))
    _, statuses = results(spark, report.out)
    assert len(statuses) == len(payloads) + 1 and statuses.pop("good")[cols.STATUS] == "answered"
    found = Counter(row[cols.STATUS] for row in statuses.values())
    # What stays below the archive and is not there has not been found; everything else is refused unopened.
    opened = {payloads[int(name[1:])]: row for name, row in statuses.items() if row[cols.STATUS] == "unreadable"}
    # A link to itself cannot be followed anywhere.
    assert set(opened) == {f"{dcm}/to_itself"}
    assert set(found) <= {"bad_row", "not_found", "unreadable"} and found["bad_row"] >= 45, found
    for name, row in statuses.items():
        if row[cols.STATUS] == "not_found":
            assert payloads[int(name[1:])].removeprefix("file:").lstrip("/").startswith(str(dcm).lstrip("/")), name
        assert "root:" not in row[cols.REASON]
    assert Asked.paths == []


FORMULAS = [
    "=1+1",
    "+1+1",
    "-1+1",
    "@SUM(1)",
    "\t=1+1",
    "\r=1+1",
    "\n=1+1",
    " =1+1",
    "\u00a0=1+1",
    "\u200b=1+1",
    *(
        "=cmd|' /C calc'!A0",
        '=HYPERLINK("http://x","y")',
        "=IMPORTXML(A1)",
        "+cmd|' /C calc'!A0",
        "\uff1d1+1",
        "\uff0b1",
    ),
    "\uff0d1",
    "\uff20A1",
    "|calc",
    "%0A=1",
    ";=1+1",
    ',"=1+1"',
    '"=1+1',
    "\ufeff=1+1",
    "\x00=1+1",
]
MARKUP = [
    *(
        "<script>{}</script>",
        '"><script>{}</script>',
        "'><script>{}</script>",
        "<img src=x onerror={}>",
        "<svg onload={}>",
    ),
    "</title><script>{}</script>",
    "</style><script>{}</script>",
    "<iframe src='javascript:{}'>",
    "<body onload={}>",
    *(
        "<a href='javascript:{}'>x</a>",
        "<details open ontoggle={}>",
        "<math><mi xlink:href='javascript:{}'>",
        "<!--{}-->",
    ),
    *(
        "<input autofocus onfocus={}>",
        "<video><source onerror={}>",
        "\u202e<script>{}</script>",
        "&lt;script&gt;{}",
        "{{{{7*7}}}}{}",
    ),
    *(
        "<object data='javascript:{}'>",
        "<embed src='javascript:{}'>",
        "<meta http-equiv=refresh content='0;javascript:{}'>",
    ),
]
OTHERS = [
    "\u202eabc",
    "\u2066abc\u2069",
    "a\u200bb",
    "\x1b[31mred\x1b[0m",
    "\x07bell",
    "a\x00b",
    "a\nb",
    "a\r\nb",
    "a\tb",
    *(
        "../../etc/passwd",
        "%s%n",
        "${jndi:ldap://127.0.0.1/a}",
        "'; DROP TABLE hits; --",
        "\U0001f480" * 50,
        "NULL",
        "\ud7ff",
    ),
]


def test_sixty_texts_are_shown_and_run_nowhere(
    spark: SparkSession, archive: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [*FORMULAS, *(payload.format(RUN) for payload in MARKUP), *OTHERS]
    assert len(set(names)) == len(names) >= 60
    image = open_index(spark, archive).rows.first()
    assert image is not None
    # Each text names a query that is answered, is the reason of a bad row, and stands where an identifier should.
    rows = {
        "query_id": [*names, *(f"id {n}" for n in range(len(names))), *(f"part {n}" for n in range(len(names))), "big"],
        "image_id": [
            *[image[cols.IMAGE_ID]] * len(names),
            *names,
            *[image[cols.IMAGE_ID]] * len(names),
            "x" * 10_000_000,
        ],
        "body_part": [*[None] * 2 * len(names), *names, None],
    }
    queries = tmp_path / "q.parquet"
    pyarrow.parquet.write_table(pa.table(rows), queries)
    settings = with_retrieval(archive, queries=str(queries), out=str(tmp_path / "out"), gallery=1000, csv=True)
    told = retrieval_job.run(spark, settings)
    hits, statuses = results(spark, told.out)
    assert {hit[cols.QUERY_ID] for hit in hits} == set(names)
    found = Counter(row[cols.STATUS] for row in statuses.values())
    assert found == {"answered": len(names), "bad_row": 2 * len(names) + 1}
    assert max(len(row[cols.REASON] or "") for row in statuses.values()) < 1000

    for name in ("hits", "statuses"):
        text = (tmp_path / "out" / "csv" / f"{name}-00000.csv").read_text("utf-8")
        for cells in csv.reader(io.StringIO(text, newline="")):
            for cell in cells:
                assert not cell.strip().startswith(("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")), cell
                assert not set(cell) & {chr(code) for code in range(32)}, cell
    views.report("Answered", told)
    assert "\x1b[31m" not in capsys.readouterr().out
    page = Path(storage.local_path(str(told.gallery))).read_text("utf-8")
    assert "<script" not in page
    dom = dom_in_browser(page, tmp_path)
    assert "Retrieved images" in dom and "data-ran" not in dom.partition("<body")[0]
