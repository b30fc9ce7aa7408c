"""Settings: layers in their order, checked changes, and refusals that name key, place and remedy."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import cbmir_spark
from cbmir_spark import config
from cbmir_spark.config.annotate import annotated, base_file
from cbmir_spark.config.problems import RENAMED
from cbmir_spark.config.settings import SECTIONS
from cbmir_spark.errors import ConfigError

BASE = config.load(environ={})


def problem(call: Callable[[], object]) -> str:
    """The message of the ConfigError that a call ends in; always one line."""
    with pytest.raises(ConfigError) as raised:
        call()
    message = str(raised.value)
    assert "\n" not in message
    return message


def test_layers_win_in_their_order(tmp_path: Path) -> None:
    file = tmp_path / "site.yaml"
    file.write_text("retrieval: {k: 20, unique: none, prefilter: none}\n")
    environ = {"CBMIR_RETRIEVAL__K": "30", "CBMIR_RETRIEVAL__UNIQUE": "study", "PATH": "/bin"}
    settings = config.load(file, ["retrieval.k=40"], environ)
    assert settings.retrieval.k == 40
    assert settings.retrieval.unique == "study"
    assert settings.retrieval.prefilter == "none"
    assert settings.retrieval.exclude_same == BASE.retrieval.exclude_same


def test_mappings_of_two_layers_join(tmp_path: Path) -> None:
    file = tmp_path / "site.yaml"
    file.write_text("spark: {conf: {a.b: 4, c: true}}\nvocabulary:\npixels: {windows: {MR: {'*': [0, 1]}}}\n")
    settings = config.load(file, ["spark.conf.a.b=5"], {})
    assert settings.spark.conf == {"a.b": "5", "c": "true"}
    assert settings.pixels.windows == {**BASE.pixels.windows, "MR": {"*": (0.0, 1.0)}}
    assert settings.vocabulary == BASE.vocabulary


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("retrieval.kk=1", "unknown key retrieval.kk; did you mean retrieval.k?"),
        ("retrievel.k=1", "unknown key retrievel; did you mean retrieval?"),
        ("k=1", "unknown key k; did you mean retrieval.k or evaluation.k?"),
        ("retrieval.label=x", "unknown key retrieval.label; did you mean dataset.label?"),
        ("mlflow.zzz=1", "unknown key mlflow.zzz; known keys: tracking_uri, experiment, model_name"),
        ("index.most_files=1", "index.most_files is now called index.max_extra_files"),
        ("retrieval.k=0", "retrieval.k must be at least 1, not 0"),
        ("retrieval.k=10001", "retrieval.k must be at most 10000, not 10001"),
        ("retrieval.k=ten", 'retrieval.k must be a whole number, not "ten"'),
        ("retrieval.k=true", "retrieval.k must be a whole number, not true"),
        ("retrieval.k=10.0", "retrieval.k must be a whole number, not 10.0"),
        ("training.epochs=ten", 'training.epochs must be a whole number or null, not "ten"'),
        ("training.learning_rate=0", "training.learning_rate must be above 0, not 0"),
        ("training.learning_rate=.inf", "training.learning_rate must be a finite number, not Infinity"),
        ("dataset.test_fraction=1", "dataset.test_fraction must be below 1, not 1"),
        ("dataset.seed=0", "dataset.seed must be at least 1, not 0"),
        ("retrieval=1", "retrieval is a section; set one of its keys, such as retrieval.model"),
        ("lake.uri=", "lake.uri must not be empty"),
        ("lake.uri.deeper=1", "unknown key lake.uri.deeper; lake.uri is a single value"),
        ("retrieval.k", "--set retrieval.k: give it as section.key=value"),
        ("=1", "--set =1: give it as section.key=value"),
        (
            "retrieval.prefilter=all",
            'retrieval.prefilter must be tags, predicted, modality or none, not "all"',
        ),
        (
            "evaluation.prefilters=[tags, all]",
            'evaluation.prefilters[1] must be tags, predicted, modality or none, not "all"',
        ),
        ("evaluation.prefilters=[]", "evaluation.prefilters must not be empty"),
        ("retrieval.roots=/data", 'retrieval.roots must be a list, not "/data"'),
        ("retrieval.csv=maybe", 'retrieval.csv must be true or false, not "maybe"'),
        ("spark.conf={a.b: null}", "spark.conf.a.b must be text, not null"),
        ("spark.conf=4", "spark.conf must be a mapping of names to values, not 4"),
        ("vocabulary.body_parts={5: KNEE}", "vocabulary.body_parts: the name 5 must be text; put it in quotes"),
        ("pixels.frames=0", "pixels.frames must be auto, all, middle or a number of frames from 1, not 0"),
        ("pixels.frames=some", 'pixels.frames must be auto, all, middle or a number of frames from 1, not "some"'),
        ("pixels.percentiles=[1, 101]", "pixels.percentiles must be [low, high] from 0 to 100, not [1, 101]"),
        ("pixels.percentiles=[1]", "pixels.percentiles must be [low, high] with low below high, not [1]"),
        (
            "pixels.windows.CT={CHEST: [5, 1]}",
            "pixels.windows.CT.CHEST must be [low, high] with low below high, not [5, 1]",
        ),
        ("retrieval.k={", "--set retrieval.k: not valid YAML at line 1, column 2: "),
    ],
)
def test_a_bad_flag_is_refused_with_what_it_must_be(override: str, said: str) -> None:
    message = problem(lambda: config.load(overrides=[override], environ={}))
    assert message == said or (said.endswith(": ") and message.startswith(said))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("index: {batchsize: 3}", "unknown key index.batchsize; did you mean index.batch_size?"),
        ("index: {most_files: 3}", "index.most_files is now called index.max_extra_files"),
        ("index: 3", "index is a section; set one of its keys, such as index.model"),
        ("k: 3", "unknown key k; did you mean retrieval.k or evaluation.k?"),
        ("- a list", "the top level must be sections, such as `lake:`"),
        ("index: {batch_size: many}", 'index.batch_size must be a whole number, not "many"'),
        ("lake: {uri: 5}", "lake.uri must be text, not 5; put it in quotes"),
        ("index: {", "not valid YAML at line 1, column 9: expected the node content, but found '<stream end>'"),
    ],
)
def test_a_bad_file_is_refused_with_its_path(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "site.yaml"
    file.write_text(text)
    assert problem(lambda: config.load(file, environ={})) == f"settings file {file}: {said}"


def test_a_file_that_cannot_be_read_is_refused_with_its_path(tmp_path: Path) -> None:
    absent = tmp_path / "absent.yaml"
    assert problem(lambda: config.load(absent, environ={})) == f"settings file {absent}: No such file or directory"
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    assert problem(lambda: config.load(binary, environ={})) == f"settings file {binary}: not UTF-8 text"


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("CBMIR_RETRIEVAL__KK", "3", "unknown key retrieval.kk; did you mean retrieval.k?"),
        ("CBMIR_RETRIEVAL_K", "3", "its name must be CBMIR_SECTION__KEY, with two underscores between"),
        ("CBMIR_RETRIEVAL__K", "0", "retrieval.k must be at least 1, not 0"),
        ("CBMIR_INDEX__MOST_FILES", "3", "index.most_files is now called index.max_extra_files"),
    ],
)
def test_a_bad_environment_variable_is_refused_by_name(name: str, text: str, said: str) -> None:
    assert problem(lambda: config.load(environ={name: text})) == f"environment variable {name}: {said}"


def test_text_stays_text_and_numbers_are_those_of_python(tmp_path: Path) -> None:
    settings = config.load(
        overrides=[
            "lake.uri=123",
            "ingest.archive=on",
            "lake.vault=null",
            "spark.log_level=OFF",
            "spark.conf.spark.sql.shuffle.partitions=7",
            "vocabulary.body_parts.KNIE=NO",
            "training.learning_rate=1e-3",
        ],
        environ={},
    )
    assert settings.lake.uri == "123"
    assert settings.ingest.archive == "on"
    assert settings.lake.vault is None
    assert settings.spark.log_level == "OFF"
    assert settings.spark.conf == {"spark.sql.shuffle.partitions": "7"}
    assert settings.vocabulary.body_parts == {"KNIE": "NO"}
    assert settings.training.learning_rate == 0.001
    file = tmp_path / "site.yaml"
    file.write_text("lake: {uri: 2026-01-31}\nspark: {log_level: OFF}\ntraining: {learning_rate: 2E-4}\n")
    settings = config.load(file, environ={})
    assert (settings.lake.uri, settings.spark.log_level) == ("2026-01-31", "OFF")
    assert settings.training.learning_rate == 0.0002


def test_settings_take_checked_changes_from_python(tmp_path: Path) -> None:
    given: dict[str, Any] = {
        "lake.uri": tmp_path,
        "retrieval": {"k": np.int64(5), "csv": np.bool_(True)},
        "retrieval.roots": (tmp_path / "more",),
        "training.epochs": None,
        "training.promotion_margin": np.float32(0.5),
        "pixels.percentiles": (2, 98),
        "spark.conf.spark.ui.enabled": True,
    }
    settings = config.load(overrides=["spark.conf.a=b", "training.epochs=3"], environ={}).override(given)
    assert settings.lake.uri == str(tmp_path)
    assert (settings.retrieval.k, settings.retrieval.csv) == (5, True)
    assert type(settings.retrieval.k) is int
    assert settings.retrieval.roots == [str(tmp_path / "more")]
    assert (settings.training.epochs, settings.training.promotion_margin) == (None, 0.5)
    assert settings.pixels.percentiles == (2.0, 98.0)
    assert settings.spark.conf == {"a": "b", "spark.ui.enabled": "true"}
    assert settings.override({"retrieval": BASE.retrieval}).retrieval == BASE.retrieval
    assert settings.ingest == BASE.ingest
    assert BASE.override({}) == BASE


def test_a_section_takes_checked_changes_and_stays_as_it_was() -> None:
    changed = BASE.retrieval.replace(k=7, prefilter="none")
    assert (changed.k, changed.prefilter) == (7, "none")
    assert changed.replace(k=BASE.retrieval.k, prefilter=BASE.retrieval.prefilter) == BASE.retrieval
    assert problem(lambda: BASE.retrieval.replace(k=0)) == "retrieval.k must be at least 1, not 0"
    assert problem(lambda: BASE.index.replace(batchsize=1)) == (
        "unknown key index.batchsize; did you mean index.batch_size?"
    )
    assert problem(lambda: BASE.index.replace(most_files=1)) == ("index.most_files is now called index.max_extra_files")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"retrieval.k": 0}, "retrieval.k must be at least 1, not 0"),
        ({"retrieval.k": "5"}, 'retrieval.k must be a whole number, not "5"'),
        ({"retrieval.k": None}, "retrieval.k must be a whole number, not null"),
        ({"retrieval.k": float("nan")}, "retrieval.k must be a whole number, not NaN"),
        ({"training.promotion_margin": float("nan")}, "training.promotion_margin must be a finite number, not NaN"),
        ({"retrieval": {"kk": 5}}, "unknown key retrieval.kk; did you mean retrieval.k?"),
        ({"retrieval": 5}, "retrieval is a section; set one of its keys, such as retrieval.model"),
        ({"spark.mastre": "local"}, "unknown key spark.mastre; did you mean spark.master?"),
        ({"index.most_files": 5}, "index.most_files is now called index.max_extra_files"),
        ({"lake.vault": 5}, "lake.vault must be text or null, not 5; put it in quotes"),
        ({"retrieval.k": {"a" * 99: 1}}, 'retrieval.k must be a whole number, not {"' + "a" * 57 + "…"),
    ],
)
def test_a_bad_change_is_refused(changes: Mapping[str, Any], said: str) -> None:
    assert problem(lambda: BASE.override(changes)) == said


def test_secrets_are_masked() -> None:
    secret = "a-key-that-nobody-may-read"
    settings = config.load(environ={"CBMIR_PRIVACY__KEY": secret})
    assert settings.privacy.key is not None
    assert settings.privacy.key.get_secret_value() == secret
    assert secret not in yaml.safe_dump(settings.masked())
    assert secret not in annotated(settings)
    assert secret not in repr(settings)
    changed = settings.override({"retrieval.k": 5})
    assert changed.privacy.key is not None and changed.privacy.key.get_secret_value() == secret
    assert secret not in problem(lambda: settings.override({"privacy.key": [secret]}))


def test_base_yaml_has_every_key_in_order_with_the_description_of_the_code() -> None:
    text = (config.conf_folder() / "base.yaml").read_text(encoding="utf-8")
    assert text == base_file(), "run `make settings`"
    values = yaml.safe_load(text)
    assert {name: list(keys) for name, keys in values.items()} == {
        name: list(section.model_fields) for name, section in SECTIONS.items()
    }
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("name", SECTIONS)
def test_descriptions_are_one_short_line(name: str) -> None:
    section = SECTIONS[name]
    assert section.section() == name
    assert section.__doc__ and section.__doc__.endswith(".") and "\n" not in section.__doc__
    for key, field in section.model_fields.items():
        assert field.description and field.description.strip() == field.description, key
        assert "\n" not in field.description and not field.description.endswith("."), key


def test_annotated_settings_read_back() -> None:
    settings = BASE.override({"spark.conf": {"a": "b: c"}, "lake.uri": "on", "vocabulary.body_parts": {"NO": "KNEE"}})
    assert config.settings.Settings.checked(yaml.safe_load(annotated(settings))) == settings


def test_renamed_settings_lead_to_ones_that_exist() -> None:
    known = {f"{name}.{key}" for name, section in SECTIONS.items() for key in section.model_fields}
    assert not known & RENAMED.keys()
    assert set(RENAMED.values()) <= known


def test_no_module_changes_settings_without_a_check() -> None:
    root = Path(cbmir_spark.__file__).parent
    assert [str(path) for path in root.rglob("*.py") if re.search(r"\bmodel_copy\(", path.read_text())] == []


def test_cluster_yaml_holds_only_known_keys_and_differences() -> None:
    base = yaml.safe_load((config.conf_folder() / "base.yaml").read_text())
    file = config.conf_folder() / "cluster.yaml"
    config.load(file, environ={})
    for section, values in yaml.safe_load(file.read_text()).items():
        for key, value in values.items():
            assert base[section][key] != value, f"{section}.{key} repeats base.yaml"
