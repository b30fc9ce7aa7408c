"""Draw the packages of cbmir_spark from their imports into docs/architecture.md, between its two markers.

Exits with status 1 if the picture was stale, as hooks of pre-commit do; the file is correct afterwards.
"""

import ast
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- packages: drawn by docs/draw_packages.py -->\n", "<!-- end of packages -->\n"

Graph = Mapping[str, frozenset[str]]
"""The packages, and modules outside any, that each one imports."""


def imports(source: Path) -> Graph:
    """Read every import below `source`, the folder of cbmir_spark, those inside functions and for types too."""
    known = {path.stem for path in source.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    known -= {"__init__", "__main__"}
    found: dict[str, set[str]] = {name: set() for name in known}
    for path in sorted(source.rglob("*.py")):
        name = path.relative_to(source).with_suffix("").parts[0]
        if name in known:
            found[name] |= {target for target in _targets(path) if target in known} - {name}
    return {name: frozenset(targets) for name, targets in found.items()}


def _targets(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        yield from (name.split(".")[1] for name in names if name.startswith("cbmir_spark."))


def reachable(graph: Graph, start: str) -> frozenset[str]:
    """What `start` imports, by itself or through others."""
    seen: set[str] = set()
    waiting = list(graph[start])
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += graph[name]
    return frozenset(seen)


def reduced(graph: Graph) -> Graph:
    """Leave out the imports that follow from others: a picture with all of them shows nothing."""
    return {
        name: frozenset(t for t in targets if not any(t in reachable(graph, other) for other in targets - {t}))
        for name, targets in graph.items()
    }


def picture(graph: Graph) -> str:
    """The graph as a Mermaid flowchart, importers above what they import."""
    lines = ["```mermaid", "flowchart TD"]
    lines += [f"  {name}" for name, targets in sorted(graph.items()) if not targets]
    lines += [
        f"  {name} --> {target}" for name, targets in sorted(reduced(graph).items()) for target in sorted(targets)
    ]
    return "\n".join([*lines, "```", ""])


def main(repo: Path) -> int:
    page = repo / "docs" / "architecture.md"
    before, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    drawn, end, after = rest.partition(END)
    if not begin or not end:
        sys.stderr.write(f"{page.name} lacks the lines {BEGIN}and {END}")
        return 1
    now = picture(imports(repo / "cbmir_spark"))
    if drawn == now:
        return 0
    page.write_text(before + begin + now + end + after, encoding="utf-8")
    sys.stderr.write(f"{page.name}: packages drawn again; commit it\n")
    return 1


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else REPO))
