"""Locations: one spelling each, and nothing outside a root passes for something inside it."""

import gzip
from pathlib import Path

import pytest

from cbmir_spark import config, storage
from cbmir_spark.errors import InputError

STORAGE = config.load(environ={}).storage


@pytest.mark.parametrize(
    ("given", "canonical"),
    [
        ("/data/x/", "file:///data/x"),
        ("file:/data/x", "file:///data/x"),
        ("file:///data//x/../y", "file:///data/y"),
        ("/data/a%20b", "file:///data/a%20b"),
        ("s3://bucket/key/", "s3a://bucket/key"),
        ("s3a://bucket", "s3a://bucket"),
    ],
)
def test_one_spelling(given: str, canonical: str) -> None:
    assert storage.canonical(given) == canonical


@pytest.mark.parametrize("given", ["http://host/x", "hdfs://host/x", "s3a://", "gs://bucket/x"])
def test_other_schemes_are_refused(given: str) -> None:
    with pytest.raises(InputError):
        storage.canonical(given)


def test_is_below_sees_through_links_and_dots(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    root.mkdir(), outside.mkdir()
    (root / "link").symlink_to(outside)
    (outside / "x.dcm").touch()
    uri = storage.canonical(str(root))
    assert storage.is_below(uri + "/a/b.dcm", uri)
    assert not storage.is_below(uri, uri)
    assert not storage.is_below(uri + "-twin/b.dcm", uri)
    assert not storage.is_below(uri + "/link/x.dcm", uri)
    assert not storage.is_below(uri + "/../outside/x.dcm", uri)
    assert not storage.is_below("s3a://bucket/a/../b/x.dcm", "s3a://bucket/a")
    assert not storage.is_below("s3a://bucket2/a/x.dcm", "s3a://bucket")


def test_listing_finds_hidden_and_odd_names_and_reads_them_back(tmp_path: Path) -> None:
    names = ["a.dcm", ".hidden", "_underscore", "space and %20.dcm", "ünïcode.dcm", "deep/er/b"]
    for name in names:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    uri = storage.canonical(str(tmp_path))
    found = {o.uri: o for o in storage.list_objects(uri, STORAGE)}
    assert set(found) == {f"{uri}/{name}" for name in names}
    for name in names:
        assert storage.read_bytes(f"{uri}/{name}", STORAGE) == name.encode()
        assert found[f"{uri}/{name}"].size == len(name.encode())
    folders, objects = storage.list_folder(uri, STORAGE)
    assert folders == [f"{uri}/deep"]
    assert len(objects) == 5


def test_writing_replaces_whole_objects(tmp_path: Path) -> None:
    uri = storage.canonical(str(tmp_path / "new" / "object"))
    storage.write_bytes(uri, b"one", STORAGE)
    storage.write_bytes(uri, b"two", STORAGE)
    assert storage.read_bytes(uri, STORAGE) == b"two"
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["object"]
    assert storage.kind(uri, STORAGE) == "file"
    assert storage.kind(uri + "x", STORAGE) == "nothing"


@pytest.mark.parametrize("name", ["scan.gz", "scan.bz2", "scan.dcm.zst", "scan.lz4"])
def test_an_object_is_read_as_it_lies_whatever_its_name_says(tmp_path: Path, name: str) -> None:
    for content in (b"not packed at all", gzip.compress(b"packed")):
        (tmp_path / name).write_bytes(content)
        assert storage.read_bytes(storage.canonical(str(tmp_path / name)), STORAGE) == content
