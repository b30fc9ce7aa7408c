"""The Python API from an archive to an answer, over folders and over a real S3 server; and the README's own lines."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyspark.sql import SparkSession

import cbmir_spark
from cbmir_spark import storage
from cbmir_spark.api import Answer, Lake
from cbmir_spark.cli import command
from cbmir_spark.errors import ConfigError, InputError, ModelError
from cbmir_spark.lake import schemas
from cbmir_spark.lake.paths import LakePaths
from cbmir_spark.storage import ObjectStore
from cbmir_spark.synthetic import archive
from tests.conftest import REPO, Cbmir
from tests.support import boundary, s3_server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SMALL = {"dataset.min_images": 4, "training.epochs": 1, "retrieval.gallery": 2, "retrieval.prefilter": "modality"}
HIT_COLUMNS = ("query_id", "rank", "image_id", "frame", "distance")


def write_archive(folder: Path) -> None:
    """Phantoms and the demo's mistakes, without pydicom's files."""
    archive.write_demo_archive(folder, images_per_class=6, seed=1)
    shutil.rmtree(folder / "pydicom")


@dataclass(frozen=True)
class World:
    """A lake that was built through the API, and its archive."""

    lake: Lake
    archive: str
    given: Mapping[str, Any]
    store: ObjectStore

    @property
    def files(self) -> list[str]:
        """Three images of the archive, by URI."""
        rows = self.lake.sources.where("outcome = 'ingested'").sort("uri").limit(3)
        return [row["uri"] for row in rows.collect()]

    def images(self, uris: Sequence[str]) -> list[str]:
        """The image ids of ingested objects."""
        ids = {row["uri"]: row["image_id"] for row in self.lake.sources.select("uri", "image_id").collect()}
        return [ids[uri] for uri in uris]


@pytest.fixture(scope="module", params=["file", pytest.param("s3a", marks=pytest.mark.more)])
def world(
    request: pytest.FixtureRequest, spark: SparkSession, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("api")
    settings: dict[str, Any] = {**SMALL, "privacy.key_file": str(folder / "key")}
    (folder / "key").write_text("a key for the tests of the Python API")
    root = str(folder)
    if request.param == "s3a":
        server: s3_server.S3Server = request.getfixturevalue("s3")
        settings |= {"storage.endpoint": server.endpoint, "mlflow.tracking_uri": f"sqlite:///{folder / 'mlflow.db'}"}
        folder = server.bucket("api")
        root = "s3a://api"
    write_archive(folder / "archive")
    before = dict(spark.conf.getAll)
    lake = cbmir_spark.open(f"{root}/lake", spark=spark, **settings)
    archive_uri = f"{root}/archive"
    ingested = lake.ingest(archive_uri)
    assert ingested.outcomes["ingested"] > 60 and ingested.batches == 1
    trained = lake.train(preset="alexnet-small")
    indexed = lake.index()
    assert indexed.model_id == trained.model_id
    yield World(lake, archive_uri, settings, ObjectStore(lake.settings.storage))
    # The given session runs on, with the settings that it had.
    lake.close()
    # Delta may add settings with a session's first query.
    assert before.items() <= dict(spark.conf.getAll).items()
    assert spark.range(3).count() == 3


def hits(answer: Answer) -> list[tuple[Any, ...]]:
    """Hits without their query's name, which differs by how the query was given."""
    rows = answer.hits.select(*HIT_COLUMNS).collect()
    order = {name: number for number, name in enumerate(sorted({row["query_id"] for row in rows}))}
    return sorted((order[row["query_id"]], *row[1:]) for row in rows)


def test_queries_of_every_kind_have_one_answer(world: World, tmp_path: Path) -> None:
    lake = world.lake
    ids = world.images(world.files)
    by_id = lake.search(ids, k=4)
    assert by_id.report.answered == len(ids) and by_id.report.failed == 0
    expected = hits(by_id)
    assert len(expected) == 4 * len(ids)
    text = "query_id,image_id\n" + "".join(f"{each},{each}\n" for each in ids)
    (tmp_path / "queries.csv").write_text(text)
    table = by_id.queries.toPandas()[["query_id", "image_id"]]
    for queries in (
        tmp_path / "queries.csv",
        str(tmp_path / "queries.csv"),
        table,
        lake.spark.createDataFrame(table),
        [cbmir_spark.Query(each, image_id=each) for each in ids],
    ):
        assert hits(lake.search(queries, k=4)) == expected, type(queries)
    # Each for itself: the order of their names is not that of the ids.
    for image_id in ids:
        alone = hits(lake.search([image_id], k=4))
        (uri,) = [uri for uri in world.files if world.images([uri]) == [image_id]]
        assert hits(lake.search([uri], k=4)) == alone
        # A vector belongs to no image: nothing is excluded, so that the image itself comes first.
        row = lake.features().where(f"image_id = '{image_id}'").select("vector").head()
        assert row is not None
        (nearest,) = hits(lake.search(np.array([row["vector"]]), k=1, prefilter="none"))
        assert nearest[2] == image_id and nearest[4] == 0.0


def test_a_query_overrides_the_search(world: World) -> None:
    (image_id, *_) = world.images(world.files)
    answer = world.lake.search([cbmir_spark.Query("few", image_id=image_id, k=2, unique="patient")], k=9)
    assert [row["rank"] for row in answer.hits.sort("rank").collect()] == [1, 2]
    (status,) = answer.statuses.collect()
    assert status["query_id"] == "few" and status["status"] == "answered"


def test_the_command_writes_the_same_bytes(
    world: World, cbmir: Cbmir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "lake_for", lambda settings: Lake(settings, world.lake.spark))
    queries = tmp_path / "queries.csv"
    queries.write_text("query_id,uri\n" + "".join(f"q{n},{uri}\n" for n, uri in enumerate(world.files)))
    lake, out = world.lake, f"{world.lake.uri}/by"
    roots = [storage.canonical(world.archive)]
    called = lake.search(queries, k=3, csv=True, out=f"{out}-call", roots=roots)
    status, _, err = cbmir(
        "retrieve", "--queries", str(queries), "--k", "3", "--csv", "--out", f"{out}-command",
        *(f"--set={name}={value}" for name, value in world.given.items()), "--set", f"retrieval.roots=[{roots[0]}]",
        "--lake", lake.uri,
    )  # fmt: skip
    assert status == 0, err

    def written(folder: str) -> dict[str, str]:
        root = storage.canonical(folder)
        uris = [found.uri for found in world.store.list_objects(root)]
        return {uri.removeprefix(root): hashlib.sha256(world.store.read_bytes(uri)).hexdigest() for uri in uris}

    assert called.report.answered == 3
    assert written(f"{out}-call") == written(f"{out}-command") != {}


def test_tables_show_what_is_published(world: World) -> None:
    lake = world.lake
    assert lake.tags.count() == lake.tags.select("image_id").distinct().count() > 60
    assert lake.pixels.where("length(pixels) <> 65536").count() == 0
    assert lake.features().join(lake.pixels, ["image_id", "frame"], "left_anti").count() == 0
    assert {row["job"] for row in lake.runs.select("job").collect()} >= {"ingest", "train", "index"}
    folder, files = lake.feature_files()
    assert files and all(world.store.read_bytes(file)[:4] == b"PAR1" for file in files)
    assert all(file.startswith(folder) for file in files)
    (run,) = lake.training_runs()
    assert run.run_id and lake.verify().rows == lake.features().count()


def test_the_gallery_goes_where_it_is_asked(world: World, tmp_path: Path) -> None:
    answer = world.lake.search(world.images(world.files), k=2)
    copy = answer.gallery(tmp_path / "answer.html")
    assert Path(tmp_path / "answer.html").read_text().startswith("<!") and copy.endswith("answer.html")
    assert "<iframe" in answer._repr_html_()
    none = world.lake.search(world.images(world.files), k=2, gallery=0)
    with pytest.raises(InputError, match="the search made no gallery"):
        none.gallery()
    assert "<iframe" not in none._repr_html_() and "answered" in none._repr_html_()


def bad_queries() -> dict[str, tuple[Any, str]]:
    return {
        "a number": (42, "queries are int: give a path"),
        "numbers": ([1, 2], "holds int: give image ids, paths or Query"),
        "both": (["0" * 32, "a.dcm"], "mixes image ids and paths"),
        "one vector": (np.zeros(256), "of shape (n, D), not float64 of shape (256,)"),
        "nan": (np.full((2, 256), np.nan), "query vector 1 of 2 contains NaN"),
        "zeros": (np.zeros((1, 256)), "contains only zeros"),
        "complex": (np.zeros((1, 256), dtype=complex), "real numbers"),
        "absent": ("absent.csv", "query list absent.csv: No such file"),
        "nothing": (None, "no query list"),
    }


@pytest.mark.parametrize("kind", bad_queries())
def test_queries_that_cannot_be_used_are_refused_before_spark(kind: str, tmp_path: Path) -> None:
    queries, said = bad_queries()[kind]
    lake = cbmir_spark.open(tmp_path / "lake")
    with pytest.raises(InputError, match=re.escape(said)):
        lake.search(queries)
    assert lake._session is None and list(tmp_path.iterdir()) == []


def test_a_vector_of_another_width_is_refused(world: World) -> None:
    with pytest.raises(ModelError, match="3 values, the index has"):
        world.lake.search(np.ones((1, 3)))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda lake: lake.search(["0" * 32], kk=3), r"retrieval\.kk; did you mean retrieval\.k\?"),
        (lambda lake: lake.search(["0" * 32], k=0), r"retrieval\.k must be at least 1, not 0"),
        (lambda lake: lake.ingest("x", max_minuts=3), r"ingest\.max_minuts"),
        (lambda lake: lake.train(preset="alexnett"), "alexnett"),
        (lambda lake: lake.ingest(""), r"ingest\.archive must not be empty"),
        (lambda lake: cbmir_spark.open(lake.uri, retrieval={"kk": 1}), r"retrieval\.kk"),
        (lambda lake: cbmir_spark.open(lake.uri, **{"retrieval.kk": 1}), r"retrieval\.kk"),
        (lambda lake: cbmir_spark.open(lake.uri, settings_file="absent.yaml"), r"absent\.yaml: No such file"),
    ],
)
def test_settings_that_do_not_exist_are_refused_before_spark(call: Any, said: str, tmp_path: Path) -> None:
    lake = cbmir_spark.open(tmp_path / "lake")
    with pytest.raises(ConfigError, match=said):
        call(lake)
    assert lake._session is None and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda lake: lake.forget(patients="ABC"), r"patients must be a list of texts, such as patients=\['…'\]"),
        (lambda lake: lake.forget(studies=[5]), "studies must be a list of texts"),
        (lambda lake: lake.forget(listed_in=5), "listed_in must be a path or a URI, not int"),
        (lambda lake: lake.ingest(5), "archive must be a path or a URI, not int"),
        (lambda lake: cbmir_spark.open(5), "lake must be a path or a URI, not int"),
        (lambda lake: lake.sweep([3]), "a list with a mapping of settings for each training"),
        (lambda lake: lake.training_runs(0), "limit must be a whole number from 1, not 0"),
        (lambda lake: lake.search(["a.dcm"], level="series"), "files cannot name series"),
        (lambda lake: lake.search(np.ones((1, 8)), level="series"), "vectors cannot name series"),
    ],
)
def test_arguments_of_another_kind_are_refused_before_spark(call: Any, said: str, tmp_path: Path) -> None:
    lake = cbmir_spark.open(tmp_path / "lake")
    with pytest.raises(InputError, match=said):
        call(lake)
    assert lake._session is None and list(tmp_path.iterdir()) == []


def test_a_section_setting_that_is_a_mapping_is_one_setting(spark: SparkSession, tmp_path: Path) -> None:
    lake = cbmir_spark.open(tmp_path / "lake", spark=spark)
    assert lake._with("vocabulary", {"body_parts": {"THORAX2": "CHEST"}}).vocabulary.body_parts["THORAX2"] == "CHEST"
    assert lake._with("retrieval", {"ingest": {"max_minutes": 5}}).ingest.max_minutes == 5


def test_a_lake_ends_no_session_that_it_did_not_start(spark: SparkSession, tmp_path: Path) -> None:
    """Neither a given one nor the one that the process runs already, whose settings stay as they are."""
    before = dict(spark.conf.getAll)
    with cbmir_spark.open(tmp_path / "one") as one, cbmir_spark.open(tmp_path / "two", spark=spark) as two:
        assert one.spark.sparkContext is two.spark.sparkContext is spark.sparkContext
        assert one.spark is not two.spark
    assert spark.range(3).count() == 3
    # Delta may add settings with a session's first query.
    assert before.items() <= dict(spark.conf.getAll).items()


@pytest.mark.parametrize(
    "call",
    [lambda lake: lake.remap(), lambda lake: lake.forget(patients=["nobody"]), lambda lake: lake.ingest()],
    ids=["remap", "forget", "ingest"],
)
def test_upkeep_looks_versions_up_once(world: World, call: Callable[[Lake], object]) -> None:
    """Of the methods that test_boundary.py leaves out, since they need a real archive's pixels or key."""
    sources = LakePaths.of(world.lake.settings.lake).path(schemas.SOURCES)
    lake = Lake(world.lake.settings.override({"ingest.archive": world.archive}), world.lake.spark)
    with boundary.counted() as counts:
        call(lake)
    assert counts.histories[sources] == 1
    assert all(times == 1 for times in counts.opened.values()), counts.opened


@pytest.mark.skipif(int(pa.__version__.partition(".")[0]) < 15, reason="deltalake's to_pandas needs a newer pyarrow")
def test_the_readmes_lines_for_reading_without_spark_run_as_they_stand(world: World, tmp_path: Path) -> None:
    if not storage.is_local(world.lake.uri):
        pytest.skip("the lines name folders")
    readme = (REPO / "README.md").read_text(encoding="utf-8")
    block = re.findall(r"## Reading the tables without Spark\n.*?```python\n(.*?)```", readme, re.DOTALL)[0]
    shutil.copytree(storage.local_path(world.lake.uri), tmp_path / "lake")
    # A name that stands for one in the text.
    (model,) = (tmp_path / "lake" / "features").iterdir()
    model.rename(model.with_name("MODEL_ID"))
    world.lake.search(world.images(world.files), k=4, out=str(tmp_path / "answers"))
    end = "\nprint(len(hits), len(sources), len(tags), picture.shape, vectors.shape, vectors.dtype)\n"
    (tmp_path / "lines.py").write_text(block + end)
    command = [sys.executable, "-W", "error", "lines.py"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    *_, last = ended.stdout.splitlines()
    hits, sources, tags, *rest = last.split(maxsplit=3)
    assert int(hits) == 4 * len(world.files)
    assert int(sources) == world.lake.sources.count() and int(tags) == world.lake.tags.count()
    dimension = world.lake.features().select("vector").head()["vector"]
    assert rest == [f"(256, 256) ({world.lake.features().count()}, {len(dimension)}) float32"]


@pytest.mark.more
def test_the_lines_of_the_readme_run_as_they_stand(tmp_path: Path) -> None:
    """In a process and a folder of their own, at the demo's size for tests."""
    readme = (REPO / "README.md").read_text(encoding="utf-8")
    block = re.findall(r"## Ten lines of Python\n\n```python\n(.*?)```", readme, re.DOTALL)[0]
    write_archive(tmp_path / "archive")
    files = sorted(path for path in (tmp_path / "archive").rglob("*.dcm") if "phantom" in str(path))[:3]
    rows = "".join(f"q{number},{path}\n" for number, path in enumerate(files))
    (tmp_path / "queries.csv").write_text("query_id,uri\n" + rows)
    before = set(tmp_path.iterdir())
    environment = os.environ | {
        "CBMIR_DATASET__MIN_IMAGES": "4",
        "CBMIR_TRAINING__EPOCHS": "1",
        "CBMIR_RETRIEVAL__ROOTS": f"[{tmp_path / 'archive'}]",
        "CBMIR_SPARK__MASTER": "local[2]",
        "PYTHONPATH": str(REPO),
    }
    (tmp_path / "lines.py").write_text(block)
    ended = subprocess.run([sys.executable, "lines.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "distance" in ended.stdout and "modality" in ended.stdout
    assert (tmp_path / "answer.html").read_text().startswith("<!")
    made = {path.name for path in set(tmp_path.iterdir()) - before}
    assert made == {"lines.py", "lake", "lake-vault", "mlflow", "answer.html"} or made == {
        "lines.py",
        "lake",
        "answer.html",
    }, made
