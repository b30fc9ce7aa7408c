"""The objects of tests/data/field.tar.xz, as scanners, gateways and archives write them, with what is right of each."""

import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

DATA = Path(__file__).parent.parent / "data" / "field.tar.xz"
# Levels of gray that rounding may add to the tolerance of a case.
ROUNDING = 0.02


def document(name: str) -> list[dict[str, Any]]:
    """One of the archive's JSON files."""
    with tarfile.open(DATA) as archive:
        member = archive.extractfile(f"field/{name}.json")
        assert member is not None
        cases: list[dict[str, Any]] = json.load(member)
    return cases


CASES = {case["name"]: case for case in document("expected")}
PEOPLE = {case["group"]: case["patients"] for case in CASES.values() if case.get("group")}


def unpack(folder: Path) -> Path:
    """Unpack everything below `folder`."""
    with tarfile.open(DATA) as archive:
        archive.extractall(folder, filter="data")
    return folder / "field"


def check_pictures(folder: Path, case: dict[str, Any], frames: dict[int, NDArray[np.uint8]]) -> None:
    """Compare the stored frames of a case, (256, 256) by number, with the right ones of the unpacked `folder`."""
    bound = case["tolerance"] + ROUNDING
    middle = sorted(frames)[len(frames) // 2]
    if case.get("picture"):
        assert _off(frames[middle], np.load(folder / case["picture"])["arr_0"]) <= bound, case["name"]
    if case.get("any_picture"):
        right = np.load(folder / case["any_picture"])
        assert min(_off(frames[middle], right[name]) for name in right.files) <= bound, case["name"]
    if case.get("frames"):
        right = np.load(folder / case["frames"])
        for number in right.files:
            assert _off(frames[int(number)], right[number]) <= bound, (case["name"], number)


def _off(picture: NDArray[np.uint8], right: NDArray[np.uint8]) -> float:
    """The mean difference in levels of gray."""
    return float(np.abs(picture.astype(int) - right).mean())
