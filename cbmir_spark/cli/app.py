"""`cbmir <job>`: argv → config → session → <module>.run, and what a person sees of it."""

import json
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
import yaml

from cbmir_spark import __version__, config
from cbmir_spark.cli import console
from cbmir_spark.errors import CbmirError, ConfigError
from cbmir_spark.storage import ObjectStore

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from cbmir_spark.maintenance import remap as maintenance_remap


app = typer.Typer(
    name="cbmir",
    help="Find the images of a DICOM archive that look like the ones in a list.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ConfigFile = Annotated[Path | None, typer.Option("--config", help="Settings file over conf/base.yaml.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="One setting: section.key=value. Repeatable.")]
LakeUri = Annotated[str | None, typer.Option("--lake", help="Folder or s3a: prefix of the tables.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]


@app.command()
def ingest(
    archive: Annotated[str | None, typer.Option(help="Folder or s3a: prefix of the .dcm objects.")] = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    lake: LakeUri = None,
    as_json: AsJson = False,
) -> None:
    """Read new and changed objects of an archive into SOURCES, TAGS and PIXELS."""
    settings = _settings(config, overrides, {"lake.uri": lake, "ingest.archive": archive})
    from cbmir_spark.ingest import job as ingest_job

    with _session(settings, "ingest") as spark, console.progress("objects", as_json, every=10.0) as progress:
        report = ingest_job.run(spark, settings, progress)
    if as_json:
        return console.print_json(report)
    rows = {"listed": report.listed, "unchanged": report.unchanged, "deferred": report.deferred}
    rows |= {**report.outcomes, "deleted": report.deleted}
    console.print_counts(f"Ingested {report.archive}", rows)
    if report.reasons:
        console.print_counts("Reasons", dict(sorted(report.reasons.items())))
    return None


@app.command()
def train(
    preset: Annotated[str | None, typer.Option(help="alexnet, alexnet-small, paper or retrieval.")] = None,
    sweep: Annotated[Path | None, typer.Option(help="YAML list of settings, one for each training.")] = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    lake: LakeUri = None,
    as_json: AsJson = False,
) -> None:
    """Train the network on the lake's own labels; the new version becomes `candidate`."""
    flags = {"lake.uri": lake, "training.preset": preset}
    settings = _settings(config, overrides, flags)
    from cbmir_spark.training import job as training_job

    if sweep is not None:
        # All of them are read first: a typing error in the last must not cost the time of those before it.
        each = [_settings(config, [*(overrides or []), *changes], flags) for changes in _variants(sweep)]
        with _session(settings, "train") as spark, console.progress("trainings", as_json) as progress:
            reports = training_job.sweep(spark, each, sweep.name, lambda done: progress(done, len(each), {}))
        if as_json:
            return console.print_json([asdict(report) for report in reports])
        for number, report in enumerate(reports, 1):
            console.print_training(f"Trained {number} of {len(reports)}", report)
        return None
    with _session(settings, "train") as spark, console.progress("epochs", as_json) as progress:
        report = training_job.run(spark, settings, lambda epoch: progress(epoch.number, epoch.of, epoch.metrics()))
    return console.print_json(report) if as_json else console.print_training("Trained", report)


@app.command()
def runs(
    limit: Annotated[int, typer.Option(min=1, help="How many of the newest runs.")] = 20,
    config: ConfigFile = None,
    overrides: Overrides = None,
    lake: LakeUri = None,
    as_json: AsJson = False,
) -> None:
    """Compare training runs: what was asked for, what was reached, and which model is candidate or champion."""
    settings = _settings(config, overrides, {"lake.uri": lake})
    from cbmir_spark.lake.paths import LakePaths
    from cbmir_spark.models.registry import Registry
    from cbmir_spark.storage import ObjectStore

    registry = Registry(settings.mlflow, LakePaths.of(settings.lake).uri, ObjectStore(settings.storage))
    found = registry.runs(limit)
    return console.print_json([asdict(run) for run in found]) if as_json else console.print_runs(found)


@app.command()
def index(
    model: Annotated[str | None, typer.Option(help="models:/name@alias, models:/name/3, runs:/id or a folder.")] = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    lake: LakeUri = None,
    as_json: AsJson = False,
) -> None:
    """Embed the frames that the model's FEATURES table lacks; a verified index becomes `champion`."""
    settings = _settings(config, overrides, {"lake.uri": lake, "index.model": model})
    from cbmir_spark.index import job as index_job

    with _session(settings, "index") as spark:
        report = index_job.run(spark, settings)
    return console.print_json(report) if as_json else console.print_report("Indexed", report)


@app.command()
def remap(
    config: ConfigFile = None,
    overrides: Overrides = None,
    lake: LakeUri = None,
    as_json: AsJson = False,
) -> None:
    """Apply a changed vocabulary to TAGS and FEATURES; the archive is not read and nothing is embedded again."""
    settings = _settings(config, overrides, {"lake.uri": lake})
    from cbmir_spark.maintenance import remap as maintenance_remap

    with _session(settings, "remap") as spark:
        report = maintenance_remap.run(spark, settings)
    if as_json:
        return console.print_json(report)
    console.print_report("Remapped", report)
    if report.reread:
        console.out.print(f"{report.reread} images get another window: run `cbmir ingest`, then `cbmir index`")
    return None


@app.command()
def vocabulary(
    unmapped: Annotated[
        bool, typer.Option("--unmapped", help="Only the lake's codes without a term, to paste into a settings file.")
    ] = False,
    config: ConfigFile = None,
    overrides: Overrides = None,
    lake: LakeUri = None,
    as_json: AsJson = False,
) -> None:
    """Print the closed list of modalities and body parts, or what of the lake is not in it."""
    settings = _settings(config, overrides, {"lake.uri": lake})
    if unmapped:
        with _session(settings, "vocabulary") as spark:
            gaps = maintenance_remap.unmapped(spark, settings)
        return console.print_json(gaps) if as_json else console.print_gaps(gaps)
    from cbmir_spark.dicom.vocabulary import Vocabulary
    from cbmir_spark.dicom.vocabulary_tables import BODY_PARTS, MODALITIES

    terms = {
        "version": Vocabulary(settings.vocabulary.body_parts).version,
        "modalities": sorted(MODALITIES),
        "body_parts": sorted(BODY_PARTS),
    }
    if as_json:
        return console.print_json(terms)
    sys.stdout.write(yaml.safe_dump(terms, sort_keys=False, width=110, default_flow_style=None))
    return None


@app.command()
def retrieve(
    queries: Annotated[str | None, typer.Option(help="CSV or Parquet: query_id and uri, image_id or UID.")] = None,
    level: Annotated[str | None, typer.Option(help="What is compared: image, or series.")] = None,
    k: Annotated[int | None, typer.Option("--k", help="Hits for each query.")] = None,
    prefilter: Annotated[str | None, typer.Option(help="tags, predicted, modality or none.")] = None,
    to: Annotated[str | None, typer.Option("--out", help="Folder for hits, statuses and gallery.")] = None,
    model: Annotated[
        str | None, typer.Option(help="The model whose index is searched; its champion if left out.")
    ] = None,
    csv: Annotated[bool, typer.Option("--csv", help="Hits and statuses as CSV too.")] = False,
    config: ConfigFile = None,
    overrides: Overrides = None,
    lake: LakeUri = None,
    as_json: AsJson = False,
) -> None:
    """Answer a list of query images, or series, with the nearest ones of the archive."""
    flags = {"queries": queries, "level": level, "k": k, "prefilter": prefilter, "out": to, "model": model}
    flags["csv"] = csv or None
    settings = _settings(
        config, overrides, {"lake.uri": lake} | {f"retrieval.{name}": value for name, value in flags.items()}
    )
    from cbmir_spark.retrieval import job as retrieval_job

    with _session(settings, "retrieve") as spark:
        report = retrieval_job.run(spark, settings)
    return console.print_json(report) if as_json else console.print_report("Answered", report)


@app.command()
def evaluate(
    model: Annotated[str | None, typer.Option(help="The model to judge; the champion if left out.")] = None,
    to: Annotated[str | None, typer.Option("--out", help="Folder for figures and report.")] = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    lake: LakeUri = None,
    as_json: AsJson = False,
) -> None:
    """Measure classification and retrieval with the patients that training never saw."""
    settings = _settings(config, overrides, {"lake.uri": lake, "retrieval.model": model, "evaluation.out": to})
    from cbmir_spark.evaluation import job as evaluation_job

    with _session(settings, "evaluate") as spark:
        report = evaluation_job.run(spark, settings)
    if as_json:
        return console.print_json(report)
    console.print_evaluation(report)
    console.out.print(f"Report: {console.plain(report.page)}", soft_wrap=True, highlight=False)
    return None


@app.command()
def demo(
    folder: Annotated[str | None, typer.Option(help="Where the demo keeps its archive and its lake.")] = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Draw a small synthetic archive and run every job over it; run again, nothing is ingested twice."""
    settings = _settings(config, overrides, {"demo.folder": folder})
    from cbmir_spark.cli import demo as cli_demo

    with _session(settings, "demo") as spark, console.steps(cli_demo.STEPS, as_json) as progress:
        story = cli_demo.run(spark, settings, progress)
    return console.print_json(story) if as_json else console.print_story(story)


@app.command()
def wrap(
    images: Annotated[Path, typer.Option(help="Folder of the pictures.")],
    labels: Annotated[Path, typer.Option(help="CSV with file, modality, body_part, group.")],
    archive: Annotated[Path, typer.Option(help="Folder to write the .dcm files to.")],
    as_json: AsJson = False,
) -> None:
    """Wrap labelled PNG or JPEG pictures as DICOM Secondary Capture: real pixels, label-derived tags."""
    from cbmir_spark.synthetic import wrap as synthetic_wrap

    report = synthetic_wrap.wrap_pictures(labels, images, archive)
    return console.print_json(report) if as_json else console.print_report("Wrapped", report)


@app.command()
def features(
    files: Annotated[bool, typer.Option("--files", help="List the live Parquet files, one URI a line.")] = False,
    model: Annotated[str | None, typer.Option(help="The model whose index is meant; the champion if left out.")] = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    lake: LakeUri = None,
    as_json: AsJson = False,
) -> None:
    """Where a model's vectors are: any Parquet reader can open the files."""
    settings = _settings(config, overrides, {"lake.uri": lake, "retrieval.model": model})
    from cbmir_spark.index.open import open_index
    from cbmir_spark.lake.open import open_lake
    from cbmir_spark.models.registry import Registry

    with _session(settings, "features") as spark:
        lake_there = open_lake(spark, settings)
        registry = Registry(settings.mlflow, lake_there.paths.uri, lake_there.store)
        index = open_index(lake_there, registry, settings.retrieval.model)
        table, uris = index.path, index.files
    if as_json:
        return console.print_json({"table": table, "files": uris})
    for line in uris if files else [table, f"{len(uris)} live files; --files lists them"]:
        sys.stdout.write(line + "\n")
    return None


@app.command()
def verify(
    model: Annotated[
        str | None, typer.Option(help="The model whose index is looked at; the champion if left out.")
    ] = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    lake: LakeUri = None,
    as_json: AsJson = False,
) -> None:
    """Compare the whole index with the published frames, and look at every vector."""
    settings = _settings(config, overrides, {"lake.uri": lake, "retrieval.model": model})
    from cbmir_spark.index import verify as index_verify

    with _session(settings, "verify") as spark:
        report = index_verify.run(spark, settings)
    return console.print_json(report) if as_json else console.print_report("Verified", report)


@app.command()
def forget(
    patient: Annotated[list[str] | None, typer.Option(help="A Patient ID. Repeatable.")] = None,
    study: Annotated[list[str] | None, typer.Option(help="A Study Instance UID. Repeatable.")] = None,
    series: Annotated[list[str] | None, typer.Option(help="A Series Instance UID. Repeatable.")] = None,
    image: Annotated[list[str] | None, typer.Option(help="A SOP Instance UID. Repeatable.")] = None,
    pseudonym: Annotated[list[str] | None, typer.Option(help="kind:pseudonym, as patient:9f3a… Repeatable.")] = None,
    file: Annotated[str | None, typer.Option("--list", help="CSV with kind,identifier.")] = None,
    now: Annotated[bool, typer.Option("--now", help="Remove superseded files at once; readers of them fail.")] = False,
    purge: Annotated[bool, typer.Option("--purge", help="Remove files superseded for a week, as every night.")] = False,
    config: ConfigFile = None,
    overrides: Overrides = None,
    lake: LakeUri = None,
    as_json: AsJson = False,
) -> None:
    """Erase patients, studies, series or images everywhere; ingest keeps nothing of them from then on."""
    settings = _settings(config, overrides, {"lake.uri": lake})
    from cbmir_spark.maintenance import forget as maintenance_forget

    given = {
        "patient": patient,
        "study": study,
        "series": series,
        "image": image,
        maintenance_forget.PSEUDONYM: pseudonym,
    }
    requests = [maintenance_forget.Request(kind, value) for kind, values in given.items() for value in values or ()]
    requests += maintenance_forget.read_list(file, ObjectStore(settings.storage)) if file is not None else ()
    if now:
        console.err.print("Superseded files go at once: readers of older versions of the tables will fail.")
    with _session(settings, "forget") as spark:
        report = maintenance_forget.run(spark, settings, requests, now=now, purge=purge)
    if as_json:
        return console.print_json(report)
    counts = {"asked": report.asked, "of no image here": report.unknown, "images": report.images}
    gone = {f"{name}, {what}": count for name, each in report.places.items() for what, count in asdict(each).items()}
    console.print_counts("Forgotten", counts | {name: count for name, count in gone.items() if count})
    return None


@app.command("config")
def show_config(
    config: ConfigFile = None,
    overrides: Overrides = None,
    lake: LakeUri = None,
    as_json: AsJson = False,
) -> None:
    """Print the effective settings, secrets masked."""
    values = _settings(config, overrides, {"lake.uri": lake}).masked()
    if as_json:
        return console.print_json(values)
    sys.stdout.write(yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
    return None


@app.command()
def doctor(
    config: ConfigFile = None,
    overrides: Overrides = None,
    lake: LakeUri = None,
    as_json: AsJson = False,
) -> None:
    """Look for what this machine and these settings lack."""
    settings = _settings(config, overrides, {"lake.uri": lake})
    from cbmir_spark.cli import doctor as cli_doctor

    checks = cli_doctor.run(settings)
    if as_json:
        console.print_json({"checks": [asdict(check) for check in checks]})
    else:
        console.print_checks(checks)
    if not all(check.ok for check in checks):
        raise typer.Exit(1)


@app.command()
def version() -> None:
    """Print the version."""
    sys.stdout.write(f"cbmir_spark {__version__}\n")


def main(job: str | None = None) -> None:
    """The console script, and with `job` a spark-submit entry point that takes the same flags."""
    if not sys.warnoptions:
        # Of libraries that we pin and cannot mend; the tests turn every one of them into an error.
        warnings.simplefilter("ignore")
        os.environ.setdefault("PYTHONWARNINGS", "ignore")
    arguments = sys.argv[1:] if job is None else [job, *sys.argv[1:]]
    try:
        app(args=arguments, prog_name="cbmir")
    except CbmirError as error:
        if config.debugging():
            traceback.print_exc()
        console.err.print(f"[bold red]cbmir:[/] {console.plain(str(error))}", soft_wrap=True, highlight=False)
        raise SystemExit(error.exit_code) from None


def _settings(file: Path | None, overrides: list[str] | None, flags: Mapping[str, object]) -> config.Settings:
    given = [f"{key}={value}" for key, value in flags.items() if value is not None]
    return config.load(file, [*(overrides or []), *given])


def _variants(file: Path) -> list[list[str]]:
    """The overrides of each training of a sweep. Raises ConfigError where the file is no list of settings."""
    try:
        listed = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"sweep {file}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise ConfigError(f"sweep {file} is not YAML") from None
    if not isinstance(listed, list) or not listed or not all(isinstance(each, dict) and each for each in listed):
        raise ConfigError(
            f"sweep {file}: give a list, for each training the settings that differ, such as "
            "`- training.learning_rate: 0.001`"
        )
    return [[f"{key}={json.dumps(value)}" for key, value in each.items()] for each in listed]


@contextmanager
def _session(settings: config.Settings, job: str) -> Iterator["SparkSession"]:
    """Java and pyspark are only looked for by the jobs that need them: `config` and `doctor` work without."""
    from cbmir_spark.spark import failures, session

    spark = session.build(settings, job)
    try:
        with failures.translate_errors(spark, job):
            yield spark
    finally:
        # Where its Java is gone there is nothing left to stop.
        with suppress(ConnectionError):
            spark.stop()
