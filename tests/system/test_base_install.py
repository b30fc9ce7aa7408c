"""The base alone, in an environment of its own: no torch, no Petastorm, and everything but what needs them works."""

import csv
import json
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pyarrow as pa
import pydicom
import pyspark
import pytest

from cbmir_spark.synthetic.archive import write_demo_archive
from cbmir_spark.synthetic.phantoms import CLASSES
from tests.conftest import REPO
from tests.support import chain

pytestmark = [
    pytest.mark.more,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(int(pa.__version__.partition(".")[0]) < 15, reason="the base's lock is of the current stack"),
]

KEY = {"CBMIR_PRIVACY__KEY": "a key for the tests of the base, of 32 characters or more"}
LIMIT_MB = 1_500
VECTORS = """
import json, sys
import numpy as np
import cbmir_spark as cbmir

lake = cbmir.open("lake", **{"spark.master": "local[2]"})
phantoms = lake.features().where("modality = 'CT' and body_part_source = 'tag'")
rows = phantoms.orderBy("image_id", "frame").limit(3).collect()
vectors = np.asarray([row["vector"] for row in rows])
answer = lake.search(vectors.astype(np.float32), k=1, prefilter="none")
hits = answer.hits.orderBy("query_id").collect()
with open("vectors.json", "w") as file:
    json.dump([answer.report.answered, [hit["distance"] for hit in hits], "torch" in sys.modules], file)
lake.close()
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with the base's lock and this checkout's wheel."""
    folder = tmp_path_factory.mktemp("base") / "environment"
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    uv = [Path(sys.executable).with_name("uv"), "pip", "install", "--quiet", "--python", python]
    subprocess.run([*uv, "--require-hashes", "-r", REPO / "requirements" / "base.lock"], check=True)
    # A copy: the build writes beside the sources.
    source = folder.parent / "source"
    for name in ("cbmir_spark", "conf"):
        shutil.copytree(REPO / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(REPO / name, source)
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", source], check=True)
    # The jars that deploy/fetch_jars.py put beside those of the same Spark here.
    target = next((folder / "lib").iterdir()) / "site-packages" / "pyspark" / "jars"
    for jar in (Path(pyspark.__file__).parent / "jars").iterdir():
        if jar.is_file() and not (target / jar.name).exists():
            shutil.copy(jar, target)
    return python


@pytest.fixture(scope="module")
def world(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an archive, and a lake that the whole installation trained and indexed."""
    folder = tmp_path_factory.mktemp("world")
    archive = write_demo_archive(folder / "archive", 12, 3, CLASSES[:3]).folder
    chosen = sorted(path for path in archive.rglob("*.dcm") if "phantom" in str(path))[::5]
    with (folder / "queries.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["query_id", "sop_instance_uid"])
        for number, path in enumerate(chosen):
            rows.writerow([f"q{number}", str(pydicom.dcmread(path, stop_before_pixels=True).SOPInstanceUID)])
    (folder / "files.csv").write_text(f"query_id,uri\nfile,{chosen[0]}\n")
    commands = {
        "ingest": ["ingest", f"--archive={archive}"],
        "train": ["train", "--preset=alexnet-small", "--set=dataset.min_images=3", "--set=training.epochs=1"],
        "index": ["index"],
    }
    options = [f"--lake={folder / 'lake'}", "--json", *chain.QUICK]
    chain.run({name: [*each, *options] for name, each in commands.items()}, folder, environment=KEY)
    return folder


def test_it_is_small_and_has_none_of_them(base: Path) -> None:
    size = subprocess.run(["du", "-sm", base.parent.parent], capture_output=True, text=True, check=True).stdout
    assert int(size.split()[0]) <= LIMIT_MB
    code = "import importlib.util as u, json; print(json.dumps([n for n in %r if u.find_spec(n)]))"
    names = ("torch", "petastorm", "matplotlib", "sklearn", "scipy")
    found = subprocess.run([base, "-c", code % (names,)], capture_output=True, text=True, check=True)
    assert json.loads(found.stdout) == []


def test_it_ingests_retrieves_by_id_verifies_and_forgets(base: Path, world: Path) -> None:
    fresh = [f"--lake={world / 'fresh'}", "--json", *chain.QUICK]
    with (world / "queries.csv").open(newline="") as file:
        image = next(csv.DictReader(file))["sop_instance_uid"]
    indexed = [f"--lake={world / 'lake'}", "--json", *chain.QUICK]
    printed = chain.run(
        {
            "ingest": ["ingest", f"--archive={world / 'archive'}", *fresh],
            "forget": ["forget", f"--image={image}", *fresh],
            "verify": ["verify", *indexed],
            "retrieve": ["retrieve", "--queries=queries.csv", "--out=answer", "--k=3", *indexed],
        },
        world,
        python=base,
        # Not the checkout: what the wheel installed.
        environment={**KEY, "PYTHONPATH": ""},
    )
    assert printed["ingest"]["outcomes"]["ingested"] > 30
    assert printed["forget"]["images"] == 1
    assert printed["verify"]["rows"] > 30
    assert printed["retrieve"]["answered"] == printed["retrieve"]["queries"] > 3
    assert (world / "answer" / "gallery.html").exists() or printed["retrieve"]["gallery"]


def test_it_retrieves_by_vectors_from_python(base: Path, world: Path) -> None:
    environment = {**chain.inherited(), **KEY, "PYTHONPATH": ""}
    ended = subprocess.run([base, "-c", VECTORS], cwd=world, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    answered, distances, torch = json.loads((world / "vectors.json").read_text())
    assert (answered, torch) == (3, False)
    assert distances == pytest.approx([0, 0, 0], abs=1e-6)


@pytest.mark.parametrize(
    ("command", "extra"),
    [(["index"], "embed"), (["train"], "train"), (["retrieve", "--queries=files.csv", "--out=none"], "embed")],
    ids=["index", "train", "retrieve by file"],
)
def test_what_it_lacks_is_named(base: Path, world: Path, command: list[str], extra: str) -> None:
    environment = {**chain.inherited(), **KEY, "PYTHONPATH": ""}
    arguments = [*command, f"--lake={world / 'lake'}", "--set=spark.master=local[2]"]
    ended = subprocess.run(
        [base.with_name("cbmir"), *arguments], cwd=world, env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 1
    assert f"not installed: pip install 'cbmir-spark[{extra}]'" in ended.stderr
    assert not (world / "none").exists()
