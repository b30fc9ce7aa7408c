"""`python -m tests.benchmarks.cost`: draws what `tests.benchmarks.retrieval --alone` has measured, as cost.svg."""

import json
import re

import matplotlib as mpl
from matplotlib.figure import Figure

from tests.benchmarks.common import HERE, tell

_NAME = re.compile(r"retrieval alone, (\d+) features vectors")


def main() -> None:
    results = json.loads((HERE / "results.json").read_text())
    found = {int(name[1]): each for key, each in results.items() if (name := _NAME.fullmatch(key))}
    sizes = sorted(found)
    numbers = sorted({int(number) for each in found.values() for number in each["by number of queries"]})
    figure = Figure(figsize=(7.2, 3.4), layout="constrained")
    by_size, by_number = figure.subplots(1, 2, sharey=True)
    for number in numbers:
        told = [(size, found[size]["by number of queries"].get(str(number))) for size in sizes]
        points = [(size, cost["seconds"]) for size, cost in told if cost]
        by_size.plot(*zip(*points, strict=True), marker="o", label=f"{number:,} queries")
    for size in sizes:
        costs = found[size]["by number of queries"]
        points = [(number, costs[str(number)]["seconds"]) for number in numbers if str(number) in costs]
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
    tell(f"drawn from {len(found)} sizes, each measured on: {sorted({each['machine'] for each in found.values()})}")


if __name__ == "__main__":
    main()
