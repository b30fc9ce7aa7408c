"""UIDs and random generators derived from names, never from the clock: the same names give the same archive."""

import hashlib
import uuid

import numpy as np


def uid_of(*parts: object) -> str:
    """Derive a UID: a version 5 UUID under 2.25 (PS3.5 section B.2)."""
    return f"2.25.{uuid.uuid5(uuid.NAMESPACE_OID, _name(parts)).int}"


def generator_of(*parts: object) -> np.random.Generator:
    """Derive a seeded random generator."""
    return np.random.default_rng(int.from_bytes(hashlib.sha256(_name(parts).encode()).digest()[:16], "big"))


def _name(parts: tuple[object, ...]) -> str:
    return "cbmir_spark/" + "/".join(str(part) for part in parts)
