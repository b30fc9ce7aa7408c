"""A page of pictures says what it withholds, and lets nothing from a header or a query list act."""

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cbmir_spark.lake import columns as cols
from cbmir_spark.reports import gallery
from cbmir_spark.reports import page as reports_page
from tests.support.browser import PAYLOADS, RUN, ParsedPage, dom_in_browser


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
    harmless = ParsedPage(
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
    seen = ParsedPage(page)
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


@pytest.mark.parametrize(
    ("years", "shown"), [(None, "–"), (9 / 365.25, "9 d"), (0.5, "6 mo"), (1.5, "18 mo"), (54.4, "54 y")]
)
def test_ages_are_shown_in_the_unit_that_people_use(years: float | None, shown: str) -> None:
    row = gallery.Row("q", "answered", None, (), 0, 0, gallery.Card(age_years=years), ())
    assert f"<bdi>{shown}</bdi>" in gallery.render_gallery([row], 1, {})


def test_rows_show_stored_pictures_and_withhold_a_query_that_may_carry_text() -> None:
    """Without a lake: rows of the results and pictures in, cards out."""
    pixels = bytes(range(256)) * 256
    status = {
        cols.QUERY_ID: "q",
        cols.STATUS: "answered",
        cols.REASON: None,
        cols.PARTITIONS: ["CT/CHEST"],
        cols.CANDIDATES: 9,
        cols.HITS: 2,
    }
    hit = dict.fromkeys((cols.SEX, cols.AGE_YEARS, cols.YEAR)) | {
        cols.QUERY_ID: "q",
        cols.FRAME: 0,
        cols.DISTANCE: 1.0,
        cols.MODALITY: "CT",
        cols.BODY_PART_SOURCE: cols.FROM_TAG,
        cols.PREDICTED: "CT/CHEST",
    }
    hits = [
        hit | {cols.IMAGE_ID: "b", cols.RANK: 2, cols.BODY_PART: "HEAD"},
        hit | {cols.IMAGE_ID: "a", cols.RANK: 1, cols.BODY_PART: "CHEST"},
    ]
    pictures = {("a", 0): gallery.Picture(False, pixels, {}), ("b", 0): gallery.Picture(True, None, {})}
    query = gallery.ShownQuery("q", pixels=pixels, modality="CT", body_part="CHEST", text_risk=True)
    (row,) = gallery.rows_of([status], hits, [query], pictures, "exclude")
    assert (row.query.withheld, row.query.picture) == (True, None)
    assert [(card.rank, card.agrees, card.withheld) for card in row.hits] == [(1, True, False), (2, False, True)]
    assert row.hits[0].picture == gallery.thumbnail(pixels, 144) and row.hits[1].picture is None
    (row,) = gallery.rows_of([status], hits, [query], pictures, "include")
    assert row.query.picture == gallery.thumbnail(pixels, 224)
