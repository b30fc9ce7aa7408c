"""All settings as one object, and the dotted names that they are set by."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict

from cbmir_spark.config.problems import unknown_key
from cbmir_spark.config.section import Section, at, entries_of, plain
from cbmir_spark.config.sections import (
    DatasetSettings,
    DemoSettings,
    EvaluationSettings,
    IndexSettings,
    IngestSettings,
    LakeSettings,
    MlflowSettings,
    PixelsSettings,
    PrivacySettings,
    RetrievalSettings,
    SparkSettings,
    StorageSettings,
    TrainingSettings,
    VocabularySettings,
)
from cbmir_spark.errors import ConfigError


class Settings(BaseModel):
    """All settings; frozen, so that what a run recorded is what it used."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    lake: LakeSettings
    storage: StorageSettings
    spark: SparkSettings
    privacy: PrivacySettings
    ingest: IngestSettings
    pixels: PixelsSettings
    vocabulary: VocabularySettings
    dataset: DatasetSettings
    training: TrainingSettings
    mlflow: MlflowSettings
    index: IndexSettings
    retrieval: RetrievalSettings
    evaluation: EvaluationSettings
    demo: DemoSettings

    @classmethod
    def checked(cls, values: Mapping[str, Mapping[str, Any]], places: Mapping[str, str] | None = None) -> "Settings":
        """Build settings from plain values by section.

        `places` says by dotted name where a value was set, for the message. Raises ConfigError for the first bad value.
        """
        sections = {}
        for name, section in SECTIONS.items():
            found = {key: (places or {}).get(f"{name}.{key}", "") for key in section.model_fields}
            sections[name] = section.checked(values.get(name, {}), found)
        return cls.model_validate(sections)

    def masked(self) -> dict[str, Any]:
        """Return the settings as plain values with every secret as asterisks, for printing and for MLflow."""
        values: dict[str, Any] = self.model_dump(mode="json")
        return values

    def override(self, changes: Mapping[str, Any]) -> "Settings":
        """Return a copy with some settings changed, for example `settings.override({"retrieval.k": 5})`.

        Keys are dotted, down to one entry of a mapping ("spark.conf.spark.ui.enabled"); {"retrieval": {"k": 5}} and
        {"retrieval": a section} work as well. Values are Python objects: None for null, any path for text, numpy
        scalars for numbers. Raises ConfigError that names the key, what it must be and, for a typo, the nearest key.
        """
        values = {name: dict(getattr(self, name)) for name in SECTIONS}
        for dotted, value in _flat(changes):
            locate(str(dotted).split(".")).put(values, plain(value))
        return self.checked(values)


SECTIONS: dict[str, type[Section]] = {
    name: field.annotation
    for name, field in Settings.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
}


@dataclass(frozen=True)
class Key:
    """The place of a value: a section, a setting, and below a mapping the name of one entry."""

    section: str
    name: str
    entry: str | None

    @property
    def dotted(self) -> str:
        return f"{self.section}.{self.name}"

    @property
    def annotation(self) -> Any:
        """The type of the value, which for an entry is that of its mapping's values."""
        whole = SECTIONS[self.section].model_fields[self.name].annotation
        return whole if self.entry is None else entries_of(whole)

    def put(self, values: dict[str, dict[str, Any]], value: Any) -> None:
        """Set the value among plain values by section; an entry joins the others of its mapping."""
        section = values.setdefault(self.section, {})
        if self.entry is not None:
            entries = section.get(self.name)
            value = {**(entries if isinstance(entries, dict) else {}), self.entry: value}
        section[self.name] = value


def locate(parts: Sequence[str], place: str = "") -> Key:
    """Find a setting by the parts of its dotted name; below a mapping the rest is one entry, dots and all.

    `place` is where the name was given, for the message. Raises ConfigError for a name that is no setting's.
    """
    dotted = ".".join(parts)
    section = SECTIONS.get(parts[0])
    if section is None:
        raise ConfigError(at(place, unknown_key("", parts[0], SECTIONS, _of_this_name(dotted))))
    if len(parts) == 1:
        example = f"{dotted}.{next(iter(section.model_fields))}"
        raise ConfigError(at(place, f"{dotted} is a section; set one of its keys, such as {example}"))
    key = Key(parts[0], parts[1], ".".join(parts[2:]) or None)
    if key.name not in section.model_fields:
        raise ConfigError(
            at(place, unknown_key(f"{key.section}.", key.name, section.model_fields, _of_this_name(key.name)))
        )
    if key.entry is not None and key.annotation is None:
        raise ConfigError(at(place, f"unknown key {dotted}; {key.dotted} is a single value"))
    return key


def describe(dotted: str) -> str:
    """Return the description of a setting."""
    key = locate(dotted.split("."))
    return SECTIONS[key.section].model_fields[key.name].description or ""


def _flat(changes: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in changes.items():
        if name in SECTIONS and isinstance(value, (Mapping, Section)):
            yield from ((f"{name}.{key}", item) for key, item in dict(value).items())
        else:
            yield name, value


def _of_this_name(name: str) -> list[str]:
    """The dotted names of the settings of any section that have this name."""
    return [f"{section}.{name}" for section, model in SECTIONS.items() if name in model.model_fields]
