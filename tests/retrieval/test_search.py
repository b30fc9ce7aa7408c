"""The search against a brute force that shares no line with it, whatever it is asked and however the work is cut."""

import itertools
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from py4j.protocol import Py4JJavaError
from pyspark.sql import SparkSession
from pyspark.sql.pandas.types import to_arrow_schema

from cbmir_spark import config, storage
from cbmir_spark.config import RetrievalSettings, StorageSettings
from cbmir_spark.errors import InputError, ModelError
from cbmir_spark.index.layout import FEATURES
from cbmir_spark.index.vector_files import DataFile
from cbmir_spark.lake import columns as cols
from cbmir_spark.lake import schemas
from cbmir_spark.models.projection import Projection
from cbmir_spark.retrieval import answer as answers
from cbmir_spark.retrieval import search
from cbmir_spark.retrieval.query import HitFilter, Query, QueryOverrides, QueryStatus
from cbmir_spark.storage import ObjectStore
from tests.support.fault_proxy import FaultProxy
from tests.support.s3_server import S3Server
from tests.support.tiny_lake import pseudonym

pytestmark = pytest.mark.slow

Floats = NDArray[np.float32]
Hit = tuple[str, int, float, str, int]

PLACES = [("CT", "CHEST"), ("CT", "HEAD"), ("CT", "UNKNOWN"), ("MR", "BRAIN"), ("MR", "UNKNOWN"), ("US", "LIVER")]
DIMENSION = 24
LOCAL = StorageSettings(endpoint=None, region="us-east-1", path_style=True, attempts=8)

# The index's way of writing, what Arrow does by itself, and several pages to a row group.
WRITERS: list[dict[str, Any]] = [
    {"compression": "none", "use_dictionary": False, "data_page_size": 2**30},
    {"compression": "snappy"},
    {"compression": "none", "use_dictionary": False, "data_page_size": 2**10, "write_batch_size": 4},
]


def options(**values: Any) -> RetrievalSettings:
    return config.load(environ={}).retrieval.replace(**values)


# --- a made-up index ---


@dataclass(frozen=True)
class Made:
    """Rows of FEATURES by column, and their vectors."""

    columns: dict[str, list[Any]]
    vectors: Floats

    @property
    def projection(self) -> Projection:
        return Projection.fit([self.vectors], 4)

    def store(self, folder: Path, cut: int = 1, seed: int = 0, rows_per_group: int = 20) -> answers.Base:
        """As the index writes it, but in any order: at most `cut` files in each partition, of small row groups.

        Some files are as other tools leave them when they rewrite a table.
        """
        random = np.random.default_rng(seed)
        projection = self.projection
        coordinates, residuals = projection.apply(self.vectors)
        schema = to_arrow_schema(FEATURES.schema)
        columns = self.columns | {
            cols.VECTOR: list(self.vectors),
            cols.PROJECTION: list(coordinates),
            cols.RESIDUAL_NORM: residuals,
        }
        table = pa.table([pa.array(columns[name], schema.field(name).type) for name in schema.names], schema.names)
        place = list(zip(self.columns[cols.MODALITY], self.columns[cols.BODY_PART], strict=True))
        files = []
        for wanted in sorted(set(place)):
            rows = random.permutation([row for row, each in enumerate(place) if each == wanted])
            target = folder / f"modality={wanted[0]}" / f"body_part={wanted[1]}"
            target.mkdir(parents=True)
            for number, part in enumerate(np.array_split(rows, min(cut, len(rows)))):
                file = target / f"{number}.parquet"
                inside = table.drop_columns([cols.MODALITY, cols.BODY_PART]).take(part)
                pq.write_table(inside, file, row_group_size=rows_per_group, **WRITERS[(number + seed) % len(WRITERS)])
                files.append((storage.canonical(str(file)), wanted, file.stat().st_size))
        listed = [DataFile(number, *each) for number, each in enumerate(files)]
        return answers.Base(tuple(listed), self.vectors.shape[1], projection, ObjectStore(LOCAL))


def make(vectors: Floats, seed: int) -> Made:
    """Two frames to an image, ten to a series, twenty to a study, forty to a patient; some facts are missing."""
    random = np.random.default_rng(seed)
    columns: dict[str, list[Any]] = {name: [] for name in FEATURES.schema.names}
    for number in range(len(vectors)):
        modality, body_part = PLACES[random.integers(len(PLACES))]
        image = number // 2
        source = (
            cols.FROM_NOTHING
            if body_part == "UNKNOWN"
            else (cols.FROM_TAG, cols.FROM_PREDICTION)[int(random.integers(2))]
        )
        values = {
            cols.IMAGE_ID: pseudonym(f"i{image}"),
            cols.FRAME: number % 2,
            cols.PREDICTED: f"{modality}/CHEST",
            cols.PROBABILITY: 0.5,
            cols.BODY_PART_SOURCE: source,
            cols.SERIES_ID: pseudonym(f"s{image // 5}"),
            cols.STUDY_ID: pseudonym(f"st{image // 10}"),
            cols.PATIENT_ID: pseudonym(f"p{image // 20}"),
            cols.SEX: ("F", "M", "O", None)[int(random.integers(4))],
            cols.AGE_YEARS: None if random.random() < 0.2 else float(random.integers(0, 90)),
            cols.YEAR: None if random.random() < 0.2 else int(random.integers(2000, 2026)),
            cols.PIXELS_BATCH: 1,
            cols.PIXEL_DIGEST: "d",
            cols.MODALITY: modality,
            cols.BODY_PART: body_part,
        }
        for name, value in values.items():
            columns[name].append(value)
    return Made(columns, vectors)


def ask(made: Made, vectors: Floats, seed: int) -> list[Query]:
    """Queries that are now images of the index, now strangers, tagged and untagged, sure and unsure of their class."""
    random = np.random.default_rng(seed)
    queries = []
    for number, vector in enumerate(vectors):
        row = int(random.integers(len(made.vectors)))
        ids = (cols.IMAGE_ID, cols.SERIES_ID, cols.STUDY_ID, cols.PATIENT_ID)
        queries.append(
            Query(
                query_id=f"q{number:05d}",
                vector=vector,
                modality=("CT", "MR", "US", "XA", "UNKNOWN")[number % 5],
                body_part=("CHEST", "HEAD", "BRAIN", "LIVER", "UNKNOWN", "KNEE")[int(random.integers(6))],
                predicted=("CT/CHEST", "MR/BRAIN", "CT/HEAD", "UNKNOWN")[int(random.integers(4))],
                probability=float(random.random()),
                **{name: None if number % 3 == 0 else made.columns[name][row] for name in ids},
            )
        )
    return queries


def with_wishes(queries: Iterable[Query], seed: int) -> list[Query]:
    """The same queries, half of them asking for something of their own."""
    random = np.random.default_rng(seed)

    def maybe(share: float, *values: Any) -> Any:
        return values[int(random.integers(len(values)))] if random.random() < share else None

    wishing = []
    for query in queries:
        if random.random() < 0.5:
            wishing.append(query)
            continue
        youngest, first = maybe(0.2, 10.0, 40.5, 89.0), maybe(0.2, 2001, 2015)
        within = HitFilter(
            sex=maybe(0.3, "F", "M", "O"),
            age_min=youngest,
            age_max=None if youngest is None else youngest + float(maybe(1.0, 0, 20)),
            year_min=first,
            year_max=maybe(0.2, 2016, 2025),
        )
        own = QueryOverrides(
            k=maybe(0.7, 1, 2, 7, 50, 200),
            modality=maybe(0.2, "CT", "MR", "XA"),
            body_part=maybe(0.2, "CHEST", "BRAIN", "UNKNOWN", "KNEE"),
            exclude_same=maybe(0.3, "none", "image", "series", "study", "patient"),
            unique=maybe(0.3, "none", "series", "study", "patient"),
            hit_filter=within,
        )
        wishing.append(replace(query, overrides=own))
    return wishing


# --- the oracle ---


def oracle(made: Made, queries: Iterable[Query], chosen: RetrievalSettings) -> tuple[list[list[Hit]], list[int]]:
    """The hits of each query and how many rows it was compared with: row by row, sums correctly rounded."""
    columns = made.columns
    wide = made.vectors.astype(np.float64)
    hits, candidates = [], []
    for query in queries:
        own = query.overrides
        modality, body_part = sought(query, chosen)
        asked = query.vector.astype(np.float64)
        ranked = []
        for row, vector in enumerate(wide):
            row_modality, row_part = columns[cols.MODALITY][row], columns[cols.BODY_PART][row]
            if modality is not None and row_modality != modality:
                continue
            if row_part == "UNKNOWN" and body_part != "UNKNOWN" and chosen.unknown == "exclude":
                continue
            if row_part != "UNKNOWN" and body_part is not None and row_part != body_part:
                continue
            if chosen.imputed == "exclude" and columns[cols.BODY_PART_SOURCE][row] == cols.FROM_PREDICTION:
                continue
            if own.hit_filter.sex is not None and columns[cols.SEX][row] != own.hit_filter.sex:
                continue
            if outside(columns[cols.AGE_YEARS][row], own.hit_filter.age_min, own.hit_filter.age_max):
                continue
            if outside(columns[cols.YEAR][row], own.hit_filter.year_min, own.hit_filter.year_max):
                continue
            excluded = own.exclude_same or chosen.exclude_same
            if excluded != "none" and getattr(query, f"{excluded}_id") == columns[f"{excluded}_id"][row]:
                continue
            unique = own.unique or chosen.unique
            group = row if unique == "none" else columns[f"{unique}_id"][row]
            ranked.append((row, group, vector))
        candidates.append(len(ranked))
        told = [
            (distance(asked, vector, chosen.metric), columns[cols.IMAGE_ID][row], columns[cols.FRAME][row], group)
            for row, group, vector in ranked
        ]
        seen: set[Any] = set()
        found: list[Hit] = []
        for far, image, frame, group in sorted(told):
            if group not in seen and len(seen) < (own.k or chosen.k):
                seen.add(group)
                found.append((query.query_id, len(seen), far, image, frame))
        hits.append(found)
    return hits, candidates


def sought(query: Query, chosen: RetrievalSettings) -> tuple[str | None, str | None]:
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
    return query.overrides.modality or modality, query.overrides.body_part or body_part


def outside(value: float | None, least: float | None, most: float | None) -> bool:
    if least is None and most is None:
        return False
    return value is None or (least is not None and value < least) or (most is not None and value > most)


def distance(one: NDArray[np.float64], other: NDArray[np.float64], metric: str) -> float:
    if metric == "euclidean":
        return math.sqrt(math.fsum((one - other) ** 2))
    lengths = math.sqrt(math.fsum(one**2)), math.sqrt(math.fsum(other**2))
    return math.fsum((one / (lengths[0] or 1.0) - other / (lengths[1] or 1.0)) ** 2) / 2


def collected(answer: answers.Answer) -> list[Hit]:
    names = (cols.QUERY_ID, cols.RANK, cols.DISTANCE, cols.IMAGE_ID, cols.FRAME)
    return list(zip(*(answer.hits.column(name).to_pylist() for name in names), strict=True))


def assert_same(made: Made, queries: Sequence[Query], chosen: RetrievalSettings, found: list[Hit]) -> None:
    """Images and order as brute force has them, but where distances agree to 1e-12."""
    # Components of length-one vectors have an error of their own, which is not relative to a small difference.
    least = 1e-22 if chosen.metric == "cosine" else 0.0
    expected, _ = oracle(made, queries, chosen)
    by_query: dict[str, list[Hit]] = {query.query_id: [] for query in queries}
    for hit in found:
        by_query[hit[0]].append(hit)
    row_of = {
        key: row for row, key in enumerate(zip(made.columns[cols.IMAGE_ID], made.columns[cols.FRAME], strict=True))
    }
    for query, wanted in zip(queries, expected, strict=True):
        told = by_query[query.query_id]
        assert [hit[1] for hit in told] == [hit[1] for hit in wanted], query
        for one, other in zip(told, wanted, strict=True):
            assert math.isclose(one[2], other[2], rel_tol=1e-12, abs_tol=least), (one, other)
            if one[3:] != other[3:]:
                vector = made.vectors[row_of[one[3:]]].astype(np.float64)
                far = distance(query.vector.astype(np.float64), vector, chosen.metric)
                assert math.isclose(far, other[2], rel_tol=1e-12, abs_tol=least), (one, other)


def test_the_oracle_on_a_case_worked_by_hand() -> None:
    # From (0, 0): a at 5, b at 5, c at 13, d at 1; a and d of one series.
    vectors = np.array([[3, 4], [4, 3], [5, 12], [0, 1]], dtype=np.float32)
    made = make(vectors, 1)
    columns = made.columns
    columns[cols.IMAGE_ID], columns[cols.FRAME] = ["b", "a", "c", "d"], [0, 0, 0, 0]
    columns[cols.SERIES_ID] = ["s", "u", "v", "s"]
    columns[cols.MODALITY], columns[cols.BODY_PART] = ["CT"] * 4, ["CHEST", "CHEST", "CHEST", "UNKNOWN"]
    columns[cols.AGE_YEARS] = [30.0, None, 50.0, 40.0]
    query = Query("q", np.zeros(2, np.float32), "CT", "CHEST", image_id="c")
    assert oracle(made, [query], options(unique="none", k=5)) == (
        [[("q", 1, 5.0, "a", 0), ("q", 2, 5.0, "b", 0)]],
        [2],
    )
    wide = options(unique="series", exclude_same="none", unknown="include", k=2)
    assert oracle(made, [query], wide)[0] == [[("q", 1, 1.0, "d", 0), ("q", 2, 5.0, "a", 0)]]
    own = QueryOverrides(hit_filter=HitFilter(age_min=30.0, age_max=40.0), exclude_same="none", unique="none")
    assert oracle(made, [replace(query, overrides=own)], options(unknown="include"))[0] == [
        [("q", 1, 1.0, "d", 0), ("q", 2, 5.0, "b", 0)]
    ]
    assert distance(np.array([3.0, 0.0]), np.array([0.0, 9.0]), "cosine") == pytest.approx(1.0)


# --- the tests ---


@pytest.fixture(scope="module")
def whole_numbers() -> tuple[Made, list[Query]]:
    """Vectors of small whole numbers: ties everywhere, and distances exact in any order of sums."""
    random = np.random.default_rng(7)
    made = make(random.integers(0, 2, (1000, DIMENSION)).astype(np.float32), 1)
    return made, ask(made, random.integers(0, 2, (200, DIMENSION)).astype(np.float32), 2)


@pytest.mark.parametrize("method", ["bounds", "scan"])
def test_queries_are_byte_for_byte_brute_force_however_the_work_is_cut(
    spark: SparkSession, whole_numbers: tuple[Made, list[Query]], tmp_path: Path, method: str
) -> None:
    made, queries = whole_numbers
    chosen = options(k=5, tasks_per_core=25, block_mb=1, method=method)
    expected, candidates = oracle(made, queries, chosen)
    for cut in (1, 2, 7, 40):
        answer = search.search(spark, made.store(tmp_path / str(cut), cut, seed=cut), queries, chosen)
        assert [status.candidates for status in answer.statuses] == candidates
        assert collected(answer) == list(itertools.chain(*expected))
    assert [status.query_id for status in answer.statuses] == [query.query_id for query in queries]
    for status, count in zip(answer.statuses, candidates, strict=True):
        assert (status.status == QueryStatus.ANSWERED) == (count > 0) == (status.hits > 0)
    assert {status.status for status in answer.statuses} == {QueryStatus.ANSWERED, QueryStatus.NO_CANDIDATES}


MODES: list[dict[str, Any]] = [
    {"prefilter": "none", "unique": "none", "k": 20, "unknown": "include", "exclude_same": "none"},
    {"prefilter": "predicted", "unique": "study", "imputed": "exclude", "exclude_same": "patient"},
    {"prefilter": "modality", "unique": "patient", "k": 500, "unknown": "include", "exclude_same": "series"},
    {"prefilter": "tags", "unique": "series", "unknown": "include", "imputed": "exclude", "exclude_same": "study"},
    {"prefilter": "none", "unique": "series", "metric": "cosine"},
]


def mixed(seed: int, rows: int, asked: int) -> tuple[Made, list[Query]]:
    """Features as they are and at their worst: clusters of low rank, exact and near duplicates, blank slices."""
    random = np.random.default_rng(seed)
    clusters = random.standard_normal((12, 3)) @ random.standard_normal((3, DIMENSION)) * 8
    made = clusters[random.integers(0, 12, rows + asked)] + random.standard_normal((rows + asked, DIMENSION)) * 0.2
    kind = random.integers(0, 8, len(made))
    made[kind == 0] = 40.0
    near = clusters[0] * 30 + random.standard_normal((len(made), DIMENSION)) * 1e-5
    made[kind == 1] = near[kind == 1]
    made[kind == 2] = random.integers(0, 3, (int((kind == 2).sum()), DIMENSION))
    vectors = made.astype(np.float32)
    base = make(vectors[:rows], seed)
    return base, with_wishes(ask(base, vectors[rows:], seed + 1), seed + 2)


@pytest.mark.parametrize("values", MODES)
@pytest.mark.parametrize("method", ["bounds", "scan"])
def test_every_mode_and_every_wish_is_brute_force(
    spark: SparkSession, tmp_path: Path, values: dict[str, Any], method: str
) -> None:
    made, queries = mixed(3, rows=700, asked=60)
    chosen = options(method=method, **values)
    answer = search.search(spark, made.store(tmp_path, 3), queries, chosen)
    assert_same(made, queries, chosen, collected(answer))
    assert [status.candidates for status in answer.statuses] == oracle(made, queries, chosen)[1]


@pytest.mark.soak
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("cut", [1, 2, 7, 200])
def test_ten_thousand_queries_are_brute_force(spark: SparkSession, tmp_path: Path, cut: int) -> None:
    for number, (values, method) in enumerate(itertools.product(MODES, ("bounds", "scan"))):
        made, queries = mixed(100 + 10 * number, rows=900, asked=1000)
        chosen = options(method=method, tasks_per_core=100 if cut == 200 else 3, **values)
        base = made.store(tmp_path / str(number), cut, seed=cut)
        assert_same(made, queries, chosen, collected(search.search(spark, base, queries, chosen)))


def test_near_duplicates_are_the_same_bytes_for_any_cut_and_method(spark: SparkSession, tmp_path: Path) -> None:
    random = np.random.default_rng(11)
    slices = np.abs(random.standard_normal((30, 512))) * 7
    vectors = (slices.repeat(10, axis=0) + random.standard_normal((300, 512)) * 1e-4).astype(np.float32)
    made = make(vectors, 4)
    queries = ask(made, (slices + random.standard_normal((30, 512)) * 1e-4).astype(np.float32), 5)
    whole = options(k=12, prefilter="none", unknown="include", unique="none", exclude_same="none", tasks_per_core=9)
    found = []
    for cut, method in ((1, "bounds"), (7, "scan"), (17, "bounds")):
        base = made.store(tmp_path / str(cut), cut, seed=cut)
        found.append(collected(search.search(spark, base, queries, whole.replace(method=method))))
    assert found[0] == found[1] == found[2]
    assert_same(made, queries, whole, found[0])


def test_a_bound_that_helps_reads_few_vectors_and_one_that_does_not_reads_all(
    spark: SparkSession, tmp_path: Path
) -> None:
    random = np.random.default_rng(12)
    whole = options(k=3, prefilter="none", unknown="include", unique="none", exclude_same="none")
    low = (random.standard_normal((2000, 3)) @ random.standard_normal((3, DIMENSION)) * 9).astype(np.float32)
    for vectors, useful in ((low, True), (random.standard_normal((2000, DIMENSION)).astype(np.float32), False)):
        made = make(vectors, 1)
        base = made.store(tmp_path / str(useful), 2)
        queries = ask(made, vectors[:4], 1)
        answer = search.search(spark, base, queries, whole)
        everything = search.search(spark, base, queries, whole.replace(method="scan"))
        assert collected(answer) == collected(everything)
        assert everything.scanned.vectors == 2000
        assert answer.scanned.vectors < 400 if useful else answer.scanned.vectors == 2000
        assert everything.scanned.bytes < sum(file.bytes for file in base.files)


def test_tasks_judge_for_themselves_whether_bounds_help(spark: SparkSession, tmp_path: Path) -> None:
    """One partition of which three directions tell nearly everything, and one of noise; two tasks."""
    random = np.random.default_rng(13)
    vectors = random.standard_normal((3000, DIMENSION)).astype(np.float32) * 40
    made = make(vectors, 1)
    low = np.array([place == "BRAIN" for place in made.columns[cols.BODY_PART]])
    vectors[low] = (random.standard_normal((low.sum(), 3)) @ random.standard_normal((3, DIMENSION)) * 400).astype("f4")
    made.columns[cols.MODALITY] = ["MR" if each else "CT" for each in low]
    made.columns[cols.BODY_PART] = ["BRAIN" if each else "CHEST" for each in low]
    base = made.store(tmp_path)
    queries = ask(made, np.concatenate([vectors[low][:2], vectors[~low][:2]]), 1)
    whole = options(k=3, prefilter="none", unique="none", exclude_same="none")
    answer = search.search(spark, base, queries, whole)
    assert_same(made, queries, whole, collected(answer))
    assert {status.candidates for status in answer.statuses} == {3000}
    assert (~low).sum() < answer.scanned.vectors < (~low).sum() + 0.5 * low.sum()


def test_only_the_files_of_the_named_partitions_are_opened(spark: SparkSession, tmp_path: Path) -> None:
    made = make(np.random.default_rng(1).random((240, DIMENSION), dtype=np.float32), 1)
    base = made.store(tmp_path, 3)
    vector = np.full(DIMENSION, 0.5, dtype=np.float32)
    queries = [Query("a", vector, "CT", "CHEST"), Query("b", vector, "MR", "BRAIN"), Query("c", vector, "CT", "CHEST")]
    named = (("CT", "CHEST"), ("MR", "BRAIN"))
    # What the plan does not name is not even there.
    for file in base.files:
        if file.place not in named:
            Path(storage.local_path(file.uri)).unlink()
    for method in ("bounds", "scan"):
        answer = search.search(spark, base, queries, options(method=method))
        assert answer.scanned.files == sum(file.place in named for file in base.files) == 6
        assert answer.partitions == named
        assert base.places == tuple(sorted(PLACES))
        assert answer.statuses[0].partitions == ("CT/CHEST",)
    with pytest.raises(Py4JJavaError, match="No such file"):
        search.search(spark, base, queries, options(prefilter="none"))


def test_partitions_that_do_not_exist_are_not_searched(spark: SparkSession, tmp_path: Path) -> None:
    base = make(np.ones((60, DIMENSION), dtype=np.float32), 1).store(tmp_path)
    vector = np.full(DIMENSION, 0.5, dtype=np.float32)
    queries = [Query("knee", vector, "CT", "KNEE"), Query("xa", vector, "XA")]
    answer = search.search(spark, base, queries, options())
    assert (len(answer.hits), answer.scanned) == (0, answers.Scanned())
    assert [status.status for status in answer.statuses] == [QueryStatus.NO_CANDIDATES] * 2
    assert "CT/KNEE" in (answer.statuses[0].reason or "")
    nothing = search.search(spark, base, [], options())
    assert (nothing.statuses, len(nothing.hits)) == ((), 0)
    assert nothing.hits.schema.names == schemas.RESULTS_HITS.schema.names


def test_queries_that_cannot_be_searched_are_refused(spark: SparkSession, tmp_path: Path) -> None:
    base = make(np.ones((60, DIMENSION), dtype=np.float32), 1).store(tmp_path)
    vector = np.zeros(DIMENSION, dtype=np.float32)
    with pytest.raises(InputError, match="not unique"):
        search.search(spark, base, [Query("a", vector), Query("a", vector)], options())
    with pytest.raises(ModelError, match="8 values, the index has 24"):
        search.search(spark, base, [Query("a", vector[:8])], options(prefilter="none"))
    with pytest.raises(ModelError, match="different shapes"):
        search.search(spark, base, [Query("a", vector), Query("b", vector[:8])], options())


@pytest.mark.parametrize("method", ["bounds", "scan"])
def test_object_storage_sends_what_the_plan_names_and_nothing_else(
    spark: SparkSession, s3: S3Server, tmp_path: Path, method: str
) -> None:
    """In every mode, by the server's own log."""
    bucket = f"search-{method}"
    random = np.random.default_rng(8)
    rows = (random.standard_normal((3000, 3)) @ random.standard_normal((3, 1024)) * 9).astype(np.float32)
    made = make(rows, 8)
    stored = made.store(s3.bucket(bucket), 3, rows_per_group=50)
    root = storage.canonical(str(s3.root))
    files = tuple(replace(file, uri=file.uri.replace(root, "s3a:/")) for file in stored.files)
    vector = rows[5] + np.float32(0.01)
    query = Query("q", vector, "CT", "CHEST", predicted="CT/HEAD", probability=0.9)
    modes: list[tuple[dict[str, Any], set[tuple[str, str]]]] = [
        ({"prefilter": "tags"}, {("CT", "CHEST")}),
        ({"prefilter": "tags", "unknown": "include"}, {("CT", "CHEST"), ("CT", "UNKNOWN")}),
        ({"prefilter": "predicted"}, {("CT", "HEAD")}),
        ({"prefilter": "modality"}, {("CT", "CHEST"), ("CT", "HEAD")}),
        ({"prefilter": "none", "unknown": "include"}, set(PLACES)),
    ]
    for values, places in modes:
        chosen = options(method=method, k=3, **values)
        near = search.search(spark, stored, [query], chosen)
        before = len(s3.read(bucket))
        with FaultProxy(s3.host, s3.port) as proxy:
            far = ObjectStore(StorageSettings(endpoint=proxy.endpoint, region="us-east-1", path_style=True, attempts=3))
            answer = search.search(spark, replace(stored, files=files, store=far), [query], chosen)
        assert answer.hits.equals(near.hits)
        assert replace(answer.scanned, bytes=0) == replace(near.scanned, bytes=0)
        named = {file.uri.removeprefix(f"s3a://{bucket}/"): file.bytes for file in files if file.place in places}
        assert set(s3.read(bucket)[before:]) == set(named) and answer.scanned.files == len(named)
        asked = [re.search(rb"(?i)range: bytes=(\d+)-(\d+)", request.head) for request, _ in proxy.seen]
        sent = sum(int(found[2]) - int(found[1]) + 1 for found in asked if found)
        # Beside the columns that it wants, a task reads a file's footer, as often as it opens the file: the last 64 KB,
        # and all of it where it is longer.
        lengths = [pq.read_metadata(storage.local_path(file.uri)).serialized_size for file in stored.files]
        footers = (2**16 + max(lengths) + 8) * len(named) * (2 if method == "bounds" else 1)
        assert answer.scanned.bytes <= sent <= answer.scanned.bytes * 1.2 + footers
        assert answer.scanned.bytes < (0.6 if method == "bounds" else 1.0) * sum(named.values())
