"""Typed values of data elements; one that is absent, empty or malformed gives None or nothing, never an error."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

Array = NDArray[Any]
Floats = NDArray[np.float32]


def value(ds: Dataset, keyword: str) -> Any:
    """Return an element's value as pydicom converts it; None where it is absent, empty or not valid for its VR."""
    try:
        found = ds.get(keyword)
    except Exception:
        return None
    return None if found is None or (isinstance(found, str) and not found) else found


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
            float(x) for x in (found if isinstance(found, Sequence) and not isinstance(found, str) else [found])
        )
    except (TypeError, ValueError, OverflowError):
        return ()
    return many if all(math.isfinite(x) for x in many) else ()


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
    groups = [per_frame[frame]] if per_frame is not None and frame < len(per_frame) else []
    for group in groups + items(ds, "SharedFunctionalGroupsSequence")[:1]:
        if found := items(group, keyword):
            return found[0]
    return None
