"""What all sections of the settings have in common: strict types, and changes that are checked."""

import os
import types
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, SecretStr, ValidationError

from cbmir_spark.config.problems import invalid_value, unknown_key
from cbmir_spark.errors import ConfigError


class Section(BaseModel):
    """A section of the settings: frozen, with strict types and no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @classmethod
    def section(cls) -> str:
        """Return the section's name in a settings file."""
        return cls.__name__.removesuffix("Settings").lower()

    @classmethod
    def choices(cls, name: str) -> tuple[str, ...]:
        """Return the values that a setting may have, for one that lists them."""
        return get_args(cls.model_fields[name].annotation)

    @classmethod
    def checked(cls, values: Mapping[str, Any], places: Mapping[str, str] | None = None) -> Self:
        """Build the section from plain values.

        `places` says by setting where its value was set, for the message. Raises ConfigError for the first bad value.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as failure:
            first = failure.errors(include_url=False)[0]
        name = str(first["loc"][0])
        annotation = cls.model_fields[name].annotation
        problem = invalid_value(cls.section(), first, is_nullable(annotation), is_secret(annotation))
        raise ConfigError(at((places or {}).get(name, ""), problem))

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some settings changed, for example `settings.retrieval.replace(k=5)`.

        Values are Python objects: None for null, any path for text, numpy scalars for numbers. A mapping replaces the
        whole mapping. Raises ConfigError that names the key, what it must be and, for a typo, the nearest known key.
        """
        for name in changes:
            if name not in type(self).model_fields:
                raise ConfigError(unknown_key(f"{self.section()}.", name, type(self).model_fields))
        return self.checked({**dict(self), **{name: plain(value) for name, value in changes.items()}})


def at(place: str, problem: str) -> str:
    """Put the place of a problem before it; the command line and Python calls have none."""
    return f"{place}: {problem}" if place else problem


def plain(value: Any) -> Any:
    """Turn what a notebook may pass into what a settings file would hold: text, numbers, lists and dicts."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    # numpy's scalars, without an import of numpy.
    return value.item() if getattr(value, "ndim", None) == 0 else value


def is_nullable(annotation: Any) -> bool:
    """True if a setting may be null."""
    return type(None) in _members(annotation)


def is_secret(annotation: Any) -> bool:
    """True if a setting must not be shown."""
    return SecretStr in _members(annotation)


def is_text(annotation: Any) -> bool:
    """True if a setting holds text, of any kind or one of a few words."""
    if get_origin(annotation) is Literal:
        return all(isinstance(choice, str) for choice in get_args(annotation))
    return all(member in (str, SecretStr, type(None)) for member in _members(annotation))


def entries_of(annotation: Any) -> Any:
    """Return the type of a mapping's values, such as those of `spark.conf`; None for what is no mapping."""
    return get_args(annotation)[1] if get_origin(annotation) is dict else None


def _members(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, or the type itself; without what `Annotated` adds to them."""
    members = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    return tuple(get_args(member)[0] if get_origin(member) is Annotated else member for member in members)
