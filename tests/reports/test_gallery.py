"""The gallery shows what it may, says what it withholds, and lets nothing from a header or a query list act."""

import base64
import io
import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pyspark.sql import SparkSession
from pyspark.sql.pandas.types import to_arrow_schema

from cbmir_spark import config, storage
from cbmir_spark.lake import columns as cols
from cbmir_spark.lake import schemas
from cbmir_spark.lake.paths import LakePaths
from cbmir_spark.reports import gallery
from cbmir_spark.reports import page as reports_page
from cbmir_spark.storage import ObjectStore
from tests.support.tiny_lake import Drawn, draw, pseudonym, publish
from tests.support.tools import require_tool

RUN = "document.documentElement.setAttribute('data-ran','yes')"
PAYLOADS = [
    f"<script>{RUN}</script>",
    f"</script><script>{RUN}</script>",
    f"</style><script>{RUN}</script>",
    f"</bdi></div><script>{RUN}</script>",
    f"<img src=x onerror={RUN}>",
    f'"><img src=x onerror="{RUN}">',
    f"'><svg onload={RUN}>",
    f'" onmouseover="{RUN}" autofocus onfocus="{RUN}" x="',
    f"<iframe srcdoc='<script>parent.{RUN}</script>'></iframe>",
    f'<a href="javascript:{RUN}">x</a>',
    f"<body onload={RUN}>",
    f"<details open ontoggle={RUN}>",
    f"<base href=javascript:{RUN}//>",
    f"<meta http-equiv=refresh content='0;url=javascript:{RUN}'>",
    "<style>* { display: none }</style>",
    "<form action=https://198.51.100.7/><input name=q autofocus>",
    "{{ 7 * 7 }}{% for x in y %}",
    "\u202egnp.exe \u2066hidden\u2069 \u200b\ufeff",
    "line one\nline two\r\x1b[31mred\x07\x00\u2028end",
    "&lt;script&gt; &#60;b&#62; <!-- --> ]]>",
]


class _Seen(HTMLParser):
    """Tags, attribute names, text and pictures of a page, as a browser's parser would find them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.sources: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.sources += [value or "" for name, value in attrs if name == "src"]

    def handle_data(self, data: str) -> None:
        self.text += data


def hostile_page() -> str:
    """Every payload in every place that a page takes text from: 20 × 11."""
    rows = []
    for payload in PAYLOADS:
        card = gallery.Card(
            rank=1, distance=1.5, modality=payload, body_part=payload, predicted=payload, sex=payload, agrees=False
        )
        shown = gallery.Card(
            picture=gallery.thumbnail(bytes(cols.FRAME_BYTES), 144), rank=1, distance=0.0, modality=payload
        )
        rows.append(gallery.Row(payload, payload, payload, (payload,), 3, 1, card, (card, shown)))
        rows.append(gallery.Row(payload, payload, payload, (), 0, 0, card, ()))
    return gallery.render_gallery(rows, len(rows), {payload: payload for payload in PAYLOADS})


def test_no_text_becomes_markup() -> None:
    calm = gallery.Card(rank=1, distance=1.0, modality="CT", body_part="CHEST", sex="F", agrees=True)
    shown = gallery.Card(picture=gallery.thumbnail(bytes(cols.FRAME_BYTES), 144), rank=1, distance=0.0)
    harmless = _Seen(
        gallery.render_gallery(
            [
                gallery.Row("q", "answered", None, ("CT/CHEST",), 3, 1, calm, (calm, shown)),
                gallery.Row("q", "failed", "because", (), 0, 0, calm, ()),
            ],
            2,
            {"model": "m"},
        )
    )
    page = hostile_page()
    seen = _Seen(page)
    assert seen.tags == harmless.tags and not seen.tags & {"script", "iframe", "svg", "form", "a", "link", "object"}
    assert seen.attributes == harmless.attributes and not [name for name in seen.attributes if name.startswith("on")]
    assert all(source.startswith("data:image/png;base64,") for source in seen.sources)
    # What was handed in can be read on the page, character by character.
    for payload in PAYLOADS:
        assert reports_page.visible(payload) in seen.text
    assert "49" not in re.sub(r"data:[^\"]*", "", page).partition("<main>")[2]


def test_invisible_characters_are_spelled_out() -> None:
    page = hostile_page()
    assert not re.search("[\u202a-\u202e\u2066-\u2069\u200b-\u200f\ufeff\u2028\x00-\x09\x0b-\x1f\x7f]", page)
    assert reports_page.visible("a\u202eb\nc\x00") == "a⟨U+202E⟩b⟨U+000A⟩c⟨U+0000⟩"
    assert reports_page.visible("Überkopf, 頭部 – ok") == "Überkopf, 頭部 – ok"


def test_the_policy_comes_before_everything_else() -> None:
    page = hostile_page()
    policy = re.search(r'<meta http-equiv="Content-Security-Policy"\s+content="([^"]*)">', page)
    assert policy is not None
    assert policy[1].startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'")
    assert policy.start() < page.index("<style>") < page.index("<title>") + 10_000
    assert page.index("<title>") > policy.start()


def dom_in_browser(page: str, folder: Path) -> str:
    """The page's DOM after headless Chromium has loaded it and run what it would run."""
    chromium = require_tool("chromium", "chromium-browser", "google-chrome")
    path = folder / "page.html"
    path.write_text(page, encoding="utf-8")
    command = [str(chromium), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    done = subprocess.run(
        [*command, "--virtual-time-budget=2000", "--dump-dom", path.as_uri()], capture_output=True, timeout=60
    )
    assert done.returncode == 0, done.stderr[-500:]
    return done.stdout.decode("utf-8")


def test_a_real_browser_runs_no_script(tmp_path: Path) -> None:
    page = hostile_page()
    dom = dom_in_browser(page, tmp_path)
    assert "Retrieved images" in dom and "data-ran" not in dom.partition("<body")[0]
    # The page's second line of defence: were a script let through, the policy would stop it.
    smuggled = page.replace("</main>", f"<script>{RUN}</script><img src=x onerror={RUN}></main>")
    assert "data-ran" not in dom_in_browser(smuggled, tmp_path).partition("<body")[0]
    # And the test itself sees scripts run where nothing stops them.
    bare = f"<!doctype html><html><head></head><body><script>{RUN}</script></body></html>"
    assert 'data-ran="yes"' in dom_in_browser(bare, tmp_path).partition("<body")[0]


def test_a_thumbnail_is_the_frame_made_smaller() -> None:
    pixels = np.zeros((256, 256), np.uint8)
    pixels[:, 128:] = 200
    uri = gallery.thumbnail(pixels.tobytes(), 64)
    small = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))
    assert small.shape == (64, 64) and small.dtype == np.uint8
    assert (small[:, :31] == 0).all() and (small[:, 33:] == 200).all()


def test_ages_are_told_as_people_tell_them() -> None:
    assert [reports_page._age(a) for a in (None, 9 / 365.25, 0.5, 1.5, 54.4)] == ["", "9 d", "6 mo", "18 mo", "54 y"]


# --- over a lake ---

IMAGES = [
    Drawn("plain", "one", "CT", "CHEST"),
    Drawn("other", "two", "CT", "HEAD"),
    Drawn("burned", "three", "CT", "CHEST", burned_in="YES", text_risk=True),
    Drawn("echo", "four", "US", "LIVER", burned_in="UNKNOWN", text_risk=True),
    Drawn("screen", "five", "CT", "CHEST", kind="screen", text_risk=None),
    Drawn("query", "six", "CT", "CHEST"),
]


@pytest.fixture(scope="module")
def settings(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> config.Settings:
    lake = tmp_path_factory.mktemp("report") / "lake"
    made = config.load(overrides=[f"lake.uri={lake}", "retrieval.gallery=3"], environ={})
    publish(spark, made, IMAGES)
    return made


def write_parquet(rows: list[tuple[object, ...]], table: schemas.Table, folder: Path) -> None:
    (folder / table.name).mkdir(parents=True)
    values = [dict(zip(table.schema.names, row, strict=True)) for row in rows]
    found = pa.Table.from_pylist(values, schema=to_arrow_schema(table.schema))
    pq.write_table(found, folder / table.name / "part-00000.parquet")


def write_results(folder: Path, hits: list[str], queries: int = 1) -> str:
    by_name = {image.name: image for image in IMAGES}
    rows: list[tuple[object, ...]] = []
    for query in range(queries):
        for rank, name in enumerate(hits, start=1):
            image = by_name[name]
            ids = (pseudonym(name), 0, pseudonym("series " + name), pseudonym("study"), pseudonym(image.patient))
            labels = (image.modality, image.body_part, cols.FROM_TAG, "CT/CHEST")
            rows.append((f"q{query:03d}", rank, float(rank), *ids, *labels, "F", 40.0, 2020))
    statuses: list[tuple[object, ...]] = [
        (f"q{query:03d}", "answered", None, ["CT/CHEST"], 5, len(hits)) for query in range(queries)
    ]
    statuses.append(("z-lost", "failed", "the file is not there", [], 0, 0))
    write_parquet(rows, schemas.RESULTS_HITS, folder)
    write_parquet(statuses, schemas.RESULTS_STATUSES, folder)
    return storage.canonical(str(folder))


def test_the_gallery_reads_the_shown_pictures_and_withholds_the_rest(
    spark: SparkSession, settings: config.Settings, tmp_path: Path
) -> None:
    results = write_results(tmp_path / "results", ["plain", "other", "burned", "echo", "screen"])
    asked = [gallery.Asked("q000", image_id=pseudonym("query"))]
    uri = gallery.gallery(spark, settings, results, asked, {"model": "m-1"})
    assert uri == f"{results}/gallery.html"
    page = ObjectStore(settings.storage).read_bytes(uri).decode("utf-8")
    seen = _Seen(page)
    expected = [
        gallery.thumbnail(draw(image, 0).tobytes(), side)
        for image, side in ((IMAGES[5], 224), (IMAGES[0], 144), (IMAGES[1], 144))
    ]
    assert seen.sources == expected
    assert page.count("withheld: may carry burned-in text") == 3
    assert "3 withheld" in seen.text and "the file is not there" in seen.text and "m-1" in seen.text
    assert seen.text.count("●") - 1 == 3 and seen.text.count("○") - 1 == 2  # one of each is in the legend
    lake = LakePaths.of(settings.lake)
    held_back = gallery._pictures(spark, lake, [(pseudonym("burned"), 0), (pseudonym("plain"), 0)], "exclude")
    assert held_back[pseudonym("burned"), 0].pixels is None and held_back[pseudonym("burned"), 0].withheld
    assert held_back[pseudonym("plain"), 0].pixels == draw(IMAGES[0], 0).tobytes()
    included = settings.model_copy(update={"privacy": settings.privacy.model_copy(update={"burned_in": "include"})})
    page = ObjectStore(settings.storage).read_bytes(gallery.gallery(spark, included, results, asked)).decode("utf-8")
    assert "0 withheld" in _Seen(page).text or "withheld" not in _Seen(page).text
    assert len(_Seen(page).sources) == 6


def test_a_query_that_is_no_image_of_the_lake_brings_its_own_picture(
    spark: SparkSession, settings: config.Settings, tmp_path: Path
) -> None:
    results = write_results(tmp_path / "results", ["plain"], queries=4)
    own = np.full((256, 256), 77, np.uint8).tobytes()
    asked = [
        gallery.Asked("q000", pixels=own, modality="CT", body_part="HEAD", age_years=3.0, text_risk=False),
        gallery.Asked("q001", pixels=own, modality="US", body_part="LIVER"),
    ]
    page = ObjectStore(settings.storage).read_bytes(gallery.gallery(spark, settings, results, asked)).decode("utf-8")
    seen = _Seen(page)
    assert "The first 3 of 5 queries" in " ".join(seen.text.split())
    assert "q001" in seen.text and "q003" not in seen.text
    assert seen.sources[0] == gallery.thumbnail(own, 224) and gallery.thumbnail(own, 224) not in seen.sources[1:]
    assert page.count("withheld: may carry burned-in text") == 1


def test_long_answers_are_cut_and_empty_ones_are_a_page_too(
    spark: SparkSession, settings: config.Settings, tmp_path: Path
) -> None:
    many = write_results(tmp_path / "many", ["plain"] * (gallery.SHOWN_HITS + 5))
    page = ObjectStore(settings.storage).read_bytes(gallery.gallery(spark, settings, many)).decode("utf-8")
    assert page.count('title="Euclidean distance"') == gallery.SHOWN_HITS and "no picture kept" in page
    none = write_results(tmp_path / "none", [], queries=0)
    page = ObjectStore(settings.storage).read_bytes(gallery.gallery(spark, settings, none)).decode("utf-8")
    assert "the file is not there" in page


# --- evaluation ---


def evaluation_of(text: str) -> dict[str, object]:
    measures = dict.fromkeys(
        ("precision_at_k", "precision_at_min", "recall_at_k", "average_precision", "reciprocal_rank"), 0.25
    )
    of_class = {"precision": 0.5, "recall": 0.75, "f1": 0.6, "images": 4, "patients": 2}
    macro = {"precision": 0.5, "recall": 0.75, "f1": 0.6, "classes": 1}
    space = {"candidates": 12.0, "share": 0.125, "partitions": 1.5}
    mode = {
        "answered": 3,
        "mean": measures,
        "macro": measures,
        "macro_of_many": dict.fromkeys(measures),
        "space": space,
    }
    return {
        "model_id": text,
        "label": text,
        "snapshot": text,
        "queries": 4,
        "patients": 2,
        "indexed": 96,
        "k": 10,
        "depth": 1000,
        "many": 5,
        "classification": {
            "accuracy": 0.875,
            "macro": macro,
            "macro_of_many": {**macro, "recall": None, "classes": 0},
            "by_class": {text: of_class, "CT/CHEST": of_class},
        },
        "retrieval": {
            "none": {**mode, "circular": "no", "by_class": {"CT/CHEST": measures}},
            "tags": {**mode, "circular": "yes", "by_class": {"CT/CHEST": measures}},
        },
        "notes": [text],
    }


def test_an_evaluation_reads_at_a_glance() -> None:
    page = reports_page.render_evaluation(evaluation_of("alexnet-small-0123"), {"a figure": b"\x89PNG"})
    text = " ".join(_Seen(page).text.split())
    for said in ("0.875 accuracy", "0.750 macro recall", "mean over 1 classes", "12.5 %", "3 of 4", "tags circular"):
        assert said in text, said
    # What cannot be computed is a dash, not a zero: no class has five patients, and one was never searched for.
    assert text.count("–") == 1 + 2 + 2
    assert "data:image/png;base64," in page and "none circular" not in text


@pytest.mark.parametrize("payload", PAYLOADS)
def test_an_evaluation_of_a_model_with_a_hostile_name_is_a_page_like_any_other(payload: str) -> None:
    calm = _Seen(reports_page.render_evaluation(evaluation_of("m"), {"f": b""}))
    seen = _Seen(reports_page.render_evaluation(evaluation_of(payload), {payload: b""}))
    assert (seen.tags, seen.attributes) == (calm.tags, calm.attributes)
    assert seen.text.count(reports_page.visible(payload)) >= 5
