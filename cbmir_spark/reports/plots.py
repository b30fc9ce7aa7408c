"""Matplotlib figures, and their rendering as PNG."""

import io
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray


def confusion_figure(counts: NDArray[np.int64], classes: Sequence[str]) -> Figure:
    """Draw a (true, predicted) confusion matrix: shares of each true class as colours, and the counts."""
    side = max(4.6, 0.4 * len(classes) + 2.2)
    # The object interface: pyplot would look for a display and keep every figure alive.
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    rows = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, rows, out=np.zeros(counts.shape), where=rows > 0)
    axes.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.0)
    axes.set_xticks(range(len(classes)), classes, rotation=90, fontsize=8)
    axes.set_yticks(range(len(classes)), classes, fontsize=8)
    axes.set(xlabel="predicted", ylabel="true")
    axes.tick_params(length=0)
    for edge in axes.spines.values():
        edge.set_visible(False)
    for row, column in zip(*np.nonzero(counts), strict=True):
        colour = "white" if shares[row, column] > 0.55 else "#1b1d1f"
        axes.text(column, row, counts[row, column], ha="center", va="center", fontsize=7, color=colour)
    return figure


def precision_recall_figure(
    curves: Mapping[str, tuple[NDArray[np.float64], NDArray[np.float64]]], averages: Mapping[str, float]
) -> Figure:
    """Draw the (precision, recall) curve of each class, with its average precision."""
    columns = min(4, max(1, len(curves)))
    rows = -(-len(curves) // columns)
    figure = Figure(figsize=(3.0 * columns, 2.6 * max(rows, 1)), layout="constrained")
    for place, (name, (precision, recall)) in enumerate(curves.items(), 1):
        axes = figure.add_subplot(rows, columns, place)
        axes.step(np.append(0.0, recall), np.append(precision[0], precision), where="pre")
        axes.set(xlim=(0, 1.02), ylim=(0, 1.05))
        axes.set_title(f"{name}  {averages[name]:.3f}", fontsize=8)
        axes.tick_params(labelsize=7)
    figure.supxlabel("recall", fontsize=8)
    figure.supylabel("precision", fontsize=8)
    return figure


def class_figure(rows: Mapping[str, Mapping[str, float | None]], images: Mapping[str, int]) -> Figure:
    """Draw bars of each class: `rows` gives for each series its figure by class, in 0…1."""
    classes = list(images)
    # Okabe and Ito's colours, and a hatch for those who see none of them.
    styles = [("#0072b2", ""), ("#e69f00", "//"), ("#009e73", ".."), ("#cc79a7", "xx")]
    figure = Figure(figsize=(7.2, max(3.2, (0.16 * len(rows) + 0.18) * len(classes) + 1.3)), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / max(1, len(rows))
    places = np.arange(len(classes))
    for number, ((name, values), (colour, hatch)) in enumerate(zip(rows.items(), styles, strict=False)):
        widths = [values.get(label) or 0.0 for label in classes]
        offset = (number - (len(rows) - 1) / 2) * height
        axes.barh(places + offset, widths, height, color=colour, hatch=hatch, edgecolor="white", label=name)
    axes.set_yticks(places, [f"{label}  ({images[label]})" for label in classes], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.margins(y=0.01)
    axes.grid(axis="x", color="#dfe1e3", linewidth=0.7)
    axes.set_axisbelow(True)
    for edge in ("top", "right", "left"):
        axes.spines[edge].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=3, frameon=False, fontsize=8)
    return figure


def png(figure: Figure) -> bytes:
    """Render a figure; the same figure gives the same bytes."""
    stream = io.BytesIO()
    # Without the software's version, which would change the bytes.
    figure.savefig(stream, format="png", dpi=130, metadata={"Software": None})
    return stream.getvalue()
