"""Pseudonyms: keyed, separated by domain, and a key that never lies beside the data it protects."""

import hashlib
import hmac
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from cbmir_spark import config
from cbmir_spark.errors import ConfigError
from cbmir_spark.lake import pseudonyms
from cbmir_spark.lake.pseudonyms import Patient, PatientRule

UID = "1.2.826.0.1.3680043.8.498.1"


def test_a_local_vault_gets_a_key_that_its_owner_alone_reads(tmp_path: Path) -> None:
    settings = config.load(environ={})
    names = pseudonyms.create(settings.privacy, str(tmp_path / "vault"))
    key_file = tmp_path / "vault" / pseudonyms.KEY_FILE
    assert stat.S_IMODE(key_file.stat().st_mode) == 0o600
    assert names == pseudonyms.create(settings.privacy, str(tmp_path / "vault"))
    key = key_file.read_bytes().strip()
    expected = hmac.new(key, b"image\0" + UID.encode(), hashlib.sha256).hexdigest()[:32]
    assert names.image(UID) == expected == names.image(UID + "\0")
    assert len({names.image(UID), names.series(UID), names.study(UID), names.patient(UID)}) == 4
    assert key.decode() not in repr(names)


def test_another_key_gives_other_names(tmp_path: Path) -> None:
    settings = config.load(environ={})
    one, two = (pseudonyms.create(settings.privacy, str(tmp_path / name)) for name in ("one", "two"))
    assert one.key_id != two.key_id
    assert one.image(UID) != two.image(UID)


def test_an_object_store_gets_no_generated_key() -> None:
    with pytest.raises(ConfigError, match=r"CBMIR_PRIVACY__KEY or privacy\.key_file"):
        pseudonyms.create(config.load(environ={}).privacy, None)


def test_a_key_on_the_command_line_or_too_short_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="environment variable"):
        pseudonyms.create(config.load(overrides=["privacy.key=" + "k" * 32], environ={}).privacy, None)
    short = tmp_path / "short"
    short.write_text("short")
    with pytest.raises(ConfigError, match="at least 16 bytes"):
        pseudonyms.create(config.load(overrides=[f"privacy.key_file={short}"], environ={}).privacy, None)
    monkeypatch.setenv("CBMIR_PRIVACY__KEY", "k" * 32)
    assert pseudonyms.create(config.load().privacy, None).key_file is None


def test_what_an_instance_belongs_to_has_a_name_even_where_the_header_gives_none(tmp_path: Path) -> None:
    names = pseudonyms.create(config.load(environ={}).privacy, str(tmp_path))
    whole = pseudonyms.identities("1.1", "1.2", "1.3", Patient("MRN"), names)
    assert [(each.kind, each.identifier) for each in whole] == [
        ("image", "1.1"),
        ("series", "1.2"),
        ("study", "1.3"),
        ("patient", "MRN"),
    ]
    assert [each.pseudonym for each in whole] == [
        names.image("1.1"),
        names.series("1.2"),
        names.study("1.3"),
        names.patient("MRN"),
    ]
    # All who have no Patient ID are not one patient: the next smaller thing stands in, and is nobody's identifier.
    bare = pseudonyms.identities("1.1", "1.2", None, Patient(""), names)
    assert [each.identifier for each in bare] == ["1.1", "1.2", None, None]
    assert [each.pseudonym for each in bare[2:]] == [names.study("1.2"), names.patient("1.2")]
    assert not pseudonyms.is_forgotten(bare, {f"patient:{names.patient('MRN')}"})
    for each in whole:
        assert pseudonyms.is_forgotten(whole, {f"{each.kind}:{each.pseudonym}"})
        assert not pseudonyms.is_forgotten(whole, {f"image:{each.pseudonym}"}) or each.kind == "image"
    with pytest.raises(ValueError, match="none of"):
        names.of_kind("person", "1")


def test_a_lakes_rule_decides_what_identifies_a_patient(tmp_path: Path) -> None:
    names = pseudonyms.create(config.load(environ={}).privacy, str(tmp_path))

    def of(rule: PatientRule, patient: Patient) -> pseudonyms.Identity:
        return pseudonyms.identities("1.1", "1.2", "1.3", patient, replace(names, patients=rule))[-1]

    one, two = (Patient(f"SITE\\{number}", "SITE", "HOSPITAL") for number in (1, 2))
    assert of(PatientRule.FIRST, one) == of(PatientRule.FIRST, two)
    assert of(PatientRule.FIRST, one).pseudonym == names.patient("SITE")
    assert of(PatientRule.WHOLE, one).pseudonym == names.patient("SITE\\1") != names.patient("SITE\\2")
    issued = of(PatientRule.ISSUER, one)
    assert (issued.identifier, issued.issuer) == ("SITE\\1", "HOSPITAL")
    assert issued.pseudonym == names.patient("SITE\\1", "HOSPITAL") != names.patient("SITE\\1", "HOSPITAL 2")
    # Plain IDs have the same pseudonym by every rule; padding is no part of an issuer.
    plain = Patient("MRN", "MRN", None)
    assert {of(rule, plain).pseudonym for rule in PatientRule} == {names.patient("MRN"), names.patient("MRN", " \0")}
    # No ID of one issuer is another ID of another issuer.
    assert names.patient("B C", "A") != names.patient("C", "A B")
    # Without a Patient ID, an issuer identifies nobody.
    assert of(PatientRule.ISSUER, Patient(None, None, "HOSPITAL")).pseudonym == names.patient("1.3")
