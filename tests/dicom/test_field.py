"""Objects as scanners, gateways and archives really write them: their outcome, picture, tags and identifiers.

What they are is in ../data/README.md. Each was made after a public report, which `expected.json` names.
"""

from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

from cbmir_spark import config
from cbmir_spark.dicom.read import Instance, NotAnImage, Preprocessing, Rejected, read_instance
from tests.support.dicom_files import VOCABULARY
from tests.support.field import CASES, PEOPLE, check_pictures, unpack


@pytest.fixture(scope="module")
def field(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack(tmp_path_factory.mktemp("field"))


@cache
def preprocessing() -> Preprocessing:
    pixels = config.load(environ={}).pixels
    return Preprocessing(pixels.aspect, pixels.windows, pixels.percentiles, pixels.max_frames, pixels.frames)


def outcome(path: Path) -> tuple[str, str | None, Instance | None]:
    try:
        instance = read_instance(path.read_bytes(), preprocessing(), VOCABULARY)
    except NotAnImage as error:
        return "not_an_image", error.reason, None
    except Rejected as error:
        return "rejected", error.reason, None
    return "ingested", None, instance


@pytest.mark.parametrize("name", CASES)
def test_each_object_is_read_as_what_it_is(field: Path, name: str) -> None:
    case = CASES[name]
    found, reason, instance = outcome(field / case["path"])
    if reason is not None and reason in case.get("also", ()):
        return
    assert found == case["outcome"]
    assert not case["reasons"] or reason in case["reasons"]
    if instance is None:
        return
    check_pictures(field, case, {frame.number: frame.pixels for frame in instance.frames})
    tags = {tag: getattr(instance.tags, tag) for tag in case["tags"]}
    assert tags == pytest.approx(case["tags"], abs=1e-6, nan_ok=True)


@pytest.mark.parametrize("group", [group for group in PEOPLE if group != "patient_empty"])
def test_people_are_neither_merged_nor_split(field: Path, group: str) -> None:
    """Objects without a Patient ID belong to a patient of their study, which tags do not show."""
    people = defaultdict(list)
    for case in CASES.values():
        if case.get("group") == group:
            _, _, instance = outcome(field / case["path"])
            assert instance is not None
            people[instance.tags.patient_id_raw].append(case["name"])
    assert len(people) == PEOPLE[group], dict(people)
