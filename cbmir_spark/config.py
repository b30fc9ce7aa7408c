"""Typed settings: conf/base.yaml < the chosen file < environment `CBMIR_…` < flags; unknown keys are refused.

The values live in conf/base.yaml alone; this module only says what they may be.
"""

import os
import types
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator

from cbmir_spark.errors import ConfigError

ENVIRONMENT_PREFIX = "CBMIR_"
# Not a setting: it has to work where the settings themselves are what is wrong.
DEBUG_VARIABLE = ENVIRONMENT_PREFIX + "DEBUG"

Prefilter = Literal["tags", "predicted", "modality", "none"]
Choice = Literal["include", "exclude"]
# More neighbours than anybody looks at, yet a depth that figures may be cut at.
MOST_HITS = 10_000
Share = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[int, Field(ge=1)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class LakeSettings(_Section):
    uri: Annotated[str, Field(min_length=1)]
    vault: str | None


class StorageSettings(_Section):
    endpoint: str | None
    region: str
    path_style: bool
    attempts: Positive


class SparkSettings(_Section):
    master: str
    driver_memory: str
    log_level: Literal["OFF", "ERROR", "WARN", "INFO"]
    conf: dict[str, str]

    @field_validator("conf", mode="before")
    @classmethod
    def _as_spark_writes_them(cls, value: Any) -> Any:
        """YAML reads `4` and `true` as numbers and booleans; Spark's properties are strings."""
        if not isinstance(value, dict):
            return value
        return {k: str(v).lower() if isinstance(v, bool) else str(v) for k, v in value.items()}


class PrivacySettings(_Section):
    key: SecretStr | None
    key_file: str | None
    burned_in: Choice
    identity: bool


class IngestSettings(_Section):
    archive: str | None
    max_files_per_batch: Positive
    max_batches: Positive | None
    max_minutes: Annotated[float, Field(gt=0)] | None
    files_per_task: Positive
    max_object_mb: Positive
    decoder_memory_mb: Annotated[int, Field(ge=256)]
    decoder_seconds: Annotated[float, Field(gt=0)]


class PixelSettings(_Section):
    aspect: Literal["keep", "stretch"]
    frames: Literal["auto", "all", "middle"] | int
    max_frames: Positive
    percentiles: tuple[float, float]
    windows: dict[str, dict[str, tuple[float, float]]]

    @field_validator("frames", mode="before")
    @classmethod
    def _frames_policy(cls, value: Any) -> Any:
        if value in ("auto", "all", "middle") or (type(value) is int and value >= 1):
            return value
        raise ValueError("must be auto, all, middle, or a number of frames from 1")

    @field_validator("percentiles", mode="before")
    @classmethod
    def _percentile_pair(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("windows", mode="before")
    @classmethod
    def _window_pairs(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {
            modality: (
                {part: tuple(w) if isinstance(w, list) else w for part, w in parts.items()}
                if isinstance(parts, dict)
                else parts
            )
            for modality, parts in value.items()
        }

    @field_validator("percentiles")
    @classmethod
    def _percentiles_rise(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0.0 <= value[0] < value[1] <= 100.0:
            raise ValueError("must be two rising numbers from 0 to 100")
        return value

    @field_validator("windows")
    @classmethod
    def _windows_rise(
        cls, value: dict[str, dict[str, tuple[float, float]]]
    ) -> dict[str, dict[str, tuple[float, float]]]:
        for modality, parts in value.items():
            for part, (low, high) in parts.items():
                if low >= high:
                    raise ValueError(f"{modality}.{part}: low {low} must be below high {high}")
        return value


class VocabularySettings(_Section):
    body_parts: dict[str, str]


class DatasetSettings(_Section):
    label: Literal["body_part", "modality/body_part"]
    test_fraction: Share
    validation_fraction: Share
    min_images: Positive
    rows_per_group: Positive
    seed: Annotated[int, Field(ge=1)]


class TrainingSettings(_Section):
    preset: str
    epochs: Positive | None
    batch_size: Positive | None
    learning_rate: Annotated[float, Field(gt=0)] | None
    processes: Positive
    use_gpu: bool
    precision: Literal["float32", "bfloat16"]
    compile: bool
    seed: Annotated[int, Field(ge=1)]
    checkpoint_steps: Positive | None
    attempts: Positive
    promotion_margin: Annotated[float, Field(ge=0.0)]


class MlflowSettings(_Section):
    tracking_uri: str | None
    experiment: Annotated[str, Field(min_length=1)]
    model_name: Annotated[str, Field(min_length=1)]


class IndexSettings(_Section):
    model: str | None
    batch_size: Positive
    min_probability: Annotated[float, Field(ge=0.0, le=1.0)]
    rows_per_file: Positive
    most_files: Positive


class RetrievalSettings(_Section):
    model: str | None
    queries: str | None
    level: Literal["image", "series"]
    roots: list[str]
    k: Annotated[int, Field(ge=1, le=MOST_HITS)]
    metric: Literal["euclidean", "cosine"]
    method: Literal["bounds", "scan"]
    series_candidates: Positive
    prefilter: Prefilter
    imputed: Choice
    unknown: Choice
    unique: Literal["none", "series", "study", "patient"]
    exclude_same: Literal["none", "image", "series", "study", "patient"]
    min_probability: Annotated[float, Field(ge=0.0, le=1.0)]
    tasks_per_core: Positive
    block_mb: Positive
    gallery: Annotated[int, Field(ge=0)]
    csv: bool
    out: str | None

    @classmethod
    def choices(cls, name: str) -> tuple[str, ...]:
        """The values that a setting may have, of those with a few."""
        return get_args(cls.model_fields[name].annotation)


class EvaluationSettings(_Section):
    k: Positive
    depth: Positive
    max_queries: Positive
    prefilters: list[Prefilter]
    out: str | None


class DemoSettings(_Section):
    folder: Annotated[str, Field(min_length=1)]
    images_per_class: Annotated[int, Field(ge=4)]


class Settings(_Section):
    """Everything that a job can be told; frozen, so that what a run recorded is what it used."""

    lake: LakeSettings
    storage: StorageSettings
    spark: SparkSettings
    privacy: PrivacySettings
    ingest: IngestSettings
    pixels: PixelSettings
    vocabulary: VocabularySettings
    dataset: DatasetSettings
    training: TrainingSettings
    mlflow: MlflowSettings
    index: IndexSettings
    retrieval: RetrievalSettings
    evaluation: EvaluationSettings
    demo: DemoSettings

    def masked(self) -> dict[str, Any]:
        """The settings as plain values with every secret as asterisks, for printing and for MLflow."""
        values: dict[str, Any] = self.model_dump(mode="json")
        return values


def load(
    file: str | Path | None = None,
    overrides: Iterable[str] = (),
    environ: Mapping[str, str] | None = None,
) -> Settings:
    """Settings from all four layers, the later over the earlier.

    `overrides` are `section.key=value` strings, as `--set` takes them; values are read as YAML.
    Raises ConfigError naming the layer, the key and, for a typing slip, the nearest known key.
    """
    values = _read_yaml(conf_folder() / "base.yaml")
    origins = dict.fromkeys(_check_keys(values, Settings, "conf/base.yaml"), "conf/base.yaml")
    if file is not None:
        chosen = _read_yaml(Path(file))
        origins |= dict.fromkeys(_check_keys(chosen, Settings, str(file)), str(file))
        _merge(values, chosen, Settings)
    for name, text in sorted((os.environ if environ is None else environ).items()):
        if name.startswith(ENVIRONMENT_PREFIX) and name != DEBUG_VARIABLE:
            keys = name.removeprefix(ENVIRONMENT_PREFIX).lower().split("__")
            place = f"environment variable {name}"
            origins[_set(values, keys, text, place)] = place
    for override in overrides:
        dotted, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"--set {override}: give it as section.key=value")
        origins[_set(values, dotted.strip().split("."), text, f"--set {override}")] = "the command line"
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        origin = origins.get(".".join(str(part) for part in first["loc"][:2]), "no file: a section is missing")
        raise ConfigError(f"{key}, set by {origin}: {first['msg'].removeprefix('Value error, ')}") from None


def debugging() -> bool:
    """Whether whoever started this wants whole traces beside the one line of an error."""
    return os.environ.get(DEBUG_VARIABLE, "0") not in ("", "0")


def conf_folder() -> Path:
    """The folder of base.yaml: beside the package in a checkout, inside it when installed from a wheel."""
    package = Path(__file__).resolve().parent
    for folder in (package.parent / "conf", package / "conf"):
        if (folder / "base.yaml").is_file():
            return folder
    raise ConfigError(f"conf/base.yaml is neither beside nor inside {package}: install the package again")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"settings file {path}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"settings file {path}: not valid YAML: {reason}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"settings file {path}: the top level must be sections, such as 'lake:'")
    return values


def _check_keys(values: Mapping[str, Any], model: type[BaseModel], place: str, prefix: str = "") -> list[str]:
    """The dotted keys that a file sets; unknown ones are refused."""
    found = []
    for key, value in values.items():
        field = model.model_fields.get(str(key))
        if field is None:
            raise ConfigError(f"{place}: unknown key {prefix}{key}{_nearest(str(key), model)}")
        section = _section_of(field.annotation)
        if section is not None:
            if not isinstance(value, dict):
                raise ConfigError(f"{place}: {prefix}{key} is a section and needs keys below it")
            found += _check_keys(value, section, place, f"{prefix}{key}.")
        else:
            found.append(f"{prefix}{key}")
    return found


def _set(values: dict[str, Any], keys: list[str], text: str, place: str) -> str:
    """Put one value at its place and return its setting's dotted name.

    Below a mapping setting, such as `spark.conf`, the rest of the name is one key, dots and all.
    """
    model: type[BaseModel] = Settings
    target = values
    for position, key in enumerate(keys):
        field = model.model_fields.get(key)
        if field is None:
            raise ConfigError(f"{place}: unknown key {'.'.join(keys[: position + 1])}{_nearest(key, model)}")
        section = _section_of(field.annotation)
        if section is not None:
            model, target = section, target.setdefault(key, {})
            continue
        rest = keys[position + 1 :]
        try:
            value = _as_text(text, field.annotation) if _is_text(field.annotation) else yaml.safe_load(text)
        except yaml.YAMLError:
            raise ConfigError(f"{place}: the value is not valid YAML") from None
        if not rest:
            target[key] = value
        elif get_origin(field.annotation) is dict:
            target[key] = {**target.get(key, {}), ".".join(rest): value}
        else:
            raise ConfigError(f"{place}: {'.'.join(keys[: position + 1])} has no keys below it")
        return ".".join(keys[: position + 1])
    raise ConfigError(f"{place}: {'.'.join(keys)} is a section; name one of its keys")


def _merge(base: dict[str, Any], over: Mapping[str, Any], model: type[BaseModel]) -> None:
    """Sections merge key by key; a mapping setting merges by its own keys; everything else is replaced."""
    for key, value in over.items():
        section = _section_of(model.model_fields[key].annotation)
        if section is not None:
            _merge(base.setdefault(key, {}), value, section)
        elif isinstance(value, dict) and isinstance(base.get(key), dict):
            base[key] = {**base[key], **value}
        else:
            base[key] = value


def _section_of(annotation: Any) -> type[BaseModel] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _is_text(annotation: Any) -> bool:
    """Whether a setting takes text as it stands: a key of digits or a folder called `on` must stay text."""
    parts = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    return all(part in (str, SecretStr, type(None)) for part in parts)


def _as_text(text: str, annotation: Any) -> str | None:
    return None if text == "null" and type(None) in get_args(annotation) else text


def _nearest(key: str, model: type[BaseModel]) -> str:
    matches = get_close_matches(key, list(model.model_fields), n=1)
    return f"; did you mean {matches[0]}?" if matches else f"; known are {', '.join(model.model_fields)}"
