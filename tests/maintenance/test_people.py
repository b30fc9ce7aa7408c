"""A thousand people with the Patient IDs of real archives: as many pseudonyms, and each can be forgotten alone."""

import csv
import random
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest
from pyspark.sql import SparkSession

from cbmir_spark.config import Settings
from cbmir_spark.errors import InputError
from cbmir_spark.ingest import job as ingest_job
from cbmir_spark.lake import columns as cols
from cbmir_spark.lake import delta, schemas
from cbmir_spark.lake.open import open_lake
from cbmir_spark.maintenance import forget, upgrade
from cbmir_spark.maintenance.forget import Request
from tests.conftest import MakeSettings
from tests.support.patients import Person, people, write

pytestmark = [pytest.mark.more, pytest.mark.timeout(600)]

PEOPLE = 1000
# A part of them has a second image.
TWICE = 100


@dataclass(frozen=True)
class Crowd:
    """A lake with an image of each person, and the pseudonym of each image's patient as TAGS has it."""

    settings: Settings
    images: dict[str, Person]  # by SOP Instance UID


def _patients(spark: SparkSession, settings: Settings) -> dict[str, str]:
    """Pseudonyms of patients by those of images."""
    return {row[cols.IMAGE_ID]: row[cols.PATIENT_ID] for row in open_lake(spark, settings).tags.collect()}


@pytest.fixture
def crowd(spark: SparkSession, make_settings: MakeSettings, tmp_path: Path) -> Crowd:
    archive = tmp_path / "archive"
    archive.mkdir()
    drawn = people(PEOPLE, seed=15)
    with warnings.catch_warnings():
        # Of pydicom, about character sets that it writes in another order.
        warnings.simplefilter("ignore")
        images = {write(person, archive, number): person for number, person in enumerate(drawn + drawn[:TWICE])}
    settings = make_settings(f"ingest.archive={archive}", "privacy.identity=true")
    report = ingest_job.run(spark, settings)
    assert report.outcomes == {cols.INGESTED: PEOPLE + TWICE}
    return Crowd(settings, images)


def test_each_person_has_a_pseudonym_and_is_forgotten_alone(spark: SparkSession, crowd: Crowd, tmp_path: Path) -> None:
    settings = crowd.settings
    lake = open_lake(spark, settings)
    of_image = _patients(spark, settings)
    found = {person: set[str]() for person in crowd.images.values()}
    for uid, person in crowd.images.items():
        found[person].add(of_image[lake.names.image(uid)])
    assert {len(names) for names in found.values()} == {1}
    assert len(found) == PEOPLE == len({name for names in found.values() for name in names})
    # The request of a person, as it would be typed, names exactly this person.
    asked = [Request("patient", person.patient_id, person.issuer or None) for person in found]
    owners = forget.owners_of(asked, lake.names)
    assert [{name} for _, name in owners] == list(found.values())
    rows = delta.read(spark, lake.paths.path(schemas.IDENTITY)).where("kind = 'patient'").collect()
    known = {(row[cols.IDENTIFIER], row[cols.ISSUER] or "", row[cols.PSEUDONYM]) for row in rows}
    assert known == {(each.patient_id, each.issuer, *found[each]) for each in found}

    left = list(found)
    random.Random(4).shuffle(left)
    for count in (1, 300):
        gone, left = left[:count], left[count:]
        _forget(spark, settings, gone, tmp_path / f"{count}.csv")
        assert sorted(set(_patients(spark, settings).values())) == sorted(name for each in left for name in found[each])
    # Nobody's identifier comes back.
    again = ingest_job.run(spark, settings)
    assert again.unchanged == again.listed
    identifiers = {row[0] for row in delta.read(spark, lake.paths.path(schemas.IDENTITY)).select("pseudonym").collect()}
    assert identifiers.isdisjoint(name for each in set(found) - set(left) for name in found[each])


def _forget(spark: SparkSession, settings: Settings, gone: Iterable[Person], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as handle:
        csv.writer(handle).writerows(
            [["kind", "identifier", "issuer"], *(["patient", each.patient_id, each.issuer] for each in gone)]
        )
    report = forget.run(spark, settings, forget.read_list(str(path), open_lake(spark, settings).store))
    assert (report.unknown, report.matched_nothing) == (0, False)


def test_without_issuers_equal_patient_ids_are_one_patient(
    spark: SparkSession, make_settings: MakeSettings, tmp_path: Path
) -> None:
    archive = tmp_path / "archive"
    archive.mkdir()
    for number, issuer in enumerate(["", "A", "B"]):
        write(Person("MRN-1", issuer, "", b"MRN-1", issuer.encode()), archive, number)
    settings = make_settings(f"ingest.archive={archive}", "privacy.patient_issuer=exclude")
    ingest_job.run(spark, settings)
    assert len(set(_patients(spark, settings).values())) == 1
    with pytest.raises(InputError, match="without their issuer"):
        forget.run(spark, settings, [Request("patient", "MRN-1", "A")])
    assert forget.run(spark, settings, [Request("patient", "MRN-1")]).images == 3


def test_a_tombstone_means_the_patient_of_its_own_rule(
    spark: SparkSession, make_settings: MakeSettings, tmp_path: Path
) -> None:
    archive = tmp_path / "archive"
    archive.mkdir()
    for number, issuer in enumerate(["", "A"]):
        write(Person("MRN-1", issuer, "", b"MRN-1", issuer.encode()), archive, number)
    settings = make_settings(f"ingest.archive={archive}")
    ingest_job.run(spark, settings)
    assert forget.run(spark, settings, [Request("patient", "MRN-1")]).images == 1
    # Without issuers the other image has the pseudonym of the patient who was erased.
    without = settings.override({"privacy.patient_issuer": "exclude"})
    assert upgrade.run(spark, without, apply=True).objects == 1
    with pytest.raises(InputError, match="1 images wait to be read again"):
        forget.run(spark, without, [Request("patient", "MRN-1")])
    ingest_job.run(spark, without)
    left = _patients(spark, without)
    assert len(left) == 1
    report = forget.run(spark, without, [Request("patient", "nobody")])
    assert report.matched_nothing and report.images == 0
    assert _patients(spark, without) == left
    assert forget.run(spark, without, [Request("patient", "MRN-1")]).images == 1
