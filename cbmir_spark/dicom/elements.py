"""Typed values of data elements; one that is absent, empty or malformed gives None or nothing, never an error."""

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.charset import convert_encodings, decode_bytes
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as Items

Array = NDArray[Any]
Floats = NDArray[np.float32]


def value(ds: Dataset, keyword: str) -> Any:
    """Return an element's value as pydicom converts it; None where it is absent, empty or not valid for its VR."""
    try:
        found = ds.get(keyword)
    except Exception:
        return None
    return None if found is None or (isinstance(found, str) and not found) else found


def is_given(ds: Dataset, keyword: str) -> bool:
    """Tell whether an element holds anything but padding, valid or not."""
    try:
        element = ds.get_item(keyword)
    except Exception:
        return False
    raw = None if element is None else element.value
    return bool(raw.strip(b" \0")) if isinstance(raw, bytes) else raw is not None and bool(str(raw).strip(" \0"))


def number(ds: Dataset, keyword: str) -> float | None:
    """Return the first value of a numeric element as a finite float, else None."""
    return next(iter(numbers(ds, keyword)), None)


def numbers(ds: Dataset, keyword: str) -> tuple[float, ...]:
    """Return all values of a numeric element; empty unless every one is a finite number."""
    found = value(ds, keyword)
    if found is None or isinstance(found, bytes):
        return ()
    try:
        many = tuple(
            _float(x) for x in (found if isinstance(found, Sequence) and not isinstance(found, str) else [found])
        )
    except (TypeError, ValueError, OverflowError):
        return ()
    return many if all(math.isfinite(x) for x in many) else ()


def _float(found: Any) -> float:
    """Convert one value; some writers put a comma for the point of a decimal string."""
    return float(found.replace(",", ".") if isinstance(found, str) else found)


def identifier(ds: Dataset, keyword: str) -> str | None:
    """Return an identifier of one value, whole: a backslash in it separates nothing; None where it is absent or empty.

    Bytes that are not in the declared character set are read as Latin-1, so that different bytes stay different
    identifiers. Blanks and NULs at both ends are padding (PS3.5 section 6.2, LO).
    """
    try:
        element = ds.get_item(keyword)
    except Exception:
        return None
    raw = element.value if element is not None else None
    if isinstance(raw, bytes):
        text = _decoded(raw, ds)
    else:
        many = raw if isinstance(raw, Sequence) and not isinstance(raw, str) else [raw]
        text = "\\".join(str(each) for each in many if each is not None)
    return text.strip(" \0") or None


_ESCAPE = re.compile(r"\x1b[$(),\-./]{1,3}[0-~]")
_CHARSET = re.compile(r"ISO[ _-]*(2022)?[ _-]*(?:IR)?[ _-]*(\d{1,3})")
# Of these, the standard has one form alone (PS3.3 section C.12.1.1.2).
_ALWAYS_EXTENDED, _NEVER_EXTENDED = ("58", "87", "149", "159"), ("192",)


def _decoded(raw: bytes, ds: Dataset) -> str:
    if raw.isascii() and b"\x1b" not in raw:
        return raw.decode("ascii")
    encodings = _encodings(ds)
    if encodings[0] == "iso8859" and (len(encodings) == 1 or b"\x1b" not in raw):
        # The default repertoire has ASCII alone; some writers leave out the declaration, or the escape sequence.
        for encoding in ("utf-8", *encodings[1:]):
            try:
                return raw.decode(encoding)
            except (LookupError, UnicodeError):
                continue
        return raw.decode("latin-1")
    try:
        text: str = decode_bytes(raw, encodings, set())
    except (LookupError, UnicodeError, ValueError, TypeError):
        # Python has codecs of this name that decode no text.
        return raw.decode("latin-1")
    # pydicom leaves the escape sequences of some character sets in the text.
    return raw.decode("latin-1") if "\ufffd" in text else _ESCAPE.sub("", text)


def _encodings(ds: Dataset) -> list[str]:
    """Return Python's encodings for Specific Character Set (0008,0005), in other spellings of its terms too."""
    declared = value(ds, "SpecificCharacterSet")
    terms = [declared] if isinstance(declared, str) or declared is None else list(declared)
    return list(convert_encodings([_spelled(str(term or "")) for term in terms] or [""]))


def _spelled(term: str) -> str:
    match = _CHARSET.fullmatch(term.strip().upper())
    if match is None:
        return term.strip()
    extended = (match[1] or match[2] in _ALWAYS_EXTENDED) and match[2] not in _NEVER_EXTENDED
    return f"ISO 2022 IR {match[2]}" if extended else f"ISO_IR {match[2]}"


def items(ds: Dataset, keyword: str) -> list[Dataset]:
    """Return the items of a sequence element; empty where it is absent or not a sequence."""
    found = value(ds, keyword)
    try:
        return [item for item in found if isinstance(item, Dataset)] if found is not None else []
    except TypeError:
        return []


def functional_group(ds: Dataset, frame: int, keyword: str) -> Dataset | None:
    """Return a functional group of a frame, else the shared one (PS3.3 section C.7.6.16); None where neither exists."""
    per_frame = value(ds, "PerFrameFunctionalGroupsSequence")
    groups = [per_frame[frame]] if isinstance(per_frame, Items) and frame < len(per_frame) else []
    for group in groups + items(ds, "SharedFunctionalGroupsSequence")[:1]:
        if found := items(group, keyword):
            return found[0]
    return None
