"""What the demo decides by itself; that the whole of it works is the end-to-end test's matter."""

import csv
import io

import pytest

from cbmir_spark import storage
from cbmir_spark.cli import demo
from cbmir_spark.errors import InputError
from tests.conftest import MakeSettings


def test_everything_stays_below_the_demo_folder(make_settings: MakeSettings) -> None:
    given = make_settings(
        "lake.vault=s3a://hospital/vault",
        "ingest.archive=s3a://hospital/archive",
        "retrieval.out=s3a://hospital/results",
        "retrieval.model=models:/cbmir@champion",
        "index.model=runs:/abc",
        "evaluation.out=s3a://hospital/evaluation",
        "training.epochs=2",
        "demo.folder=/tmp/demo",
    )
    inside = demo.inside(given)
    assert inside.lake.uri == "file:///tmp/demo/lake" and inside.lake.vault is None
    assert inside.ingest.archive == "file:///tmp/demo/archive"
    assert inside.retrieval.queries == "file:///tmp/demo/queries.csv"
    assert (inside.retrieval.out, inside.retrieval.model, inside.index.model, inside.evaluation.out) == (None,) * 4
    assert "hospital" not in str(inside.masked())
    # What the user chose about the work itself stays.
    assert inside.training.epochs == 2 and inside.privacy == given.privacy


def test_a_demo_in_object_storage_is_refused(make_settings: MakeSettings) -> None:
    with pytest.raises(InputError, match="local folder"):
        demo.inside(make_settings("demo.folder=s3a://bucket/demo"))


def test_a_query_list_is_csv_that_reads_back() -> None:
    rows = [
        {"query_id": "a", "uri": 'file:///odd, "name"/x.dcm', "image_id": ""},
        {"query_id": "b", "uri": "", "image_id": "0" * 32},
    ]
    text = demo.as_csv(rows).decode("utf-8")
    assert list(csv.DictReader(io.StringIO(text))) == rows
    assert storage.canonical(rows[0]["uri"]) == rows[0]["uri"]
