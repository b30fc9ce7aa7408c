"""Settings from four layers: conf/base.yaml, then a settings file, then the environment, then the command line."""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from cbmir_spark.config.section import at, is_nullable, is_text
from cbmir_spark.config.settings import SECTIONS, Key, Settings, locate
from cbmir_spark.errors import ConfigError

ENVIRONMENT_PREFIX = "CBMIR_"
# Not a setting: it has to work where the settings themselves are wrong.
DEBUG_VARIABLE = ENVIRONMENT_PREFIX + "DEBUG"
BASE_FILE = "base.yaml"


def load(
    file: str | Path | None = None,
    overrides: Iterable[str] = (),
    environ: Mapping[str, str] | None = None,
) -> Settings:
    """Read the settings from all four layers; a later layer wins over an earlier one.

    `file` holds only what differs from conf/base.yaml. `overrides` are `section.key=value` strings, as `--set` takes
    them, with values in YAML. `environ` is the process's environment if left out. Raises ConfigError that names where
    a value was set, its key, what it must be and, for a typo, the nearest known key.
    """
    values: dict[str, dict[str, Any]] = {}
    places: dict[str, str] = {}
    base = conf_folder() / BASE_FILE
    for path, place in ((base, f"conf/{BASE_FILE}"), (file, f"settings file {file}")):
        if path is None:
            continue
        for key, value in _settings_of(read_yaml(path, place), place):
            before = values.get(key.section, {}).get(key.name)
            # Mappings of several files join; the same entry is replaced.
            key.put(values, {**before, **value} if isinstance(before, dict) and isinstance(value, dict) else value)
            places[key.dotted] = place
    for name, text in sorted((os.environ if environ is None else environ).items()):
        if name.startswith(ENVIRONMENT_PREFIX) and name != DEBUG_VARIABLE:
            place = f"environment variable {name}"
            key = _of_variable(name, place)
            key.put(values, _parsed(text, key, place))
            places[key.dotted] = place
    for override in overrides:
        dotted, equals, text = override.partition("=")
        if not equals or not dotted.strip():
            raise ConfigError(f"--set {override}: give it as section.key=value")
        key = locate(dotted.strip().split("."))
        key.put(values, _parsed(text, key, ""))
        # What was typed last needs no place.
        places[key.dotted] = ""
    return Settings.checked(values, places)


def debugging() -> bool:
    """True if CBMIR_DEBUG asks for whole traces beside the one line of an error."""
    return os.environ.get(DEBUG_VARIABLE, "0") not in ("", "0")


def conf_folder() -> Path:
    """Return the folder of base.yaml: beside the package in a checkout, inside it if installed from a wheel."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package.parent / "conf", package / "conf"):
        if (folder / BASE_FILE).is_file():
            return folder
    raise ConfigError(f"conf/{BASE_FILE} is neither beside nor inside {package}: install the package again")


class _Loader(yaml.SafeLoader):
    """YAML in which `1e-3` is a number, as in YAML 1.2 and Python, and a date is text, such as a folder's name."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parse_yaml(text: str, place: str) -> Any:
    """Parse one YAML document. Raises ConfigError with place, line and column where it is not valid."""
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(at(place, f"not valid YAML{where}: {error.problem}")) from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(at(place, f"not valid YAML: {' '.join(str(error).split())}")) from None


def read_yaml(path: str | Path, place: str) -> Any:
    """Read a YAML file. Raises ConfigError, with the place before it, if it cannot be read or is not valid."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(at(place, error.strerror or str(error))) from None
    except UnicodeDecodeError:
        raise ConfigError(at(place, "not UTF-8 text")) from None
    return parse_yaml(text, place)


def _settings_of(document: Any, place: str) -> Iterator[tuple[Key, Any]]:
    if not isinstance(document, (dict, type(None))):
        raise ConfigError(at(place, "the top level must be sections, such as `lake:`"))
    for section, settings in (document or {}).items():
        if section not in SECTIONS or not isinstance(settings, (dict, type(None))):
            # Raises: a section alone is no setting.
            locate([str(section)], place)
        for name, value in (settings or {}).items():
            yield locate([section, str(name)], place), value


def _of_variable(name: str, place: str) -> Key:
    parts = name.removeprefix(ENVIRONMENT_PREFIX).lower().split("__")
    if len(parts) == 1:
        raise ConfigError(at(place, f"its name must be {ENVIRONMENT_PREFIX}SECTION__KEY, with two underscores between"))
    return locate(parts, place)


def _parsed(text: str, key: Key, place: str) -> Any:
    """Text settings take the text as it stands: a key of digits or a folder called `on` must stay text."""
    if not is_text(key.annotation):
        return parse_yaml(text, place or f"--set {key.dotted}")
    return None if text == "null" and is_nullable(key.annotation) else text
