"""What a person sees at the terminal: progress, counts, and the tables that a job ends in."""

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from cbmir_spark.cli.doctor import Check

if TYPE_CHECKING:
    from cbmir_spark.cli import demo
    from cbmir_spark.cli.doctor import Check
    from cbmir_spark.evaluation import job as evaluation_job
    from cbmir_spark.maintenance import remap
    from cbmir_spark.models.registry import Run
    from cbmir_spark.training import job as training_job


out = Console()
err = Console(stderr=True)

Move = Callable[[int, int, Mapping[str, Any]], None]


@contextmanager
def progress(what: str, quiet: bool, every: float = 0.0) -> Iterator[Move]:
    """A bar on a terminal, a line now and then in a log, nothing beside JSON; both with the time that is left.

    Lines come no closer together than `every` seconds, but for the last.
    """
    began = time.monotonic()
    if quiet or not err.is_terminal:
        told = -every

        def line(done: int, total: int, figures: Mapping[str, Any]) -> None:
            nonlocal told
            passed = time.monotonic() - began
            if quiet or (passed - told < every and done < total):
                return
            told = passed
            left = f", {duration(passed / done * (total - done))} left" if 0 < done < total else ""
            err.print(f"{done} of {total} {what}{left}: {detail(figures)}", soft_wrap=True, highlight=False)

        yield line
        return
    columns = (SpinnerColumn(), TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    rest = (TimeRemainingColumn(), TextColumn("{task.fields[detail]}"))
    with Progress(*columns, *rest, console=err, transient=True) as bar:
        task = bar.add_task(what, total=None, detail="")

        def move(done: int, total: int, figures: Mapping[str, Any]) -> None:
            bar.update(task, completed=done, total=total, detail=detail(figures))

        yield move


@contextmanager
def steps(names: Iterable[str], quiet: bool) -> Iterator[Callable[[str, int, int, Mapping[str, Any]], None]]:
    """Progress of a job of several steps, each with a bar of its own."""
    if quiet or not err.is_terminal:

        def line(step: str, done: int, total: int, figures: Mapping[str, Any]) -> None:
            if not quiet:
                of = f" {done} of {total}" if total else ""
                err.print(f"{step}{of} {detail(figures)}".rstrip(), soft_wrap=True, highlight=False)

        yield line
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[detail]}"), console=err, transient=True) as bar:
        tasks = {name: bar.add_task(name, total=None, detail="", start=False) for name in names}
        order = list(tasks)

        def move(step: str, done: int, total: int, figures: Mapping[str, Any]) -> None:
            for earlier in order[: order.index(step)]:
                bar.update(tasks[earlier], total=1, completed=1)
            bar.start_task(tasks[step])
            bar.update(tasks[step], completed=done, total=total or None, detail=detail(figures))

        yield move


def duration(seconds: float) -> str:
    """`40 s`, `12 min`, `3 h 5 min`: as exactly as such a guess deserves."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def detail(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())


_FIGURES_OF_RUNS = ("epochs", "loss", "test recall", "mAP", "images/s")


def print_json(report: Any) -> None:
    values = asdict(report) if is_dataclass(report) and not isinstance(report, type) else report
    sys.stdout.write(json.dumps(values, default=str) + "\n")


def print_counts(title: str, counts: Mapping[str, int]) -> None:
    table = Table(title=plain(title), title_justify="left", show_header=False)
    table.add_column("what")
    table.add_column("count", justify="right")
    for name, count in counts.items():
        table.add_row(name, f"{count:,}")
    out.print(table)


def print_report(title: str, report: Any) -> None:
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column("what")
    table.add_column("value", overflow="fold")
    for name, value in asdict(report).items():
        if value is None or value == {} or value == []:
            continue
        table.add_row(name.replace("_", " "), plain(_value(value)))
    out.print(table)


def print_training(title: str, report: "training_job.TrainingReport") -> None:
    """What was learned from, how well, and what became of the model."""
    held = {name: images for name, images in report.images.items() if images}
    last = report.history.epochs[report.history.best_epoch - 1]
    rows = {
        "model": f"{report.model_id}, {report.model_uri}",
        "candidate": f"{'yes' if report.promotion.taken else 'no'}: {report.promotion.reason}",
        "data": "; ".join(f"{name} {n:,} images of {report.patients[name]:,} patients" for name, n in held.items()),
        "left out": ", ".join(f"{label} ({n})" for label, n in report.left_out.items()),
        "one patient": ", ".join(report.single_patient_classes),
        "epochs": f"{len(report.history.epochs)}, the best is {report.history.best_epoch}: loss {last.loss:.4g}, "
        f"accuracy {last.accuracy:.3f}",
        "speed": f"{last.images_per_second:.0f} images/s, {100 * last.waiting:.0f} % of the time waiting for data",
    }
    if report.history.resumed is not None:
        rows["resumed"] = f"at step {report.history.resumed}"
    if report.ranking is not None:
        rows["validation"] = (
            f"mAP {report.ranking.mean_average_precision:.3f} (macro "
            f"{report.ranking.macro_mean_average_precision:.3f}), P@10 {report.ranking.precision:.3f} (macro "
            f"{report.ranking.macro_precision:.3f})"
        )
    if report.test is not None:
        rows["test"] = f"accuracy {report.test.accuracy:.3f}, macro recall {report.test.macro_recall:.3f}"
    rows["seconds"] = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in report.seconds.items())
    rows["MLflow"] = f"run {report.run_id} at {report.tracking_uri}"
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column("what")
    table.add_column("value", overflow="fold")
    for name, value in rows.items():
        if value:
            table.add_row(name, plain(value))
    out.print(table)
    if report.test is not None:
        macro = (report.test.macro_precision, report.test.macro_recall, report.test.macro_f1)
        _print_classes("Test patients, class by class", report.test.by_class, macro)


def _print_classes(
    title: str, by_class: Mapping[str, Mapping[str, float]], macro: tuple[float | None, float | None, float | None]
) -> None:
    classes = Table(title=title, title_justify="left")
    for heading in ("class", "images", "precision", "recall", "F1"):
        classes.add_column(heading, justify="left" if heading == "class" else "right")
    for name, values in by_class.items():
        figures = [_share(values.get(key)) if values.get("images") else "–" for key in ("precision", "recall", "f1")]
        classes.add_row(plain(name), f"{values.get('images', 0):,.0f}", *figures)
    classes.add_section()
    classes.add_row("macro", "", *(_share(value) for value in macro))
    out.print(classes)


def print_runs(runs: "list[Run]") -> None:
    """One row for each run, newest first."""
    table = Table(title="Training runs", title_justify="left")
    for heading in (
        "run",
        "started",
        "preset",
        "epochs",
        "snapshot",
        "loss",
        "test recall",
        "mAP",
        "images/s",
        "model",
    ):
        table.add_column(heading, justify="right" if heading in _FIGURES_OF_RUNS else "left", overflow="fold")
    for run in runs:
        figures = [
            f"{run.metrics[name]:.4g}" if name in run.metrics else "–"
            for name in ("train_loss", "test_macro_recall", "validation_map", "images_per_second")
        ]
        model = run.status.lower() if run.version is None else f"{run.version} {' '.join(run.aliases)}".strip()
        preset, snapshot, epochs = (run.parameters.get(name, "–") for name in ("preset", "snapshot", "epochs"))
        table.add_row(run.run_id[:8], run.started[:16], plain(preset), snapshot[:8], plain(epochs), *figures, model)
    out.print(table)


def print_gaps(gaps: "remap.Gaps") -> None:
    """Codes without a term as YAML that a settings file takes, with the counts of images beside them."""
    lines = [
        f"# {gaps.images} images by {gaps.vocabulary}. Write the term that is meant in place of UNKNOWN; what stays"
    ]
    lines += ["# UNKNOWN is not listed again. Then run `cbmir remap`.", "vocabulary:"]
    lines.append("  body_parts:" if gaps.body_parts else "  body_parts: {}")
    for part in gaps.body_parts:
        counts = ", ".join(f"{modality} {images}" for modality, images in part.modalities.items())
        lines.append(f"    {json.dumps(part.raw) + ': UNKNOWN':<30} # {counts}")
    if gaps.modalities:
        lines.append("# Modality has no settings of its own; without a term are:")
        lines += [f"#   {json.dumps(modality.raw)}: {modality.images}" for modality in gaps.modalities]
    sys.stdout.write("\n".join(lines) + "\n")


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return detail(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(_value(item) for item in value)
    return str(value)


def plain(text: str) -> str:
    """Text that may come from outside, with rich's markup and control characters taken out of effect."""
    return "".join(c if c.isprintable() or c == "\n" else "�" for c in text).replace("[", "\\[")


def print_checks(checks: list["Check"]) -> None:
    """What the doctor found."""
    table = Table(title="cbmir doctor", title_justify="left")
    for heading in ("", "looked at", "found"):
        table.add_column(heading, overflow="fold")
    for check in checks:
        table.add_row("[green]ok[/]" if check.ok else "[red]mend[/]", check.name, plain(check.found))
    out.print(table)


def print_evaluation(report: "evaluation_job.Report") -> None:
    """Per-class precision and recall, then retrieval and its search space for each prefilter."""
    title = f"Test patients, class by class ({report.queries:,} queries)"
    _print_classes(title, report.by_class, (report.macro_precision, report.macro_recall, report.macro_f1))
    modes = Table(title="Retrieval, by prefilter", title_justify="left")
    columns = list(dict.fromkeys(key for values in report.retrieval.values() for key in values))
    modes.add_column("")
    for prefilter in report.retrieval:
        modes.add_column(prefilter, justify="right")
    for column in columns:
        figures = [_figure(mode.get(column)) for mode in report.retrieval.values()]
        modes.add_row(column.replace("_", " "), *figures)
    modes.add_row("circular?", *(plain(report.circular.get(prefilter) or "no") for prefilter in report.retrieval))
    out.print(modes)


def print_story(story: "demo.Story") -> None:
    """The demo, step by step, and where to look next."""
    table = Table(title="What happened (the archive is synthetic; its broken files are meant)", title_justify="left")
    for heading in ("step", "seconds", "what came of it"):
        table.add_column(heading, justify="right" if heading == "seconds" else "left", overflow="fold")
    read, index, answers = story.ingest, story.index, story.retrieval
    told = {
        "archive": f"{story.archive.files} files, {story.archive.phantoms} of them phantoms of "
        f"{len(story.archive.classes)} classes" + ("" if story.archive.created else " (was there already)"),
        "ingest": f"{read.read} read ({detail(read.outcomes)}), {read.unchanged} unchanged"
        if read.read
        else f"nothing new: {read.unchanged} unchanged",
        "train": f"{story.training.model_id}, {story.training.classes} classes",
        "index": f"{index.embedded} frames embedded, {index.rows} vectors in {index.partitions} partitions",
        "retrieve": f"{answers.queries} queries: {answers.answered} answered, {answers.empty} empty, "
        f"{answers.failed} failed; {answers.partitions_searched} of {answers.partitions} partitions searched",
        "evaluate": f"accuracy {_share(story.evaluation.accuracy)} on {story.evaluation.patients} unseen patients",
    }
    for step, seconds in story.seconds.items():
        table.add_row(step, f"{seconds:.1f}", plain(told[step]))
    out.print(table)
    if read.reasons:
        print_counts("Why objects were left out", dict(sorted(read.reasons.items())))
    print_evaluation(story.evaluation)
    for name, place in (
        ("Gallery", story.gallery),
        ("Evaluation", story.evaluation.page),
        ("MLflow", story.mlflow_command),
    ):
        if place:
            out.print(f"{name + ':':<12}{plain(place.removeprefix('file://'))}", soft_wrap=True, highlight=False)


def _share(value: float | None) -> str:
    return "–" if value is None or value != value else f"{value:.3f}"


def _figure(value: float | None) -> str:
    if value is None or value != value:
        return "–"
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) > 1 else f"{value:.3f}"
