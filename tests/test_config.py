"""Settings: four layers in their order, and refusals that name the key and where it came from."""

import re
from pathlib import Path

import pytest
import yaml

from cbmir_spark import config
from cbmir_spark.errors import ConfigError


def test_layers_win_in_their_order(tmp_path: Path) -> None:
    file = tmp_path / "site.yaml"
    file.write_text("retrieval: {k: 20, unique: none, prefilter: none}\n")
    environ = {"CBMIR_RETRIEVAL__K": "30", "CBMIR_RETRIEVAL__UNIQUE": "study", "PATH": "/bin"}
    settings = config.load(file, ["retrieval.k=40"], environ)
    assert settings.retrieval.k == 40
    assert settings.retrieval.unique == "study"
    assert settings.retrieval.prefilter == "none"
    assert settings.retrieval.exclude_same == config.load(environ={}).retrieval.exclude_same


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("retrieval.kk=1", "unknown key retrieval.kk; did you mean k?"),
        ("retrievel.k=1", "unknown key retrievel; did you mean retrieval?"),
        ("retrieval.k=0", "retrieval.k, set by the command line: .*greater than or equal to 1"),
        ("retrieval.k=ten", "retrieval.k, set by the command line: .*valid integer"),
        ("retrieval.k=true", "retrieval.k, set by the command line: .*valid integer"),
        ("retrieval=1", "retrieval is a section"),
        ("pixels.frames=0", "pixels.frames, set by the command line: must be auto, all, middle, or a number"),
        ("pixels.frames=some", "pixels.frames, set by the command line: must be auto, all, middle, or a number"),
        ("lake.uri.deeper=1", "lake.uri has no keys below it"),
        ("retrieval.k", "section.key=value"),
        ("dataset.seed=0", "dataset.seed, set by the command line"),
        ("retrieval.prefilter=everything", "retrieval.prefilter, set by the command line"),
        ("pixels.windows.CT={CHEST: [5, 1]}", "low 5.0 must be below high 1.0"),
    ],
)
def test_a_bad_flag_is_refused_with_its_place(override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config.load(overrides=[override], environ={})


def test_a_bad_file_is_refused_with_its_place(tmp_path: Path) -> None:
    file = tmp_path / "site.yaml"
    for text, said in [
        ("index: {batchsize: 3}", f"{file}: unknown key index.batchsize; did you mean batch_size?"),
        ("index: 3", f"{file}: index is a section"),
        ("- a list", "the top level must be sections"),
        ("index: {batch_size: many}", f"index.batch_size, set by {file}"),
        ("index: {", "not valid YAML"),
    ]:
        file.write_text(text)
        with pytest.raises(ConfigError, match=re.escape(said)):
            config.load(file, environ={})
    with pytest.raises(ConfigError, match="No such file"):
        config.load(tmp_path / "absent.yaml", environ={})


def test_an_unknown_environment_variable_is_refused() -> None:
    with pytest.raises(ConfigError, match="environment variable CBMIR_RETRIEVAL__KK"):
        config.load(environ={"CBMIR_RETRIEVAL__KK": "3"})


def test_text_stays_text_and_spark_properties_keep_their_dots() -> None:
    settings = config.load(
        overrides=["lake.uri=123", "ingest.archive=on", "lake.vault=null", "spark.conf.spark.sql.shuffle.partitions=7"],
        environ={},
    )
    assert settings.lake.uri == "123"
    assert settings.ingest.archive == "on"
    assert settings.lake.vault is None
    assert settings.spark.conf == {"spark.sql.shuffle.partitions": "7"}


def test_secrets_are_masked() -> None:
    secret = "a-key-that-nobody-may-read"
    settings = config.load(environ={"CBMIR_PRIVACY__KEY": secret})
    assert settings.privacy.key is not None
    assert settings.privacy.key.get_secret_value() == secret
    assert secret not in yaml.safe_dump(settings.masked())
    assert secret not in repr(settings)


def test_every_key_of_base_yaml_has_a_comment() -> None:
    lines = (config.conf_folder() / "base.yaml").read_text().splitlines()
    keys = [line for line in lines if re.match(r'\s+["\w*]+:', line)]
    nested = [line for line in keys if line.startswith("    ")]
    assert len(keys) > 40
    for line in keys:
        # Windows are a mapping below one setting: the setting has the comment, its entries need none.
        assert " # " in line or line in nested, line


def test_the_other_files_hold_only_known_keys_and_differences() -> None:
    base = yaml.safe_load((config.conf_folder() / "base.yaml").read_text())
    for name in ("local.yaml", "cluster.yaml"):
        file = config.conf_folder() / name
        config.load(file, environ={})
        for section, values in (yaml.safe_load(file.read_text()) or {}).items():
            for key, value in values.items():
                assert base[section][key] != value, f"{name}: {section}.{key} repeats base.yaml"
