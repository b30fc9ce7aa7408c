"""Ingest stores nothing of what was forgotten, and IDENTITY only what TAGS still has."""

from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file
from pydicom.uid import UID
from pyspark.sql import SparkSession

from cbmir_spark import storage
from cbmir_spark.ingest import job as ingest_job
from cbmir_spark.ingest import parse
from cbmir_spark.lake import columns as cols
from cbmir_spark.lake import delta, identity, pseudonyms, schemas
from cbmir_spark.lake.paths import LakePaths
from cbmir_spark.maintenance import forget
from cbmir_spark.maintenance.forget import Request
from cbmir_spark.retrieval import query_files
from cbmir_spark.storage import ObjectStore
from tests.conftest import MakeSettings

pytestmark = pytest.mark.slow


def _object(path: Path, number: int, patient: str, shift: int = 0) -> None:
    """A CT slice of a patient, in the one study that each patient has."""
    ds = pydicom.dcmread(str(get_testdata_file("CT_small.dcm")))
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = UID(f"1.2.826.{number}")
    ds.SeriesInstanceUID = UID(f"1.2.827.{number}")
    ds.StudyInstanceUID = UID(f"1.2.828.{len(patient)}")
    ds.PatientID = patient
    ds.PixelData = np.roll(ds.pixel_array, 8 * number + shift).tobytes()
    path.parent.mkdir(exist_ok=True)
    ds.save_as(path)


def test_ingest_keeps_identities_while_there_are_images_and_nothing_of_the_forgotten(
    spark: SparkSession, make_settings: MakeSettings, tmp_path: Path
) -> None:
    archive = tmp_path / "archive"
    for number, patient in enumerate(["MRN-1", "MRN-1", "MRN-OTHER"]):
        _object(archive / f"{number}.dcm", number, patient)
    settings = make_settings(f"ingest.archive={archive}", "privacy.identity=true")
    lake = LakePaths.of(settings.lake)
    ingest_job.run(spark, settings)
    names = pseudonyms.load(settings.privacy, lake.vault_folder)

    def identities() -> dict[tuple[str, str], str]:
        rows = delta.read(spark, lake.path(schemas.IDENTITY)).collect()
        return {(row[cols.KIND], row[cols.IDENTIFIER]): row[cols.PSEUDONYM] for row in rows}

    def outcomes() -> dict[str, tuple[str, str | None, str | None]]:
        rows = delta.read(spark, lake.path(schemas.SOURCES)).collect()
        return {
            row[cols.URI].rpartition("/")[2]: (row[cols.OUTCOME], row[cols.REASON], row[cols.DIGEST]) for row in rows
        }

    known = identities()
    assert len(known) == 3 + 3 + 2 + 2
    assert known["patient", "MRN-1"] == names.patient("MRN-1")
    assert known["image", "1.2.826.2"] == names.image("1.2.826.2")
    # A correction moves an image to another patient, another object leaves the archive: what is left of it is known.
    (archive / "1.dcm").unlink()
    _object(archive / "2.dcm", 2, "MRN-CORRECTED")
    ingest_job.run(spark, settings)
    assert {text for kind, text in identities() if kind == "patient"} == {"MRN-1", "MRN-CORRECTED"}
    assert {text for kind, text in identities() if kind == "image"} == {"1.2.826.0", "1.2.826.2"}

    report = forget.run(spark, settings, [Request("patient", "MRN-1")])
    assert (report.images, report.places["identity"].rows) == (1, 4)
    forgotten = (cols.REJECTED, cols.ERASED, None)
    assert outcomes()["0.dcm"] == forgotten
    # Neither an object that is written again nor one that was never seen brings the patient back.
    _object(archive / "0.dcm", 0, "MRN-1", shift=3)
    _object(archive / "new.dcm", 7, " MRN-1 ")
    again = ingest_job.run(spark, settings)
    assert again.reasons == {cols.ERASED: 2} and (again.read, again.unchanged) == (2, 1)
    assert outcomes()["0.dcm"] == outcomes()["new.dcm"] == forgotten
    tags = delta.read(spark, lake.path(schemas.TAGS), again.published.tags).collect()
    assert [row[cols.PATIENT_ID] for row in tags] == [names.patient("MRN-CORRECTED")]
    assert ("patient", "MRN-1") not in identities()
    parser = parse.Parser(
        ObjectStore(settings.storage),
        settings.ingest,
        parse.preprocessing_of(settings.pixels),
        {},
        names,
        identity.tombstones(spark, lake),
    )
    reader = query_files.Reader("", (storage.canonical(str(archive)),), parser, frozenset())
    asked = query_files.read_uri(storage.canonical(str(archive / "0.dcm")), None, False, reader)
    assert asked == {cols.STATUS: "not_found", cols.REASON: cols.ERASED}
