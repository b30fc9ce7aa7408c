"""Word the problem with a setting as one line: its key, what it must be, what it is."""

import json
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from pydantic_core import ErrorDetails

# Settings of earlier versions, each with its present name.
RENAMED = {"index.most_files": "index.max_extra_files"}

# By pydantic's type of error; its context fills the braces.
_MUST = {
    "bool_type": "be true or false",
    "dict_type": "be a mapping of names to values",
    "finite_number": "be a finite number",
    "float_type": "be a number",
    "greater_than": "be above {gt:g}",
    "greater_than_equal": "be at least {ge:g}",
    "int_from_float": "be a whole number",
    "int_type": "be a whole number",
    "less_than": "be below {lt:g}",
    "less_than_equal": "be at most {le:g}",
    "list_type": "be a list",
    "string_too_short": "not be empty",
    "string_type": "be text",
    "too_short": "not be empty",
}
_LONGEST_VALUE = 60


def unknown_key(prefix: str, name: str, known: Iterable[str], elsewhere: Sequence[str] = ()) -> str:
    """Say that a key is unknown, or renamed, and which key may be meant.

    `prefix` is the section with its dot, or nothing for a section. `known` are the names that would fit there;
    `elsewhere` are the dotted settings of other sections that have this name.
    """
    dotted = prefix + name
    if dotted in RENAMED:
        return f"{dotted} is now called {RENAMED[dotted]}"
    names = list(known)
    meant = list(elsewhere) or [prefix + close for close in get_close_matches(name, names, n=1)]
    hint = f"did you mean {' or '.join(meant)}?" if meant else f"known keys: {', '.join(names)}"
    return f"unknown key {dotted}; {hint}"


def invalid_value(section: str, error: ErrorDetails, nullable: bool, secret: bool) -> str:
    """Say what is wrong with a value, from an error of pydantic; the value of a secret is left out."""
    kind, value = error["type"], error["input"]
    if error["loc"][-1] == "[key]":
        return f"{_dotted(section, error['loc'][:-2])}: the name {_shown(value)} must be text; put it in quotes"
    key = _dotted(section, error["loc"])
    if kind == "missing":
        return f"{key} has no value; conf/base.yaml must set it"
    must = _requirement(kind, error.get("ctx", {}))
    if must is None:
        return f"{key}: {error['msg'][:1].lower()}{error['msg'][1:]}"
    if nullable and kind.endswith("_type"):
        must += " or null"
    found = "" if secret or kind in ("string_too_short", "too_short") else f", not {_shown(value)}"
    advice = "; put it in quotes" if kind == "string_type" and isinstance(value, (int, float)) else ""
    return f"{key} must {must}{found}{advice}"


def _requirement(kind: str, context: Mapping[str, Any]) -> str | None:
    if kind == "literal_error":
        return "be " + str(context["expected"]).replace("'", "")
    if kind == "value_error":
        return str(context["error"])
    return _MUST[kind].format(**context) if kind in _MUST else None


def _dotted(section: str, location: Iterable[int | str]) -> str:
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in location]
    return section + "".join(parts)


def _shown(value: Any) -> str:
    """Render a value as a settings file would write it, cut to a bounded length."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = " ".join(repr(value).split())
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 1] + "…"
