"""The notebook runs from top to bottom over a demo's lake, and shows what it says it shows."""

import re
import shutil
from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient
from pyspark.sql import SparkSession

from cbmir_spark import config
from cbmir_spark.api import Lake
from cbmir_spark.cli import demo
from cbmir_spark.synthetic import archive

pytestmark = [pytest.mark.timeout(600), pytest.mark.more]

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"


@pytest.fixture(scope="module")
def small_demo(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("notebook") / "demo"
    small = (
        "demo.images_per_class=6",
        "dataset.min_images=4",
        "training.epochs=1",
        "retrieval.gallery=5",
        "evaluation.prefilters=[none, tags]",
    )
    # pydicom's own files are the subject of other tests; the demo leaves an archive that is there as it is.
    archive.write_demo_archive(folder / "archive", images_per_class=6, seed=1)
    shutil.rmtree(folder / "archive" / "pydicom")
    settings = config.load(overrides=[f"demo.folder={folder}", *small], environ={})
    demo.run(Lake(demo.inside(settings), spark))
    return folder


def text_of(notebook: nbformat.NotebookNode) -> str:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "\n".join(text for output in outputs for text in output.get("data", {}).values())


def test_the_demo_notebook_shows_what_it_says(small_demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CBMIR_DEMO__FOLDER", str(small_demo))
    monkeypatch.setenv("CBMIR_SPARK__MASTER", "local[2]")
    # As in the suite's own session: the notebook runs each plan once.
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-XX:TieredStopAtLevel=1 -XX:ReservedCodeCacheSize=240m -XX:+UseSerialGC")
    monkeypatch.setenv("CBMIR_SPARK__CONF", "{spark.sql.codegen.wholeStage: false}")
    notebook = jupytext.read(NOTEBOOKS / "demo_lake.py")
    # Raises with the cell's own traceback where a cell fails.
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(NOTEBOOKS)}}).execute()
    shown = text_of(notebook)
    for outcome in ("ingested", "duplicate", "conflict", "rejected", "not_an_image"):
        assert outcome in shown
    for reason in ("TRUNCATED", "EMPTY"):
        assert reason in shown
    # Of the demo's queries one names a file that is not there; every other one is answered.
    assert "missing-file" in shown
    assert "failed=1" in shown
    assert len(re.findall(r"data:image/png;base64,", shown)) >= 5


def test_notebooks_define_nothing_and_keep_no_outputs() -> None:
    assert [path.name for path in NOTEBOOKS.iterdir() if path.suffix == ".ipynb"] == []
    for path in NOTEBOOKS.glob("*.py"):
        for cell in jupytext.read(path).cells:
            assert not re.search(r"^\s*(async def|def|class) |\blambda\b", cell.source, re.MULTILINE), path.name
