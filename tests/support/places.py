"""Folders to store objects in, of either kind of storage; fixtures for the conftest of a package of tests."""

import hashlib
from pathlib import Path
from typing import NamedTuple

import pytest

from cbmir_spark import config, storage
from cbmir_spark.config import StorageSettings
from tests.support.s3_server import S3Server

STORAGE = config.load(environ={}).storage


def s3_settings(endpoint: str, attempts: int = 8) -> StorageSettings:
    return STORAGE.replace(endpoint=endpoint, attempts=attempts)


class Place(NamedTuple):
    uri: str
    settings: StorageSettings


@pytest.fixture
def bucket(s3: S3Server, request: pytest.FixtureRequest) -> Place:
    """A folder in an empty bucket of a real S3 server."""
    name = "t-" + hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:20]
    s3.bucket(name)
    return Place(f"s3a://{name}/archive", s3_settings(s3.endpoint))


@pytest.fixture(params=["file", "s3a"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """An empty folder of either kind of storage."""
    if request.param == "file":
        return Place(storage.canonical(str(tmp_path)), STORAGE)
    found: Place = request.getfixturevalue("bucket")
    return found
