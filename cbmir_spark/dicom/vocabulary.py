"""Raw Modality and BodyPartExamined → one closed vocabulary, or UNKNOWN; pure lookups, run per task.

Body parts are the defined terms of DICOM PS3.16 Annex L (the general list, vessels folded to UNKNOWN), with
every class of the paper as a term of its own: HEAD, BRAIN and HEADNECK are three. Terms hold only A-Z and
digits, because they become the names of partition folders.
"""

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Mapping

from cbmir_spark.dicom.vocabulary_tables import (
    BODY_PARTS,
    COMBINATIONS,
    INSIDE,
    MODALITIES,
    MODALITY_SYNONYMS,
    NOISE,
    REGION_CODES,
    REVISION,
    SIDES,
    SYNONYMS,
    UNKNOWN,
)


class Vocabulary:
    """The closed vocabulary, widened by a site's own spellings; small, immutable, cheap to build in each task."""

    def __init__(self, extra: Mapping[str, str] | None = None) -> None:
        """`extra` maps raw BodyPartExamined values to terms of BODY_PARTS and comes before the built-in tables.

        Raises ValueError naming the term when one lies outside BODY_PARTS, or the key when it holds no letter.
        """
        self.extra: Mapping[str, str] = dict(extra or {})
        table: dict[str, str] = {}
        for raw, term in self.extra.items():
            if term not in BODY_PARTS:
                raise ValueError(f"vocabulary: {raw!r} maps to {term!r}, which is not a term of the closed list")
            key = _joined(_words(raw))
            if not key:
                raise ValueError(f"vocabulary: the raw value {raw!r} has no letters or digits to match")
            table[key] = term
        self._table: Mapping[str, str] = {**_BODY_PART_TABLE, **table}
        self._nameless = frozenset(key for key, term in table.items() if term == UNKNOWN)

    @property
    def version(self) -> str:
        """A short name that changes with every mapping in force, a site's own among them; a table records it."""
        combinations = sorted((sorted(parts), term) for parts, term in COMBINATIONS.items())
        words = [sorted(names) for names in (MODALITIES, BODY_PARTS, SIDES, NOISE)]
        text = json.dumps([words, combinations, MODALITY_SYNONYMS, self._table, INSIDE, REGION_CODES], sort_keys=True)
        return f"voc{REVISION}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    def is_settled(self, raw: str) -> bool:
        """Whether a BodyPartExamined has a term, or the site itself says that it has none."""
        return self.body_part(raw) != UNKNOWN or _joined(_words(raw)) in self._nameless

    def modality(self, raw: str | None) -> str:
        """Modality (0008,0060), or a label's spelling of it, as a term of MODALITIES."""
        key = _joined(_words(raw or ""))
        term = MODALITY_SYNONYMS.get(key, key)
        return term if term in MODALITIES else UNKNOWN

    def body_part(self, raw: str | None) -> str:
        """BodyPartExamined (0018,0015) as a term of BODY_PARTS.

        The whole value first, then without sides and noise words, then its words one by one: one term among
        them (or one combined region, as chest, abdomen and pelvis) decides, several that disagree are UNKNOWN.
        """
        words = _words(raw or "")
        for phrase in (words, [w for w in words if w not in SIDES], [w for w in words if w not in NOISE]):
            if term := self._table.get(_joined(phrase)):
                return term
        found = set(self._terms(words))
        found -= {region for term in found if (region := INSIDE.get(term))}
        if len(found) == 1:
            return found.pop()
        return COMBINATIONS.get(frozenset(found), UNKNOWN)

    def region(self, codes: Iterable[str]) -> str:
        """The first known code value of an Anatomic Region Sequence (0008,2218), SNOMED CT or SRT."""
        return next((REGION_CODES[c.strip().upper()] for c in codes if c.strip().upper() in REGION_CODES), UNKNOWN)

    def _terms(self, words: list[str]) -> Iterable[str]:
        """Terms of the longest phrases (up to three words) found from left to right, noise words passed over."""
        at = 0
        while at < len(words):
            for length in (3, 2, 1):
                phrase = words[at : at + length]
                if len(phrase) < length or (length == 1 and phrase[0] in NOISE):
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
    **{_joined(_words(key)): term for key, term in SYNONYMS.items()},
    **{term: term for term in BODY_PARTS},
}
