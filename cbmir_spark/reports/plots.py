"""Figures as PNG."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray


def confusion_figure(counts: NDArray[np.int64], classes: Sequence[str]) -> bytes:
    """The confusion matrix as a PNG: shares of each true class, counts written in."""
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
    return _png(figure)


def class_figure(rows: Mapping[str, Mapping[str, float | None]], images: Mapping[str, int]) -> bytes:
    """Bars of each class as a PNG: `rows` gives for each series its figure by class, in 0…1."""
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
    return _png(figure)


def _png(figure: Figure) -> bytes:
    stream = io.BytesIO()
    # No software version in the file: the same figures give the same bytes.
    figure.savefig(stream, format="png", dpi=130, metadata={"Software": None})
    return stream.getvalue()


def small_confusion_figure(confusion: NDArray[np.int64], classes: Sequence[str]) -> Any:
    # The object interface: pyplot would look for a display and keep every figure alive.
    from matplotlib.figure import Figure

    side = max(4.0, 0.35 * len(classes) + 2.0)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    rows = confusion.sum(axis=1, keepdims=True)
    shares = np.divide(confusion, rows, out=np.zeros(confusion.shape), where=rows > 0)
    axes.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.0)
    axes.set_xticks(range(len(classes)), classes, rotation=90, fontsize=7)
    axes.set_yticks(range(len(classes)), classes, fontsize=7)
    for row, column in zip(*np.nonzero(confusion), strict=True):
        colour = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, confusion[row, column], ha="center", va="center", fontsize=6, color=colour)
    axes.set(xlabel="predicted", ylabel="true", title="Test patients")
    return figure
