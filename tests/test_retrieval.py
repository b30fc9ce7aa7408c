"""Retrieval against a brute force that shares no line with it, the plan it executes, and what becomes of bad rows."""

import math
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pydicom
import pytest
from numpy.typing import NDArray
from pydicom.data import get_testdata_file
from pydicom.uid import UID
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from cbmir_spark import config, features, ingest, parse, pseudonyms, retrieval, storage
from cbmir_spark import tables as t
from cbmir_spark.config import RetrievalSettings, Settings
from cbmir_spark.errors import InputError, ModelError
from cbmir_spark.queries import Answered, Query, QueryList, Status, Wanted, read_queries
from tests.conftest import MakeSettings
from tests.test_features import save_model
from tests.tiny_lake import pseudonym

PLACES = [("CT", "CHEST"), ("CT", "HEAD"), ("CT", "UNKNOWN"), ("MR", "BRAIN"), ("MR", "UNKNOWN"), ("US", "LIVER")]
DIMENSION = 24


def options(**values: Any) -> RetrievalSettings:
    return config.load(environ={}).retrieval.model_copy(update=values)


@dataclass(frozen=True)
class Base:
    """A made-up index: FEATURES rows as tuples, and what the oracle needs of them."""

    rows: list[tuple[Any, ...]]
    vectors: NDArray[np.float32]

    def column(self, name: str) -> list[Any]:
        place = t.FEATURES.schema.names.index(name)
        return [row[place] for row in self.rows]

    def frame(self, spark: SparkSession, places: Sequence[int] | None = None) -> DataFrame:
        chosen = self.rows if places is None else [self.rows[place] for place in places]
        return spark.createDataFrame(chosen, t.FEATURES.schema)


def make_base(vectors: NDArray[np.float32], seed: int) -> Base:
    random = np.random.default_rng(seed)
    rows = []
    for number, vector in enumerate(vectors):
        modality, body_part = PLACES[random.integers(len(PLACES))]
        image = number // 2
        source = t.FROM_NOTHING if body_part == "UNKNOWN" else (t.FROM_TAG, t.FROM_PREDICTION)[int(random.integers(2))]
        rows.append(
            (
                *(pseudonym(f"i{image}"), number % 2, vector.tolist(), [0.0], 0.0),
                *(f"{modality}/CHEST", 0.5, source),
                *(pseudonym(f"s{image // 5}"), pseudonym(f"st{image // 10}"), pseudonym(f"p{image // 20}")),
                *("F", 40.0, 2020, 1, "d", modality, body_part),
            )
        )
    return Base(rows, vectors)


def make_queries(base: Base, vectors: NDArray[np.float32], seed: int) -> list[Query]:
    """Queries that are now images of the base, now strangers, tagged and untagged, sure and unsure of their class."""
    random = np.random.default_rng(seed)
    images, series = base.column(t.IMAGE_ID), base.column(t.SERIES_ID)
    studies, patients = base.column(t.STUDY_ID), base.column(t.PATIENT_ID)
    queries = []
    for number, vector in enumerate(vectors):
        row = int(random.integers(len(images)))
        stranger = number % 3 == 0
        queries.append(
            Query(
                query_id=f"q{number:04d}",
                vector=vector,
                modality=("CT", "MR", "US", "XA", "UNKNOWN")[number % 5],
                body_part=("CHEST", "HEAD", "BRAIN", "LIVER", "UNKNOWN", "KNEE")[int(random.integers(6))],
                predicted=("CT/CHEST", "MR/BRAIN", "CT/HEAD", "UNKNOWN")[int(random.integers(4))],
                probability=float(random.random()),
                image_id=None if stranger else images[row],
                series_id=None if stranger else series[row],
                study_id=None if stranger else studies[row],
                patient_id=None if stranger else patients[row],
            )
        )
    return queries


Hit = tuple[str, int, float, str, int]


def oracle(base: Base, queries: Iterable[Query], chosen: RetrievalSettings) -> tuple[list[Hit], dict[str, int]]:
    """All hits as (query_id, rank, distance, image_id, frame), and candidates by query. Row by row, in float64."""
    columns = {name: base.column(name) for name in t.FEATURES.schema.names}
    wide = base.vectors.astype(np.float64)
    hits, candidates = [], {}
    for query in queries:
        modality: str | None = query.modality if query.modality != "UNKNOWN" else None
        body_part: str | None = None
        sure = query.predicted != "UNKNOWN" and query.probability >= chosen.min_probability
        if modality is None and sure:
            modality = query.predicted.split("/")[0]
        if chosen.prefilter == "tags" and query.body_part != "UNKNOWN":
            body_part = query.body_part
        elif chosen.prefilter in ("tags", "predicted") and sure:
            body_part = query.predicted.split("/")[1]
        if chosen.prefilter == "none":
            modality = body_part = None
        ranked = []
        squares = ((wide - query.vector.astype(np.float64)) ** 2).tolist()
        for row, terms in enumerate(squares):
            row_modality, row_part = columns[t.MODALITY][row], columns[t.BODY_PART][row]
            if modality is not None and row_modality != modality:
                continue
            if row_part == "UNKNOWN" and chosen.unknown == "exclude":
                continue
            if row_part != "UNKNOWN" and body_part is not None and row_part != body_part:
                continue
            if chosen.imputed == "exclude" and columns[t.BODY_PART_SOURCE][row] == t.FROM_PREDICTION:
                continue
            same = None if chosen.exclude_same == "none" else f"{chosen.exclude_same}_id"
            if same and getattr(query, same) == columns[same][row]:
                continue
            group = row if chosen.unique == "none" else columns[f"{chosen.unique}_id"][row]
            ranked.append((math.sqrt(math.fsum(terms)), columns[t.IMAGE_ID][row], columns[t.FRAME][row], group))
        candidates[query.query_id] = len(ranked)
        seen: set[Any] = set()
        for distance, image, frame, group in sorted(ranked):
            if group not in seen and len(seen) < chosen.k:
                seen.add(group)
                hits.append((query.query_id, len(seen), distance, image, frame))
    return hits, candidates


def collected(answer: retrieval.Answer) -> list[Hit]:
    rows = answer.hits.orderBy(t.QUERY_ID, t.RANK).collect()
    answer.hits.unpersist()
    return [(r[t.QUERY_ID], r[t.RANK], r[t.DISTANCE], r[t.IMAGE_ID], r[t.FRAME]) for r in rows]


def test_the_oracle_on_a_case_worked_by_hand() -> None:
    vectors = np.zeros((4, DIMENSION), dtype=np.float32)
    vectors[:, 0] = [3, 5, 4, 9]
    vectors[:, 1] = [4, 12, 3, 0]
    rows = []
    for (image, series, place), vector in zip(
        [("b", "s", "CHEST"), ("c", "s", "CHEST"), ("a", "u", "CHEST"), ("d", "v", "HEAD")], vectors, strict=True
    ):
        ids = (series, "st", "p", "F", 40.0, 2020, 1, "d", "CT", place)
        rows.append((image, 0, vector.tolist(), [0.0], 0.0, "CT/CHEST", 0.5, t.FROM_TAG, *ids))
    base = Base(rows, vectors)
    query = Query("q", np.zeros(DIMENSION, dtype=np.float32), "CT", "CHEST")
    # From the origin b and a are at 5 and c at 13; d, at 9, lies in another partition. c shares b's series.
    assert oracle(base, [query], options(k=3)) == ([("q", 1, 5.0, "a", 0), ("q", 2, 5.0, "b", 0)], {"q": 3})
    every = oracle(base, [query], options(k=9, unique="none", prefilter="none"))[0]
    assert [hit[2:4] for hit in every] == [(5.0, "a"), (5.0, "b"), (9.0, "d"), (13.0, "c")]
    without = oracle(base, [replace(query, image_id="a")], options(k=1, exclude_same="image"))
    assert without == ([("q", 1, 5.0, "b", 0)], {"q": 2})


@pytest.fixture(scope="module")
def whole_numbers(spark: SparkSession) -> tuple[Base, list[Query]]:
    """1,000 rows and 500 queries of small whole numbers: ties everywhere, and distances exact in any order of sums."""
    random = np.random.default_rng(7)
    vectors = random.integers(0, 2, (1000, DIMENSION)).astype(np.float32)
    base = make_base(vectors, 1)
    asked = random.integers(0, 2, (500, DIMENSION)).astype(np.float32)
    return base, make_queries(base, asked, 2)


def test_500_queries_are_byte_for_byte_brute_force_however_the_work_is_cut(
    spark: SparkSession, whole_numbers: tuple[Base, list[Query]]
) -> None:
    base, queries = whole_numbers
    chosen = options(k=5, tasks_per_core=25, block_mb=1)
    expected, candidates = oracle(base, queries, chosen)
    order = np.random.default_rng(3)
    before = str(spark.conf.get("spark.sql.shuffle.partitions"))
    try:
        for cut in (1, 7, 50):
            spark.conf.set("spark.sql.shuffle.partitions", str(cut))
            rows = base.frame(spark, order.permutation(len(base.rows)).tolist()).repartition(cut)
            answer = retrieval.search(spark, rows, queries, chosen)
            assert {s.query_id: s.candidates for s in answer.statuses} == candidates
            assert collected(answer) == expected
    finally:
        spark.conf.set("spark.sql.shuffle.partitions", before)
    assert [s.query_id for s in answer.statuses] == [q.query_id for q in queries]
    for status in answer.statuses:
        assert (status.status == Answered.ANSWERED) == (candidates[status.query_id] > 0) == (status.hits > 0)
    assert {s.status for s in answer.statuses} == {Answered.ANSWERED, Answered.NO_CANDIDATES}


@pytest.mark.parametrize(
    "values",
    [
        {"prefilter": "none", "unique": "none", "k": 20, "unknown": "include", "exclude_same": "none"},
        {"prefilter": "predicted", "unique": "study", "imputed": "exclude", "exclude_same": "patient"},
        {"prefilter": "modality", "unique": "patient", "k": 500, "unknown": "include", "exclude_same": "series"},
        {"prefilter": "tags", "unique": "series", "unknown": "include", "imputed": "exclude", "exclude_same": "study"},
    ],
)
def test_every_mode_is_brute_force(
    spark: SparkSession, whole_numbers: tuple[Base, list[Query]], values: dict[str, Any]
) -> None:
    base, queries = whole_numbers
    queries = queries[:60]
    chosen = options(**values)
    expected, candidates = oracle(base, queries, chosen)
    answer = retrieval.search(spark, base.frame(spark).repartition(3), queries, chosen)
    assert collected(answer) == expected
    assert {s.query_id: s.candidates for s in answer.statuses} == candidates


def test_real_numbers_with_near_duplicates_are_the_same_bytes_for_any_cut(spark: SparkSession) -> None:
    random = np.random.default_rng(11)
    slices = np.abs(random.standard_normal((30, 512))) * 7
    vectors = (slices.repeat(10, axis=0) + random.standard_normal((300, 512)) * 1e-4).astype(np.float32)
    base = make_base(vectors, 4)
    queries = make_queries(base, (slices + random.standard_normal((30, 512)) * 1e-4).astype(np.float32), 5)
    chosen = options(k=12, prefilter="none", unknown="include", unique="none", exclude_same="none", tasks_per_core=9)
    expected, _ = oracle(base, queries, chosen)
    found = []
    for cut in (1, 7, 17):
        rows = base.frame(spark, random.permutation(300).tolist()).repartition(cut)
        found.append(collected(retrieval.search(spark, rows, queries, chosen)))
    assert found[0] == found[1] == found[2]
    assert [(h[0], h[1], h[3], h[4]) for h in found[0]] == [(h[0], h[1], h[3], h[4]) for h in expected]
    np.testing.assert_allclose([h[2] for h in found[0]], [h[2] for h in expected], rtol=1e-12)


@pytest.fixture(scope="module")
def table(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A FEATURES table on disk, several files in each of its six partitions."""
    path = storage.canonical(str(tmp_path_factory.mktemp("plan") / "features"))
    random = np.random.default_rng(1)
    base = make_base(random.random((240, DIMENSION), dtype=np.float32), 1)
    t.ensure(spark, t.FEATURES, path)
    t.append(base.frame(spark).repartition(3), t.FEATURES, path)
    return path


def files_of(spark: SparkSession, path: str, places: Iterable[tuple[str, str]]) -> list[str]:
    folders = [f"/modality={modality}/body_part={body_part}/" for modality, body_part in places]
    return [uri for uri in t.live_files(spark, path) if any(folder in uri for folder in folders)]


def bytes_of(uris: Iterable[str]) -> int:
    return sum(Path(storage.local_path(uri)).stat().st_size for uri in uris)


def test_only_the_files_of_the_named_partitions_are_read(spark: SparkSession, table: str) -> None:
    vector = np.full(DIMENSION, 0.5, dtype=np.float32)
    queries = [Query("a", vector, "CT", "CHEST"), Query("b", vector, "MR", "BRAIN"), Query("c", vector, "CT", "CHEST")]
    named = [("CT", "CHEST"), ("MR", "BRAIN")]
    wanted, everything = files_of(spark, table, named), t.live_files(spark, table)
    assert 2 < len(wanted) < len(everything)

    answer = retrieval.search(spark, t.read(spark, table), queries, options())
    assert answer.scanned == retrieval.Scanned(len(wanted), bytes_of(wanted))
    assert answer.partitions == tuple(named)
    assert answer.existing == tuple(sorted(PLACES))
    assert answer.statuses[0].partitions == ("CT/CHEST",)
    plan = answer.hits._jdf.queryExecution().toString()
    answer.hits.unpersist()
    assert "PartitionFilters" in plan

    # The same queries as a join alone: it answers alike and reads everything, so the assertion above can fail.
    keys = spark.createDataFrame(named, "modality string, body_part string")
    joined = t.read(spark, table).join(F.broadcast(keys), on=[t.MODALITY, t.BODY_PART], how="inner")
    counted = joined.agg(F.sum(F.size(t.VECTOR)))
    counted.collect()
    assert retrieval.scanned(counted) == retrieval.Scanned(len(everything), bytes_of(everything))


def test_partitions_that_do_not_exist_are_not_searched(spark: SparkSession, table: str) -> None:
    vector = np.full(DIMENSION, 0.5, dtype=np.float32)
    queries = [Query("knee", vector, "CT", "KNEE"), Query("xa", vector, "XA")]
    answer = retrieval.search(spark, t.read(spark, table), queries, options())
    assert answer.hits.count() == 0
    assert answer.scanned.files == 0
    assert [s.status for s in answer.statuses] == [Answered.NO_CANDIDATES] * 2
    assert "CT/KNEE" in (answer.statuses[0].reason or "")
    nothing = retrieval.search(spark, t.read(spark, table), [], options())
    assert (nothing.statuses, nothing.hits.count()) == ((), 0)


def test_queries_that_cannot_be_searched_are_refused(spark: SparkSession, table: str) -> None:
    vector = np.zeros(DIMENSION, dtype=np.float32)
    rows = t.read(spark, table)
    with pytest.raises(InputError, match="not unique"):
        retrieval.search(spark, rows, [Query("a", vector), Query("a", vector)], options())
    with pytest.raises(ModelError, match="8 values, the index has 24"):
        retrieval.search(spark, rows, [Query("a", vector[:8])], options(prefilter="none"))
    with pytest.raises(ModelError, match="different shapes"):
        retrieval.search(spark, rows, [Query("a", vector), Query("b", vector[:8])], options())


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
    assert retrieval.plan(made, options(**values), EXISTING) == expected


# --- query lists ---

ID = "0" * 32


def read(tmp_path: Path, text: str | bytes, name: str = "q.csv") -> QueryList:
    path = tmp_path / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_queries(str(path), config.load(environ={}).storage)


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
        f"{'long' * 2000},,{ID},,,\r\n"
        f"k,{'x' * 5000},,,,\r\n"
        "l,a\x00b.dcm,,,,\r\n",
    )
    assert found.ignored == ("note",)
    good = [row for row in found.rows if isinstance(row, Wanted)]
    assert good == [
        Wanted("a", "image_id", ID, None),
        Wanted("b", "sop_instance_uid", "1.2.3", 7),
        Wanted("c", "uri", "scan, one.dcm", None),
    ]
    bad = [row for row in found.rows if isinstance(row, Status)]
    assert len(found.rows) == 16
    assert {row.status for row in bad} == {Answered.BAD_ROW}
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
            ("short", "3 cells"),
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
    found = read_queries(str(path), config.load(environ={}).storage)
    assert found.rows == (Wanted("1", "image_id", ID, 3), Wanted("2", "uri", "a.dcm", None))


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
        read_queries(str(tmp_path / "none.csv"), config.load(environ={}).storage)


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
    save_model(folder / "model", preprocessing=parse.preprocessing_of(settings).version)
    ingest.run(spark, settings)
    features.run(spark, settings)
    return settings


def with_retrieval(settings: Settings, **values: Any) -> Settings:
    return settings.model_copy(update={"retrieval": settings.retrieval.model_copy(update=values)})


def results(spark: SparkSession, out: str) -> tuple[list[Any], dict[str, Any]]:
    hits = spark.read.parquet(f"{out}/hits")
    statuses = spark.read.parquet(f"{out}/statuses")
    assert hits.schema.names == t.RESULTS_HITS.schema.names
    assert statuses.schema.names == t.RESULTS_STATUSES.schema.names
    return hits.orderBy(t.QUERY_ID, t.RANK).collect(), {row[t.QUERY_ID]: row for row in statuses.collect()}


def test_a_list_of_files_ids_and_mistakes_is_answered_row_by_row(
    spark: SparkSession, archive: Settings, tmp_path: Path
) -> None:
    dcm = Path(str(archive.ingest.archive))
    uid = str(pydicom.dcmread(dcm / "more1.dcm").SOPInstanceUID)
    names = pseudonyms.of(archive, storage.local_path(t.Lake.of(archive).vault))
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
    report = retrieval.run(spark, settings)
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
        assert statuses[name][t.STATUS] == status, statuses[name]
        assert reason in statuses[name][t.REASON]
        assert statuses[name][t.PARTITIONS] == []
    # The same image by its file, its id and its UID: the same vector, and so the same hits to the last bit.
    by_query: dict[str, list[tuple[Any, ...]]] = {}
    for hit in hits:
        by_query.setdefault(hit[t.QUERY_ID], []).append(tuple(hit)[1:])
    assert by_query["file"] == by_query["image"] == by_query["uid"]
    assert len(by_query["file"]) == 3
    assert image not in {hit[2] for hit in by_query["file"]}
    assert report.partitions_searched == report.partitions > 1
    assert (report.files_read, report.bytes_read) == (report.files, report.bytes)
    assert report.gallery is not None
    assert storage.kind(report.gallery, archive.storage) == "file"
    runs = t.read(spark, t.Lake.of(archive).path(t.RUNS)).where("job = 'retrieve'").collect()
    assert runs[-1]["counts"]["bad_row"] == 5

    with pytest.raises(InputError, match="holds something already"):
        retrieval.run(spark, settings)


def test_a_file_that_ingest_has_read_may_be_asked_about_without_naming_its_archive(
    spark: SparkSession, archive: Settings, tmp_path: Path
) -> None:
    dcm = Path(str(archive.ingest.archive))
    listed = tmp_path / "queries.csv"
    listed.write_text(f"query_id,uri\nknown,{dcm / 'more1.dcm'}\nlink,{dcm / 'link.dcm'}\nnew,{dcm / 'none.dcm'}\n")
    settings = with_retrieval(archive, queries=str(listed), out=str(tmp_path / "out"))
    nameless = settings.model_copy(update={"ingest": settings.ingest.model_copy(update={"archive": None})})
    _, statuses = results(spark, retrieval.run(spark, nameless).out)
    found = {name: row[t.STATUS] for name, row in statuses.items()}
    assert found == {"known": "answered", "link": "bad_row", "new": "bad_row"}


def test_files_are_refused_where_the_settings_make_other_pixels(
    spark: SparkSession, archive: Settings, tmp_path: Path
) -> None:
    queries = tmp_path / "q.csv"
    queries.write_text(f"query_id,uri\na,{archive.ingest.archive}/MR_small.dcm\n")
    stretched = with_retrieval(archive, queries=str(queries), out=str(tmp_path / "out")).model_copy(
        update={"pixels": archive.pixels.model_copy(update={"aspect": "stretch"})}
    )
    with pytest.raises(ModelError, match=r"px\d+-stretch.*px\d+-keep"):
        retrieval.run(spark, stretched)
    assert not (tmp_path / "out").exists()


def test_without_a_list_or_an_index_the_error_says_so(
    spark: SparkSession, make_settings: MakeSettings, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="--queries FILE"):
        retrieval.run(spark, make_settings())
    queries = tmp_path / "q.csv"
    queries.write_text(f"query_id,image_id\na,{ID}\n")
    with pytest.raises(ModelError, match="run `cbmir train`"):
        retrieval.run(spark, make_settings(f"retrieval.queries={queries}"))
