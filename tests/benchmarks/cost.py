"""`python -m tests.benchmarks.cost`: draws what `tests.benchmarks.retrieval --alone` has measured, as cost.svg."""

import json
import re

import matplotlib as mpl
from matplotlib.figure import Figure

from tests.benchmarks.common import HERE, tell

_NAME = re.compile(r"retrieval alone, (\d+) features vectors")
_QUERIES = re.compile(r"(\d+) queries")


def main() -> None:
    results = json.loads((HERE / "results.json").read_text())
    kept = {int(name[1]): each for key, each in results.items() if (name := _NAME.fullmatch(key))}
    found = {
        size: {int(asked[1]): each[key]["median"]["bounds"] for key in each if (asked := _QUERIES.fullmatch(key))}
        for size, each in kept.items()
    }
    sizes = sorted(found)
    numbers = sorted({number for of_size in found.values() for number in of_size})
    figure = Figure(figsize=(7.2, 3.4), layout="constrained")
    by_size, by_number = figure.subplots(1, 2, sharey=True)
    for number in numbers:
        points = [(size, found[size][number]) for size in sizes if number in found[size]]
        by_size.plot(*zip(*points, strict=True), marker="o", label=f"{number:,} queries")
    for size in sizes:
        points = sorted(found[size].items())
        by_number.plot(*zip(*points, strict=True), marker="o", label=f"{size:,} vectors")
    for axes, label in ((by_size, "vectors searched"), (by_number, "queries")):
        axes.set(xscale="log", yscale="log", xlabel=label)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small", frameon=False)
    by_size.set_xticks(sizes, [f"{size:,}" for size in sizes])
    by_size.set_xticks([], minor=True)
    by_size.set_ylabel("seconds")
    # The same measurements give the same file.
    with mpl.rc_context({"svg.hashsalt": "cost"}):
        figure.savefig(HERE / "cost.svg", metadata={"Date": None})
    tell(f"drawn from {len(found)} sizes, each measured on: {sorted({each['machine'] for each in kept.values()})}")


if __name__ == "__main__":
    main()
