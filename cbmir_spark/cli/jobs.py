"""The commands of the daily path: ingest, train, index, retrieve, evaluate, and the demo of all of them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from cbmir_spark import extras
from cbmir_spark.cli import console, views
from cbmir_spark.cli.command import JOBS, Call, flag, register
from cbmir_spark.config.load import read_yaml
from cbmir_spark.errors import ConfigError

# The exit status of a retrieve that ran but answered no query; schedulers can tell it from a failure.
NOTHING_ANSWERED = 3

app = typer.Typer()


@register(app, JOBS)
def ingest(call: Call, archive: Annotated[str | None, flag("ingest.archive")] = None) -> None:
    """Read new and changed objects of an archive into SOURCES, TAGS and PIXELS."""
    from cbmir_spark.lake import schemas
    from cbmir_spark.lake.paths import LakePaths

    with call.lake() as lake, console.progress("objects", call.as_json, every=10.0) as progress:
        report = lake.ingest(on_progress=progress)
    sources = LakePaths.of(call.settings.lake).path(schemas.SOURCES)
    call.show(report, lambda each: views.ingested(each, sources))


@register(app, JOBS)
def train(
    call: Call,
    preset: Annotated[str | None, flag("training.preset")] = None,
    sweep: Annotated[Path | None, typer.Option(help="YAML list of settings, one mapping for each training.")] = None,
) -> None:
    """Train the network on the lake's labels; the new version becomes `candidate`."""
    # The whole file is checked first: a typo in the last training must not cost the time of the others.
    trainings = None if sweep is None else _trainings(sweep)
    with call.lake() as lake:
        if sweep is None or trainings is None:
            with console.progress("epochs", call.as_json) as progress:
                report = lake.train(on_epoch=lambda epoch: progress(epoch.number, epoch.of, epoch.metrics()))
            return call.show(report, lambda each: views.trained("Trained", each))
        with console.progress("trainings", call.as_json) as progress:
            reports = lake.sweep(trainings, sweep.name, on_run=lambda done: progress(done, len(trainings), {}))
    return call.show(reports, views.swept)


@register(app, JOBS)
def index(call: Call, model: Annotated[str | None, flag("index.model")] = None) -> None:
    """Embed the frames that the model's FEATURES table lacks; a verified index becomes `champion`."""
    with call.lake() as lake:
        report = lake.index()
    call.show(report, lambda each: views.report("Indexed", each))


@register(app, JOBS)
def retrieve(
    call: Call,
    queries: Annotated[str | None, flag("retrieval.queries")] = None,
    level: Annotated[str | None, flag("retrieval.level")] = None,
    k: Annotated[str | None, flag("retrieval.k", "--k")] = None,
    prefilter: Annotated[str | None, flag("retrieval.prefilter")] = None,
    to: Annotated[str | None, flag("retrieval.out", "--out")] = None,
    model: Annotated[str | None, flag("retrieval.model")] = None,
    csv: Annotated[bool, flag("retrieval.csv", "--csv")] = False,
) -> None:
    """Answer a list of query images, or series, with the nearest ones of the archive."""
    with call.lake() as lake:
        report = lake.search().report
    call.show(report, lambda each: views.report("Answered", each))
    if report.queries and not report.answered:
        raise typer.Exit(NOTHING_ANSWERED)


@register(app, JOBS)
def evaluate(
    call: Call,
    model: Annotated[str | None, flag("retrieval.model")] = None,
    to: Annotated[str | None, flag("evaluation.out", "--out")] = None,
) -> None:
    """Measure classification and retrieval with the patients that training never saw."""
    with call.lake() as lake:
        report = lake.evaluate()
    call.show(report, views.evaluated)


@register(app, JOBS, with_lake=False)
def demo(call: Call, folder: Annotated[str | None, flag("demo.folder")] = None) -> None:
    """Draw a small synthetic archive and run every job on it; a second run ingests nothing again."""
    extras.require(extras.TRAIN, "demo")
    from cbmir_spark.cli import demo as demo_job

    inside = replace(call, settings=demo_job.inside(call.settings))
    with inside.lake() as lake, console.steps(demo_job.STEPS, call.as_json) as progress:
        story = demo_job.run(lake, progress)
    call.show(story, views.story)


def _trainings(file: Path) -> list[dict[str, object]]:
    """Read the settings of each training of a sweep. Raises ConfigError where the file is no list of settings."""
    listed = read_yaml(file, f"sweep {file}")
    if not isinstance(listed, list) or not listed or not all(isinstance(each, dict) and each for each in listed):
        raise ConfigError(
            f"sweep {file}: give a list, for each training the settings that differ, such as "
            f"{json.dumps('- training.learning_rate: 0.001')}"
        )
    return listed
