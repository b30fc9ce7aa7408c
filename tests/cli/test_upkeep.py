"""`upgrade` and `forget` as their users meet them: what they print, and how they end."""

import json
from pathlib import Path

import pytest
from pyspark.sql import SparkSession

from cbmir_spark import __version__
from cbmir_spark.lake import publication
from cbmir_spark.lake.paths import LakePaths
from tests.conftest import Cbmir, MakeSettings
from tests.support.archives import sample
from tests.support.tiny_lake import Drawn, publish

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("on_the_tests_session")]


def test_forgetting_nobody_is_no_success(cbmir: Cbmir, tmp_path: Path) -> None:
    sample(tmp_path / "archive", "one.dcm", PatientID="SITE\\0001")
    lake = ("--lake", str(tmp_path / "lake"))
    assert cbmir("ingest", "--archive", str(tmp_path / "archive"), *lake)[0] == 0
    ended, out, err = cbmir("forget", "--patient", "SITE", *lake, "--json")
    assert ended == 4
    assert (json.loads(out)["images"], json.loads(out)["unknown"]) == (0, 1)
    assert "nothing was erased" in " ".join(err.split())
    ended, out, err = cbmir("forget", "--patient", "SITE\\0001", *lake, "--json")
    assert (ended, json.loads(out)["images"], err) == (0, 1, "")
    ended, _, err = cbmir("forget", "--patient", "SITE\\0001", *lake)
    assert ended == 4 and "nothing was erased" in " ".join(err.split())
    ended, _, err = cbmir("forget", "--issuer", "HOSPITAL", "--study", "1.2", *lake)
    assert ended != 0 and "patients that it belongs to" in err


def test_a_lake_of_this_version_needs_no_upgrade(cbmir: Cbmir, tmp_path: Path) -> None:
    sample(tmp_path / "archive", "one.dcm")
    lake = ("--lake", str(tmp_path / "lake"))
    assert cbmir("ingest", "--archive", str(tmp_path / "archive"), *lake)[0] == 0
    ended, out, _ = cbmir("upgrade", *lake)
    assert ended == 0 and "there is nothing to do" in " ".join(out.split())
    ended, _, err = cbmir("upgrade", "--skip", "everything", *lake)
    assert ended == 1 and "no change is called everything: give codestreams" in " ".join(err.split())
    # Another rule for patients concerns every image.
    exclude = ("--set", "privacy.patient_issuer=exclude")
    ended, out, _ = cbmir("upgrade", *lake, *exclude)
    assert ended == 0 and "`cbmir upgrade --apply` marks" in " ".join(out.split())
    ended, out, _ = cbmir("upgrade", "--apply", *lake, *exclude, "--json")
    assert ended == 0
    report = json.loads(out)
    assert (report["objects"], report["patients_before"], report["patients"]) == (1, "issuer", "whole")
    ended, out, _ = cbmir("upgrade", *lake, *exclude, "--json")
    assert (json.loads(out)["objects"], json.loads(out)["marked"]) == (0, 1)
    ended, out, _ = cbmir("ingest", "--archive", str(tmp_path / "archive"), *lake, *exclude, "--json")
    report = json.loads(out)
    assert (report["listed"], report["unchanged"], report["frames"]) == (1, 1, 0)
    _, out, _ = cbmir("upgrade", *lake, *exclude)
    assert "there is nothing to do" in " ".join(out.split())


def _files(lake: Path) -> dict[str, bytes]:
    """The content of every file of a lake but its leases."""
    leases = lake / "vault" / "leases"
    return {
        str(path): path.read_bytes() for path in lake.rglob("*") if path.is_file() and not path.is_relative_to(leases)
    }


def test_a_lake_of_a_later_version_is_refused_in_one_line(
    spark: SparkSession, make_settings: MakeSettings, cbmir: Cbmir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = make_settings()
    with monkeypatch.context() as later:
        later.setattr(publication, "LAKE_FORMAT", publication.LAKE_FORMAT + 1)
        later.setattr(publication, "__version__", "9.8.7")
        publish(spark, settings, [Drawn("1.2.3", "P", "CT", "CHEST")])
    (tmp_path / "archive").mkdir()
    files = _files(tmp_path / "lake")
    for arguments in (
        ["upgrade"],
        ["upgrade", "--apply"],
        ["ingest", f"--archive={tmp_path / 'archive'}"],
        ["train"],
        ["index"],
        ["remap"],
        ["forget", "--patient=P"],
    ):
        status, printed, said = cbmir(*arguments, f"--lake={settings.lake.uri}")
        assert (status, printed) == (1, ""), arguments
        newer, this = publication.LAKE_FORMAT + 1, publication.LAKE_FORMAT
        assert said == (
            f"cbmir: lake {LakePaths.of(settings.lake).uri} has format {newer}, written by cbmir_spark 9.8.7; this "
            f"version, {__version__}, reads formats up to {this}: install that version or a newer one\n"
        )
    assert _files(tmp_path / "lake") == files
