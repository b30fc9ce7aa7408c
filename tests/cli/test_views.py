"""What people read: tables in which nothing is broken or in another column."""

import pytest

from cbmir_spark.cli import views
from cbmir_spark.ingest.job import Report
from cbmir_spark.lake.publication import Published
from cbmir_spark.lake.reasons import EXPLANATIONS
from cbmir_spark.models.registry import Run

SHARED = {"preset": "paper", "seed": "1", "snapshot": "0123456789abcdef"}


def run(number: int, metrics: dict[str, float], **parameters: str) -> Run:
    return Run(
        run_id=f"{number:032x}"[::-1],
        started=f"2026-11-2{number}T10:11:12",
        status="FINISHED",
        parameters=SHARED | parameters,
        metrics=metrics,
        version=str(number),
        model_id="alexnet-small-0123456789ab",
        aliases=("candidate",) if number == 2 else (),
        promotion=None,
    )


METRICS = {"train_loss": 0.25, "test_macro_recall": 0.5, "validation_map": 0.75, "images_per_second": 123.0}


def cells(printed: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in printed.splitlines() if "│" in line]


@pytest.mark.parametrize("width", [80, 200])
def test_runs_show_the_settings_that_differ(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    views.runs([run(2, METRICS, learning_rate="0.001", epochs="20"), run(1, {}, learning_rate="0.01", epochs="20")])
    printed = capsys.readouterr().out
    assert all(len(line) <= width for line in printed.splitlines())
    rows = [row for row in cells(printed) if len(row) == 7]
    # A run's cells take several lines; its figures stand in the first.
    starts = [number for number, row in enumerate(rows) if row[0].endswith("0000000")]
    settings = [" ".join(row[1] for row in rows[start : start + 3]).strip() for start in starts]
    assert settings == ["learning_rate 0.001", "learning_rate 0.01"]
    assert rows[starts[0]][2:] == ["0.25", "0.5", "0.75", "123", "2 candidate"]
    assert rows[starts[1]][2:] == ["–", "–", "–", "–", "1"]
    # What all runs share says nothing about which is better.
    assert "epochs" not in printed and "seed" not in printed and "0123456789abcdef" not in printed


def test_a_single_run_shows_its_preset(capsys: pytest.CaptureFixture[str]) -> None:
    views.runs([run(1, METRICS)])
    printed = capsys.readouterr().out
    assert "preset" in printed and any("paper" in row for row in cells(printed))


@pytest.mark.parametrize("width", [80, 200])
def test_an_ingest_explains_each_reason_that_occurred(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    counts = {reason: 1_234_567 + number for number, reason in enumerate(EXPLANATIONS)}
    published = Published(sources=1, tags=1, pixels=1, batch=1, key_id="k", preprocessing="p")
    places = {"archive": "file:///data/archive", "published": published, "rolled_back": ()}
    figures = dict.fromkeys(("listed", "unchanged", "deferred", "deleted", "frames", "batches"), 1)
    report = Report(outcomes={"rejected": 1}, reasons=counts, seconds={}, **figures, **places)
    views.ingested(report, "file:///data/lake/vault/sources")
    printed = capsys.readouterr().out
    assert all(len(line) <= width for line in printed.splitlines())
    rows = [row for row in cells(printed) if len(row) == 3]
    starts = [number for number, row in enumerate(rows) if row[0]]
    said = {
        rows[first][0]: (rows[first][1], " ".join(row[2] for row in rows[first:after]))
        for first, after in zip(starts, [*starts[1:], len(rows)], strict=True)
    }
    assert said == {
        reason: (f"{counts[reason]:,}", f"{each.meaning} {each.action}") for reason, each in EXPLANATIONS.items()
    }
    assert "\n/data/lake/vault/sources\n" in printed


def test_an_ingest_without_reasons_explains_none(capsys: pytest.CaptureFixture[str]) -> None:
    published = Published(sources=1, tags=1, pixels=1, batch=1, key_id="k", preprocessing="p")
    report = Report("file:///a", 1, 0, 0, {"ingested": 1}, {}, 0, 1, 1, {}, published, ())
    views.ingested(report, "file:///data/lake/vault/sources")
    assert "Reasons" not in capsys.readouterr().out
