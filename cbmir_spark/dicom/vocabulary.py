"""Map raw Modality and BodyPartExamined values to a closed vocabulary, or to UNKNOWN; pure lookups, run per task.

Body parts are the defined terms of DICOM PS3.16 Annex L (the general list; vessels map to UNKNOWN). Every class of the
paper is a separate term: HEAD, BRAIN and HEADNECK are three. Terms consist of A-Z and digits alone, because they name
partition folders.
"""

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Mapping

from cbmir_spark.dicom.region_codes import REGION_CODES
from cbmir_spark.dicom.vocabulary_tables import (
    BODY_PART_SYNONYMS,
    BODY_PARTS,
    COMBINED_REGIONS,
    ENCLOSING_REGION,
    FILLER_WORDS,
    LATERALITY_WORDS,
    MODALITIES,
    MODALITY_SYNONYMS,
    UNKNOWN,
    VOCABULARY_REVISION,
)
from cbmir_spark.errors import ConfigError

__all__ = ["Vocabulary"]


class Vocabulary:
    """The closed vocabulary with a site's spellings added; immutable, and cheap to build in each task."""

    def __init__(self, extra: Mapping[str, str] | None = None) -> None:
        """Add a mapping from raw BodyPartExamined values to terms of BODY_PARTS; it overrides the built-in tables.

        Raises ConfigError for a term outside BODY_PARTS, and for a raw value without letters or digits.
        """
        self.extra: Mapping[str, str] = dict(extra or {})
        table: dict[str, str] = {}
        for raw, term in self.extra.items():
            if term not in BODY_PARTS:
                raise ConfigError(
                    f"vocabulary.body_parts: {raw!r} maps to {term!r}, which is not a known body part: "
                    "`cbmir vocabulary` lists them"
                )
            key = _joined(_words(raw))
            if not key:
                raise ConfigError(f"vocabulary.body_parts: {raw!r} has no letters or digits to match: remove it")
            table[key] = term
        self._table: Mapping[str, str] = {**_BODY_PART_TABLE, **table}
        self._without_term = frozenset(key for key, term in table.items() if term == UNKNOWN)

    @property
    def version(self) -> str:
        """A short name that changes with every mapping, the site's included; tables record it."""
        combinations = sorted((sorted(parts), term) for parts, term in COMBINED_REGIONS.items())
        words = [sorted(names) for names in (MODALITIES, BODY_PARTS, LATERALITY_WORDS, FILLER_WORDS)]
        tables = [MODALITY_SYNONYMS, self._table, ENCLOSING_REGION, REGION_CODES]
        text = json.dumps([words, combinations, *tables], sort_keys=True)
        return f"voc{VOCABULARY_REVISION}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    def is_mapped(self, raw: str) -> bool:
        """Tell whether a BodyPartExamined has a term, or the site maps it to UNKNOWN on purpose."""
        return self.body_part(raw) != UNKNOWN or _joined(_words(raw)) in self._without_term

    def modality(self, raw: str | None) -> str:
        """Map Modality (0008,0060), or another spelling of it, to a term of MODALITIES."""
        key = _joined(_words(raw or ""))
        term = MODALITY_SYNONYMS.get(key, key)
        return term if term in MODALITIES else UNKNOWN

    def body_part(self, raw: str | None) -> str:
        """Map BodyPartExamined (0018,0015) to a term of BODY_PARTS.

        Looks up the whole value, then the value without laterality and filler words, then its words one by one.
        Among those a single term, or a combined region such as chest, abdomen and pelvis, decides; several terms
        that disagree give UNKNOWN.
        """
        words = _words(raw or "")
        without_side = [word for word in words if word not in LATERALITY_WORDS]
        without_filler = [word for word in words if word not in FILLER_WORDS]
        for phrase in (words, without_side, without_filler):
            if term := self._table.get(_joined(phrase)):
                return term
        found = set(self._terms(words))
        found -= {region for term in found if (region := ENCLOSING_REGION.get(term))}
        if len(found) == 1:
            return found.pop()
        return COMBINED_REGIONS.get(frozenset(found), UNKNOWN)

    def region(self, codes: Iterable[str]) -> str:
        """Map the first known code of an Anatomic Region Sequence (0008,2218), SNOMED CT or SRT, to a term."""
        return next((REGION_CODES[c.strip().upper()] for c in codes if c.strip().upper() in REGION_CODES), UNKNOWN)

    def _terms(self, words: list[str]) -> Iterable[str]:
        """Find terms from left to right, of the longest phrases (up to three words) first; skip filler words."""
        at = 0
        while at < len(words):
            for length in (3, 2, 1):
                phrase = words[at : at + length]
                if len(phrase) < length or (length == 1 and phrase[0] in FILLER_WORDS):
                    continue
                term = self._table.get(_joined(phrase))
                if term is not None and term != UNKNOWN:
                    yield term
                    at += length
                    break
            else:
                at += 1


def _words(raw: str) -> list[str]:
    plain = unicodedata.normalize("NFKD", raw).encode("ascii", "ignore").decode("ascii").upper()
    return re.findall(r"[A-Z0-9]+", plain)


def _joined(words: Iterable[str]) -> str:
    return "".join(words)


_BODY_PART_TABLE: Mapping[str, str] = {
    **{_joined(_words(key)): term for key, term in BODY_PART_SYNONYMS.items()},
    **{term: term for term in BODY_PARTS},
}
