"""An ingest of objects as scanners, gateways and archives write them, and of keys as people name them."""

from collections import defaultdict
from pathlib import Path

import boto3
import numpy as np
import pytest
from numpy.typing import NDArray
from pyspark.sql import SparkSession

from cbmir_spark import storage
from cbmir_spark.ingest import job as ingest_job
from cbmir_spark.lake import columns as cols
from cbmir_spark.lake.open import open_lake
from tests.conftest import MakeSettings
from tests.support.field import CASES, PEOPLE, check_pictures, document, unpack
from tests.support.s3_server import CREDENTIALS, S3Server

pytestmark = pytest.mark.slow


def test_each_object_has_its_outcome_picture_tags_and_patient(
    spark: SparkSession, make_settings: MakeSettings, tmp_path: Path
) -> None:
    field = unpack(tmp_path)
    settings = make_settings(f"ingest.archive={field / 'archive'}")
    report = ingest_job.run(spark, settings)
    assert report.reasons.keys().isdisjoint({"INTERNAL", "CRASHED", "TIMEOUT"})
    lake = open_lake(spark, settings)
    sources = {storage.local_path(row[cols.URI]): row for row in lake.sources.collect()}
    tags = {row[cols.IMAGE_ID]: row.asDict() for row in lake.tags.collect()}
    frames: defaultdict[str, dict[int, NDArray[np.uint8]]] = defaultdict(dict)
    for row in lake.pixels.collect():
        frames[row[cols.IMAGE_ID]][row[cols.FRAME]] = np.frombuffer(row[cols.PIXELS_COLUMN], "u1").reshape(256, 256)
    people: dict[str, set[str]] = {group: set() for group in PEOPLE}
    for name, case in CASES.items():
        source = sources[str(field / case["path"])]
        if source[cols.REASON] is not None and source[cols.REASON] in case.get("also", ()):
            continue
        assert source[cols.OUTCOME] == case["outcome"], name
        assert not case["reasons"] or source[cols.REASON] in case["reasons"], name
        if source[cols.IMAGE_ID] is None:
            continue
        found = tags[source[cols.IMAGE_ID]]
        check_pictures(field, case, frames[source[cols.IMAGE_ID]])
        assert {tag: found[tag] for tag in case["tags"]} == pytest.approx(case["tags"], abs=1e-6, nan_ok=True), name
        if case.get("group"):
            people[case["group"]].add(found[cols.PATIENT_ID])
    assert {group: len(patients) for group, patients in people.items()} == PEOPLE


def test_keys_of_object_storage_are_read_as_they_are_named(
    spark: SparkSession, make_settings: MakeSettings, s3: S3Server, tmp_path: Path
) -> None:
    field = unpack(tmp_path)
    objects, bucket = document("s3"), s3.bucket("field").name
    client = boto3.client(
        "s3",
        region_name="us-east-1",
        endpoint_url=s3.endpoint,
        aws_access_key_id=CREDENTIALS["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=CREDENTIALS["AWS_SECRET_ACCESS_KEY"],
    )
    for each in objects:
        content = Path(each["file"].replace("ROOT", str(field))).read_bytes()
        client.put_object(Bucket=bucket, Key=f"pacs/{each['key']}", Body=content)
    settings = make_settings(f"ingest.archive=s3a://{bucket}/pacs", f"storage.endpoint={s3.endpoint}")
    report = ingest_job.run(spark, settings)
    assert report.listed == len(objects)
    found = {
        row[cols.URI]: (row[cols.OUTCOME], row[cols.REASON]) for row in open_lake(spark, settings).sources.collect()
    }
    assert found.keys() == {f"s3a://{bucket}/pacs/{each['key']}" for each in objects}
    assert {uri.rpartition("/")[2]: why for uri, why in found.items() if why[0] != cols.INGESTED} == {
        "empty.dcm": (cols.REJECTED, "EMPTY")
    }
