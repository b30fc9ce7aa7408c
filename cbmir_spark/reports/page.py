"""Render HTML pages from templates: autoescaped, self-contained, without scripts."""

import base64
import unicodedata
from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup


def render_evaluation(evaluation: Mapping[str, Any], figures: Mapping[str, bytes]) -> str:
    """Render an evaluation, with the keys of evaluation.json, as one HTML document; `figures` are PNG by caption."""
    pictures = {caption: data_uri(content) for caption, content in figures.items()}
    return render_page("evaluation", title="Evaluation", e=evaluation, figures=pictures)


def visible(text: str) -> str:
    """Spell out every control, format and bidirectional character, as in ⟨U+202E⟩."""
    return "".join(f"⟨U+{ord(c):04X}⟩" if unicodedata.category(c) in _INVISIBLE else c for c in text)


# Controls, formats (bidi among them), surrogates, private use, unassigned, line and paragraph separators.
_INVISIBLE = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})


def data_uri(png: bytes) -> str:
    """Encode a PNG file as a data: URI."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _age(years: float | None) -> str:
    """Format an age in years, below two years in months or days."""
    if years is None:
        return ""
    if years >= 2:
        return f"{years:.0f} y"
    return f"{years * 12:.0f} mo" if years * 12 >= 2 else f"{years * 365.25:.0f} d"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _safe(value: Any) -> Any:
    """Make the value of an expression safe to print: no invisible characters, and nothing for None."""
    if isinstance(value, Markup):
        return value
    return "" if value is None else visible(str(value))


def render_page(template: str, **values: object) -> str:
    """Render a template of this package as one HTML document; every value is escaped."""
    environment = Environment(
        loader=PackageLoader("cbmir_spark.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_safe,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "age": _age,
        "percent": _percent,
        "figure": _figure,
        "count": lambda number: f"{number:,.0f}",
        "distance": lambda number: f"{number:.4g}",
    }
    return environment.get_template(f"{template}.html").render(**values)
