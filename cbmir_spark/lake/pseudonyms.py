"""Replace identifiers by keyed hashes: HMAC-SHA-256, one domain per kind of identifier.

The key is read from a file or the environment wherever it is used; tasks are sent the file's path at most.
"""

import hashlib
import hmac
import os
import secrets
import stat
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache

from cbmir_spark.config import PrivacySettings
from cbmir_spark.errors import ConfigError

KEY_VARIABLE = "CBMIR_PRIVACY__KEY"
KEY_FILE = "pseudonym.key"
SHORTEST_KEY = 16
# DICOM pads values to an even length (PS3.5 section 6.2); padding is no part of an identifier.
PADDING = " \0"
NO_KEY = f"privacy: a vault in object storage needs a key; set {KEY_VARIABLE} or privacy.key_file"
# Kinds of identifiers, from the smallest to the largest entity.
KINDS = ("image", "series", "study", "patient")


class PatientRule(StrEnum):
    """Rules for what identifies a patient. A lake has one; `cbmir upgrade` changes it."""

    FIRST = "first"  # the Patient ID up to its first backslash, as lakes of format 1 have it
    WHOLE = "whole"  # the whole Patient ID
    ISSUER = "issuer"  # the whole Patient ID, and the Issuer of Patient ID where there is one


@dataclass(frozen=True)
class Patient:
    """What a header says of a patient's identity; `first` is the Patient ID as PatientRule.FIRST takes it."""

    patient_id: str | None
    first: str | None = None
    issuer: str | None = None


@dataclass(frozen=True)
class Pseudonyms:
    """Turn identifiers into pseudonyms of 32 hexadecimal digits (128 bits).

    `key_file` is None if the key is in the environment of every driver and worker. `key_id` identifies the key without
    revealing it: equal keys have equal ids. `patients` is the lake's rule.
    """

    key_file: str | None
    key_id: str
    patients: PatientRule = PatientRule.ISSUER

    def image(self, sop_instance_uid: str) -> str:
        return self._of("image", sop_instance_uid)

    def series(self, series_instance_uid: str) -> str:
        return self._of("series", series_instance_uid)

    def study(self, study_instance_uid: str) -> str:
        return self._of("study", study_instance_uid)

    def patient(self, patient_id: str, issuer: str | None = None) -> str:
        """Make the pseudonym of a Patient ID, and of its issuer where the lake's rule takes issuers."""
        name = (issuer or "").strip(PADDING)
        if self.patients is not PatientRule.ISSUER or not name:
            return self._of("patient", patient_id)
        # The length keeps apart issuer and Patient ID, which may hold any character.
        return self._of(f"patient of {len(name)} {name}", patient_id)

    def of_kind(self, kind: str, identifier: str) -> str:
        """Make the pseudonym of an identifier of one of KINDS."""
        if kind not in KINDS:
            raise ValueError(f"{kind!r} is none of {', '.join(KINDS)}")
        return self._of(kind, identifier)

    def _of(self, domain: str, identifier: str) -> str:
        return _digest(_key(self.key_file), domain, identifier)


@dataclass(frozen=True)
class Identity:
    """One pseudonym of an instance; `identifier` is None if the header lacks it and another one is used instead.

    `issuer` is that of a patient, where the lake's rule takes issuers.
    """

    kind: str
    pseudonym: str
    identifier: str | None
    issuer: str | None = None


def identities(
    sop_instance_uid: str,
    series_instance_uid: str | None,
    study_instance_uid: str | None,
    patient: Patient,
    names: Pseudonyms,
) -> tuple[Identity, ...]:
    """Make the pseudonyms of an instance's image, series, study and patient, in the order of KINDS.

    Instances without an identifier must not become one patient, study or series: the next smaller one is used instead.
    """
    found, used = [], sop_instance_uid
    patient_id = patient.first if names.patients is PatientRule.FIRST else patient.patient_id
    given = (sop_instance_uid, series_instance_uid, study_instance_uid, patient_id)
    for kind, identifier in zip(KINDS, given, strict=True):
        used = identifier or used
        if kind == "patient" and identifier:
            issuer = patient.issuer if names.patients is PatientRule.ISSUER else None
            found.append(Identity(kind, names.patient(identifier, issuer), identifier, issuer))
        else:
            found.append(Identity(kind, names.of_kind(kind, used), identifier or None))
    return tuple(found)


def is_forgotten(owners: Iterable[Identity], tombstones: Collection[str]) -> bool:
    """True if something that an instance belongs to was forgotten; `tombstones` are kind:pseudonym."""
    return any(f"{owner.kind}:{owner.pseudonym}" in tombstones for owner in owners)


def patient_rule(privacy: PrivacySettings) -> PatientRule:
    """The rule that the settings ask for; a new lake takes it, `cbmir upgrade` changes that of another one."""
    return PatientRule.ISSUER if privacy.patient_issuer == "include" else PatientRule.WHOLE


def is_configured(privacy: PrivacySettings) -> bool:
    """Check whether the settings name a key, rather than leave it to the vault."""
    return privacy.key is not None or privacy.key_file is not None


def load(privacy: PrivacySettings, vault_folder: str | None) -> Pseudonyms:
    """Load the key that the settings name, or that of a local vault; creates nothing. Runs on the driver.

    `vault_folder` is the vault as a local path, None where it lies in object storage: that one holds no key, since a
    key beside the data it protects protects nothing. Raises ConfigError saying what to set.
    """
    if privacy.key is not None:
        # Tasks read the same variable: a key from elsewhere would not reach them.
        if os.environ.get(KEY_VARIABLE) != privacy.key.get_secret_value():
            raise ConfigError(f"privacy.key: give the key as environment variable {KEY_VARIABLE}, or privacy.key_file")
        return _from(None)
    if privacy.key_file is not None:
        return _from(privacy.key_file)
    if vault_folder is None:
        raise ConfigError(NO_KEY)
    key_file = os.path.join(vault_folder, KEY_FILE)
    if not os.path.exists(key_file):
        raise ConfigError(
            f"the pseudonym key {key_file} is missing: restore it from a backup, or set privacy.key_file to a copy"
        )
    return _from(key_file)


def create(privacy: PrivacySettings, vault_folder: str | None) -> Pseudonyms:
    """Load the key as `load` does; where a local vault has none, generate one, readable by its owner alone.

    Only an ingest into an empty lake calls this.
    """
    if not is_configured(privacy) and vault_folder is not None:
        key_file = os.path.join(vault_folder, KEY_FILE)
        if not os.path.exists(key_file):
            _generate(key_file)
    return load(privacy, vault_folder)


def _from(key_file: str | None) -> Pseudonyms:
    return Pseudonyms(key_file, hashlib.sha256(b"cbmir key id\0" + _key(key_file)).hexdigest()[:12])


def _digest(key: bytes, domain: str, identifier: str) -> str:
    message = f"{domain}\0{identifier.strip(PADDING)}".encode("utf-8", "surrogatepass")
    return hmac.new(key, message, hashlib.sha256).hexdigest()[:32]


@lru_cache(maxsize=4)
def _key(key_file: str | None) -> bytes:
    if key_file is None:
        key = os.environ.get(KEY_VARIABLE, "").strip().encode()
        place = f"environment variable {KEY_VARIABLE}"
    else:
        place = key_file
        try:
            with open(key_file, "rb") as handle:
                key = handle.read().strip()
        except OSError as error:
            raise ConfigError(f"privacy.key_file {key_file}: {error.strerror}") from None
    if len(key) < SHORTEST_KEY:
        raise ConfigError(f"{place}: the pseudonym key must have at least {SHORTEST_KEY} bytes")
    return key


def _generate(key_file: str) -> None:
    os.makedirs(os.path.dirname(key_file), mode=0o700, exist_ok=True)
    try:
        descriptor = os.open(key_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, stat.S_IRUSR | stat.S_IWUSR)
    except FileExistsError:
        return
    with os.fdopen(descriptor, "w") as handle:
        handle.write(secrets.token_hex(32) + "\n")
