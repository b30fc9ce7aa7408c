"""Write settings with their descriptions as comments. `python -m cbmir_spark.config.annotate` renews conf/base.yaml."""

from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from cbmir_spark.config.load import BASE_FILE, conf_folder, read_yaml
from cbmir_spark.config.settings import SECTIONS, Settings

HEADER = """\
# Every setting with its default value. A settings file of your own holds only what differs; CBMIR_SECTION__KEY in the
# environment comes after it, and --set section.key=value on the command line last.
# Change a default here and a description in cbmir_spark/config/sections.py; `make settings` then renews this file.
"""
# Where comments begin.
_COLUMN = 31


def annotated(settings: Settings) -> str:
    """Return settings as YAML, secrets masked, with each section's and setting's description as its comment."""
    values = settings.masked()
    return "\n".join(line for name in SECTIONS for line in ["", *_section(name, values[name])]).lstrip("\n") + "\n"


def base_file() -> str:
    """Return what conf/base.yaml has to be: its values, in the order of the code and with the code's descriptions."""
    values = read_yaml(conf_folder() / BASE_FILE, f"conf/{BASE_FILE}")
    return f"{HEADER}\n{annotated(Settings.checked(values))}"


def _section(name: str, values: Mapping[str, Any]) -> Iterator[str]:
    section = SECTIONS[name]
    yield f"{name}:".ljust(_COLUMN) + f"# {section.__doc__}"
    for key, field in section.model_fields.items():
        first, *rest = _yaml(key, values[key], "  ")
        yield f"{first:{_COLUMN - 2}}  # {field.description}"
        yield from rest


def _yaml(key: str, value: Any, indent: str) -> Iterator[str]:
    if isinstance(value, dict) and value:
        yield f"{indent}{_flow(key)}:"
        for name, item in value.items():
            yield from _yaml(name, item, indent + "  ")
    else:
        yield f"{indent}{_flow(key)}: {_flow(value)}"


def _flow(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10**6)
    return text.removesuffix("...\n").strip()


if __name__ == "__main__":
    (conf_folder() / BASE_FILE).write_text(base_file(), encoding="utf-8")
