"""What a person sees of a result: one function per report, printed to stdout."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.table import Table

from cbmir_spark.cli import console
from cbmir_spark.lake.reasons import EXPLANATIONS

if TYPE_CHECKING:
    from cbmir_spark.cli.demo import Story
    from cbmir_spark.cli.doctor import Check
    from cbmir_spark.evaluation.job import Report as EvaluationReport
    from cbmir_spark.ingest.job import Report as IngestReport
    from cbmir_spark.maintenance.forget import Report as ForgetReport
    from cbmir_spark.maintenance.remap import Gaps
    from cbmir_spark.maintenance.remap import Report as RemapReport
    from cbmir_spark.maintenance.upgrade import Report as UpgradeReport
    from cbmir_spark.models.registry import Run
    from cbmir_spark.training.job import TrainingReport


def counts(title: str, rows: Mapping[str, int]) -> None:
    """Print counts by name."""
    table = Table(title=console.plain(title), title_justify="left", show_header=False)
    table.add_column("what")
    table.add_column("count", justify="right")
    for name, count in rows.items():
        table.add_row(name, f"{count:,}")
    console.out.print(table)


def report(title: str, result: Any) -> None:
    """Print the fields of a report, without empty ones."""
    filled = {name: value for name, value in asdict(result).items() if value is not None and value not in ({}, [], ())}
    _rows(title, {name.replace("_", " "): _value(value) for name, value in filled.items()})


def _rows(title: str, rows: Mapping[str, str]) -> None:
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column("what")
    table.add_column("value", overflow="fold")
    for name, value in rows.items():
        if value:
            table.add_row(name, console.plain(value))
    console.out.print(table)


def ingested(result: "IngestReport", sources: str) -> None:
    """Print what became of the listed objects, why some were left out, and where `sources`, the table, names them."""
    rows = {"listed": result.listed, "unchanged": result.unchanged, "deferred": result.deferred}
    counts(f"Ingested {result.archive}", rows | {**result.outcomes, "deleted": result.deleted})
    if result.reasons:
        _reasons(result.reasons)
        place = console.plain(sources.removeprefix("file://"))
        console.out.print("SOURCES names them in its columns uri and reason. It is the Delta table", highlight=False)
        console.out.print(place, soft_wrap=True, highlight=False)
        console.out.print("Rejected objects are read again once they are written again.", highlight=False)


def _reasons(found: Mapping[str, int]) -> None:
    """Print the reasons that occurred, with what each means and what to do about it."""
    table = Table(title="Reasons", title_justify="left", show_lines=True)
    table.add_column("reason", no_wrap=True)
    table.add_column("objects", justify="right", no_wrap=True)
    table.add_column("what it means, and what to do")
    for reason, count in sorted(found.items()):
        said = EXPLANATIONS.get(reason)
        table.add_row(reason, f"{count:,}", console.plain(f"{said.meaning}\n{said.action}") if said else "")
    console.out.print(table)


def remapped(result: "RemapReport") -> None:
    """Print what a new vocabulary changed."""
    report("Remapped", result)
    if result.reread:
        console.out.print(f"{result.reread} images need another window: run `cbmir ingest`, then `cbmir index`")


def upgraded(result: "UpgradeReport") -> None:
    """Print which changes concern how many objects, and what to do next."""
    rows = {f"{each.name}: {each.what}": each.objects for each in result.changes}
    counts("Upgraded" if result.applied else "To upgrade", rows | {"objects in all": result.objects})
    version = f"cbmir_spark {result.written_by}" if result.written_by else "a version that did not record itself"
    console.out.print(f"the lake was last written by {version}")
    if result.patients is not result.patients_before:
        console.out.print(f"patients are identified by rule {result.patients_before}, then by {result.patients}")
    if result.marked:
        console.out.print(f"{result.marked} objects were marked before: run `cbmir ingest`")
    if result.is_current:
        console.out.print("this version reads nothing of the lake in another way: there is nothing to do")
    elif result.applied:
        console.out.print("run `cbmir ingest` to read the objects again, then `cbmir index`; models remain valid")
    else:
        console.out.print("nothing was changed: `cbmir upgrade --apply` marks the objects for the next ingest")


def forgotten(result: "ForgetReport") -> None:
    """Print what was erased where."""
    erased = {f"{name}, {what}": count for name, each in result.places.items() for what, count in asdict(each).items()}
    rows = {"requested": result.asked, "no matching image": result.unknown, "images": result.images}
    counts("Forgotten", rows | {name: count for name, count in erased.items() if count})


def trained(title: str, result: "TrainingReport") -> None:
    """Print the data of a training, its figures, and whether the model became candidate."""
    images = {name: count for name, count in result.images.items() if count}
    last = result.history.epochs[result.history.best_epoch - 1]
    rows = {
        "model": f"{result.model_id}, {result.model_uri}",
        "candidate": f"{'yes' if result.promotion.taken else 'no'}: {result.promotion.reason}",
        "data": "; ".join(f"{name} {n:,} images of {result.patients[name]:,} patients" for name, n in images.items()),
        "left out": ", ".join(f"{label} ({n})" for label, n in result.left_out.items()),
        "single patient": ", ".join(result.single_patient_classes),
        "epochs": f"{len(result.history.epochs)}, best {result.history.best_epoch}: loss {last.loss:.4g}, "
        f"accuracy {last.accuracy:.3f}",
        "speed": f"{last.images_per_second:.0f} images/s, {100 * last.waiting:.0f} % of the time waiting for data",
        "resumed": "" if result.history.resumed is None else f"at step {result.history.resumed}",
    }
    if result.ranking is not None:
        rows["validation"] = (
            f"mAP {result.ranking.mean_average_precision:.3f} (macro "
            f"{result.ranking.macro_mean_average_precision:.3f}), P@10 {result.ranking.precision:.3f} (macro "
            f"{result.ranking.macro_precision:.3f})"
        )
    if result.test is not None:
        rows["test"] = f"accuracy {result.test.accuracy:.3f}, macro recall {result.test.macro_recall:.3f}"
    rows["seconds"] = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in result.seconds.items())
    rows["MLflow"] = f"run {result.run_id} at {result.tracking_uri}"
    _rows(title, rows)
    if result.test is not None:
        macro = (result.test.macro_precision, result.test.macro_recall, result.test.macro_f1)
        _classes("Test patients, class by class", result.test.by_class, macro)


def swept(results: "list[TrainingReport]") -> None:
    """Print each training of a sweep."""
    for number, result in enumerate(results, 1):
        trained(f"Trained {number} of {len(results)}", result)


def _classes(
    title: str, by_class: Mapping[str, Mapping[str, float]], macro: tuple[float | None, float | None, float | None]
) -> None:
    classes = Table(title=title, title_justify="left")
    for heading in ("class", "images", "precision", "recall", "F1"):
        classes.add_column(heading, justify="left" if heading == "class" else "right")
    for name, values in by_class.items():
        figures = [_share(values.get(key)) if values.get("images") else "–" for key in ("precision", "recall", "f1")]
        classes.add_row(console.plain(name), f"{values.get('images', 0):,.0f}", *figures)
    classes.add_section()
    classes.add_row("macro", "", *(_share(value) for value in macro))
    console.out.print(classes)


def runs(found: "list[Run]") -> None:
    """Print one block per run, newest first: figures, model, and the settings that not all runs share."""
    differing = _differing([run.parameters for run in found])
    table = Table(title="Training runs", title_justify="left", show_lines=bool(differing))
    table.add_column("run", no_wrap=True)
    table.add_column("settings that differ" if differing else "preset", overflow="fold", ratio=1)
    for heading in ("loss", "recall", "mAP", "img/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("model", overflow="fold")
    for run in found:
        figures = [
            f"{run.metrics[name]:.3g}" if name in run.metrics else "–"
            for name in ("train_loss", "test_macro_recall", "validation_map", "images_per_second")
        ]
        model = run.status.lower() if run.version is None else f"{run.version} {' '.join(run.aliases)}".strip()
        shown = {name: run.parameters.get(name, "–") for name in differing} or {
            "preset": run.parameters.get("preset", "–")
        }
        settings = "\n".join(f"{name} {value}" if differing else value for name, value in shown.items())
        first = f"{run.run_id[:8]}\n{run.started[:10]}\n{run.started[11:16]}"
        table.add_row(first, console.plain(settings), *figures, model)
    console.out.print(table)


def _differing(parameters: Sequence[Mapping[str, str]]) -> list[str]:
    """Name the parameters that do not have one value in all runs, in the order of the first run that has them."""
    names = list(dict.fromkeys(name for each in parameters for name in each))
    return [name for name in names if len({each.get(name) for each in parameters}) > 1]


def gaps(found: "Gaps") -> None:
    """Print codes without a term as YAML for a settings file, with the counts of images beside them."""
    lines = [
        f"# {found.images} images by {found.vocabulary}. Replace UNKNOWN by a term (`cbmir vocabulary`); what stays"
    ]
    lines += ["# UNKNOWN is not listed again. Then run `cbmir remap`.", "vocabulary:"]
    lines.append("  body_parts:" if found.body_parts else "  body_parts: {}")
    for part in found.body_parts:
        counts = ", ".join(f"{modality} {images}" for modality, images in part.modalities.items())
        lines.append(f"    {json.dumps(part.raw) + ': UNKNOWN':<30} # {counts}")
    if found.modalities:
        lines.append("# Modalities cannot be mapped by settings; these have no term:")
        lines += [f"#   {json.dumps(modality.raw)}: {modality.images}" for modality in found.modalities]
    sys.stdout.write("\n".join(lines) + "\n")


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return console.detail(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(_value(item) for item in value)
    return str(value)


def checks(found: "list[Check]") -> None:
    """Print what the doctor found."""
    table = Table(title="cbmir doctor", title_justify="left")
    for heading in ("", "check", "result"):
        table.add_column(heading, overflow="fold")
    for check in found:
        table.add_row("[green]ok[/]" if check.ok else "[red]fix[/]", check.name, console.plain(check.found))
    console.out.print(table)


def evaluated(result: "EvaluationReport") -> None:
    """Print precision and recall by class, then retrieval and its search space by prefilter."""
    title = f"Test patients, class by class ({result.queries:,} queries)"
    _classes(title, result.by_class, (result.macro_precision, result.macro_recall, result.macro_f1))
    modes = Table(title="Retrieval, by prefilter", title_justify="left")
    columns = list(dict.fromkeys(key for values in result.retrieval.values() for key in values))
    modes.add_column("")
    for prefilter in result.retrieval:
        modes.add_column(prefilter, justify="right")
    for column in columns:
        figures = [_figure(mode.get(column)) for mode in result.retrieval.values()]
        modes.add_row(column.replace("_", " "), *figures)
    circular = (console.plain(result.circular.get(prefilter) or "no") for prefilter in result.retrieval)
    modes.add_row("circular?", *circular)
    console.out.print(modes)
    console.out.print(f"Report:  {console.plain(result.page.removeprefix('file://'))}", soft_wrap=True, highlight=False)


def story(played: "Story") -> None:
    """Print the demo step by step, and where to look next."""
    table = Table(title="The demo (a synthetic archive; its broken files are intentional)", title_justify="left")
    for heading in ("step", "seconds", "result"):
        table.add_column(heading, justify="right" if heading == "seconds" else "left", overflow="fold")
    read, index, answers = played.ingest, played.index, played.retrieval
    results = {
        "archive": f"{played.archive.files} files, {played.archive.phantoms} of them phantoms of "
        f"{len(played.archive.classes)} classes" + ("" if played.archive.created else " (was there already)"),
        "ingest": f"{read.read} read ({console.detail(read.outcomes)}), {read.unchanged} unchanged"
        if read.read
        else f"nothing new: {read.unchanged} unchanged",
        "train": f"{played.training.model_id}, {played.training.classes} classes",
        "index": f"{index.embedded} frames embedded, {index.rows} vectors in {index.partitions} partitions",
        "retrieve": f"{answers.queries} queries: {answers.answered} answered, {answers.empty} empty, "
        f"{answers.failed} failed; {answers.partitions_searched} of {answers.partitions} partitions searched",
        "evaluate": f"accuracy {_share(played.evaluation.accuracy)} on {played.evaluation.patients} unseen patients",
    }
    for step, seconds in played.seconds.items():
        table.add_row(step, f"{seconds:.1f}", console.plain(results[step]))
    console.out.print(table)
    if read.reasons:
        counts("Objects left out, by reason", dict(sorted(read.reasons.items())))
    evaluated(played.evaluation)
    for name, place in (("Gallery", played.gallery), ("MLflow", played.mlflow_command)):
        if place:
            line = f"{name + ':':<9}{console.plain(place.removeprefix('file://'))}"
            console.out.print(line, soft_wrap=True, highlight=False)


def _share(value: float | None) -> str:
    return "–" if value is None or value != value else f"{value:.3f}"


def _figure(value: float | None) -> str:
    if value is None or value != value:
        return "–"
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) > 1 else f"{value:.3f}"
