"""The commands around the daily path: results, upkeep of a lake, and setup of a machine."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from cbmir_spark.cli import console, views
from cbmir_spark.cli.command import ANSWERS, SETUP, UPKEEP, Call, flag, register

# Exit status where no image is of what was to be forgotten.
NOTHING_FORGOTTEN = 4

app = typer.Typer()

Repeatable = list[str] | None


@register(app, ANSWERS)
def runs(
    call: Call, limit: Annotated[int, typer.Option(min=1, help="How many of the newest runs to list.")] = 20
) -> None:
    """Compare training runs: what differs in their settings, their figures, and which model is in use."""
    with call.lake() as lake:
        found = lake.training_runs(limit)
    call.show(found, views.runs)


@register(app, ANSWERS)
def features(
    call: Call,
    files: Annotated[bool, typer.Option("--files", help="List the live Parquet files, one URI per line.")] = False,
    model: Annotated[str | None, flag("retrieval.model")] = None,
) -> None:
    """Locate a model's vectors: any Parquet reader can open the files."""
    with call.lake() as lake:
        table, uris = lake.feature_files()
    if call.as_json:
        return console.print_json({"table": table, "files": uris})
    for line in uris if files else [table, f"{len(uris)} live files; --files lists them"]:
        sys.stdout.write(line + "\n")
    return None


@register(app, UPKEEP)
def verify(call: Call, model: Annotated[str | None, flag("retrieval.model")] = None) -> None:
    """Compare the whole index with the published frames, and check every vector."""
    with call.lake() as lake:
        report = lake.verify()
    call.show(report, lambda each: views.report("Verified", each))


@register(app, UPKEEP)
def remap(call: Call) -> None:
    """Apply a changed vocabulary to TAGS and FEATURES; reads no archive and embeds nothing."""
    with call.lake() as lake:
        report = lake.remap()
    call.show(report, views.remapped)


@register(app, UPKEEP)
def upgrade(
    call: Call,
    apply: Annotated[bool, typer.Option("--apply", help="Mark the objects; the next ingest reads them again.")] = False,
    skip: Annotated[Repeatable, typer.Option(help="A change that concerns no object here; repeatable.")] = None,
) -> None:
    """Show what this version reads in another way than the one that made the lake; with --apply, mark it."""
    with call.lake() as lake:
        report = lake.upgrade(apply=apply, skip=skip or ())
    call.show(report, views.upgraded)


@register(app, UPKEEP)
def vocabulary(
    call: Call,
    unmapped: Annotated[
        bool, typer.Option("--unmapped", help="Only the lake's codes without a term, to paste into a settings file.")
    ] = False,
) -> None:
    """Print the known modalities and body parts, or the lake's codes that are not among them."""
    if unmapped:
        with call.lake() as lake:
            gaps = lake.unmapped()
        return call.show(gaps, views.gaps)
    from cbmir_spark.dicom.vocabulary import Vocabulary
    from cbmir_spark.dicom.vocabulary_tables import BODY_PARTS, MODALITIES

    terms = {
        "version": Vocabulary(call.settings.vocabulary.body_parts).version,
        "modalities": sorted(MODALITIES),
        "body_parts": sorted(BODY_PARTS),
    }
    return call.show(terms, lambda each: _print_yaml(each, width=110, default_flow_style=None))


@register(app, UPKEEP)
def forget(
    call: Call,
    patient: Annotated[
        Repeatable, typer.Option(help="A whole Patient ID, without issuer unless --issuer; repeatable.")
    ] = None,
    issuer: Annotated[
        str | None, typer.Option(help="The Issuer of Patient ID of these patients, where their images name one.")
    ] = None,
    study: Annotated[Repeatable, typer.Option(help="A Study Instance UID; repeatable.")] = None,
    series: Annotated[Repeatable, typer.Option(help="A Series Instance UID; repeatable.")] = None,
    image: Annotated[Repeatable, typer.Option(help="A SOP Instance UID; repeatable.")] = None,
    pseudonym: Annotated[Repeatable, typer.Option(help="kind:pseudonym, as patient:9f3a…; repeatable.")] = None,
    file: Annotated[str | None, typer.Option("--list", help="CSV with columns kind, identifier[, issuer].")] = None,
    now: Annotated[bool, typer.Option("--now", help="Remove superseded files at once; running readers fail.")] = False,
    purge: Annotated[bool, typer.Option("--purge", help="Remove files that were superseded a week ago.")] = False,
) -> None:
    """Erase patients, studies, series or images everywhere; later ingests skip them."""
    if now:
        console.err.print("Superseded files are removed at once: running readers of older table versions will fail.")
    with call.lake() as lake:
        report = lake.forget(
            patients=patient or (),
            issuer=issuer,
            studies=study or (),
            series=series or (),
            images=image or (),
            pseudonyms=pseudonym or (),
            listed_in=file,
            now=now,
            purge=purge,
        )
    call.show(report, views.forgotten)
    if report.matched_nothing:
        console.err.print(
            "There is no image of what was asked, so nothing was erased; ingest will store nothing of it. Check the "
            "identifiers: they are compared as a whole, and patients together with their issuer (--issuer)."
        )
        raise typer.Exit(NOTHING_FORGOTTEN)


@register(app, SETUP, name="config")
def show_config(call: Call) -> None:
    """Print the effective settings, secrets masked."""
    call.show(call.settings.masked(), lambda values: _print_yaml(values, allow_unicode=True))


@register(app, SETUP)
def doctor(call: Call) -> None:
    """Check what this machine and these settings lack."""
    from cbmir_spark.cli import doctor as checks

    found = checks.run(call.settings)
    call.show({"checks": [asdict(each) for each in found]}, lambda _: views.checks(found))
    if not all(each.ok for each in found):
        raise typer.Exit(1)


@register(app, SETUP, with_lake=False)
def wrap(
    call: Call,
    images: Annotated[Path, typer.Option(help="Folder of the pictures.")],
    labels: Annotated[
        Path,
        typer.Option(help="CSV with columns file, modality, body_part, group, source_id, dataset and licence."),
    ],
    archive: Annotated[Path, typer.Option(help="Folder to write the .dcm files to.")],
) -> None:
    """Wrap labelled PNG or JPEG pictures as DICOM Secondary Capture: real pixels, label-derived tags."""
    from cbmir_spark.synthetic import wrap as wrapping

    report = wrapping.wrap_pictures(labels, images, archive)
    call.show(report, lambda each: views.report("Wrapped", each))


def _print_yaml(values: object, **layout: Any) -> None:
    sys.stdout.write(yaml.safe_dump(values, sort_keys=False, **layout))
