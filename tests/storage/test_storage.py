"""Locations: one spelling each, nothing outside a root passes for something inside it, and storage of both kinds."""

import gzip
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pytest

from cbmir_spark import config, storage
from cbmir_spark.config import StorageSettings
from cbmir_spark.errors import AccessDenied, InputError, StorageError
from cbmir_spark.storage import ObjectStore
from cbmir_spark.storage import s3 as storage_s3
from tests.support.fault_proxy import Answer, Before, CutReply, DropReply, FaultProxy, Reset, Rule, Stall, each, share
from tests.support.s3_server import S3Server

# The S3 server may have to be built first.
pytestmark = pytest.mark.timeout(900)
STORAGE = config.load(environ={}).storage
NAMES = ["a.dcm", ".hidden", "_underscore", "space and %20+&.dcm", "ünïcode.dcm", "deep/er/b", "deep/c", "scan.gz"]


def s3_settings(endpoint: str, attempts: int = 8) -> StorageSettings:
    return STORAGE.replace(endpoint=endpoint, attempts=attempts)


@pytest.fixture
def new_clients() -> Iterator[None]:
    """Clients are kept by settings; what a test does to credentials must not outlive it."""
    storage_s3._client_of.cache_clear()
    yield
    storage_s3._client_of.cache_clear()


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


@pytest.mark.parametrize(
    ("given", "canonical"),
    [
        ("/data/x/", "file:///data/x"),
        ("file:/data/x", "file:///data/x"),
        ("file:///data//x/../y", "file:///data/y"),
        ("/data/a%20b", "file:///data/a%20b"),
        ("s3://bucket/key/", "s3a://bucket/key"),
        ("s3a://bucket", "s3a://bucket"),
        ("s3a://bucket/a//b/", "s3a://bucket/a//b"),
        ("hdfs://host:8020/x/", "hdfs://host:8020/x"),
        ("hdfs:/x", "hdfs:///x"),
        ("abfss://box@account.example/x%20y", "abfss://box@account.example/x%20y"),
    ],
)
def test_one_spelling(given: str, canonical: str) -> None:
    assert storage.canonical(given) == canonical


@pytest.mark.parametrize("given", ["http://host/x", "https://host/x", "ftp://host/x", "s3a://", "s4://bucket/x"])
def test_a_scheme_that_nothing_reads_is_refused(given: str) -> None:
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


@pytest.mark.parametrize("uri", ["hdfs://host/x", "gs://bucket/x"])
def test_only_archives_may_lie_where_hadoop_alone_reads(uri: str) -> None:
    assert storage.canonical(uri) == uri
    assert not storage.is_native(uri) and storage.is_native("s3a://b/x") and storage.is_native("file:///x")
    calls: list[Callable[[], object]] = [
        lambda: ObjectStore(STORAGE).kind(uri),
        lambda: ObjectStore(STORAGE).find(uri),
        lambda: ObjectStore(STORAGE).read(uri),
        lambda: ObjectStore(STORAGE).read_bytes(uri),
        lambda: ObjectStore(STORAGE).list_folder(uri),
        lambda: list(ObjectStore(STORAGE).list_objects(uri)),
        lambda: ObjectStore(STORAGE).write_bytes(uri, b""),
        lambda: ObjectStore(STORAGE).delete_folder(uri),
        lambda: ObjectStore(STORAGE).create_if_absent(uri, b""),
        lambda: ObjectStore(STORAGE).replace_if_match(uri, b"", "etag"),
        lambda: ObjectStore(STORAGE).seconds_old(uri),
    ]
    for call in calls:
        with pytest.raises(InputError, match="only archives"):
            call()


def _put(place: Place, *names: str) -> None:
    for name in names:
        ObjectStore(place.settings).write_bytes(f"{place.uri}/{name}", name.encode())


def test_listing_finds_hidden_and_odd_names_and_reads_them_back(place: Place) -> None:
    _put(place, *NAMES)
    found = {o.uri: o for o in ObjectStore(place.settings).list_objects(place.uri)}
    assert set(found) == {f"{place.uri}/{name}" for name in NAMES}
    for name in NAMES:
        uri = f"{place.uri}/{name}"
        # Listing, reading and looking for it must say the very same, or an unchanged object is read every night.
        assert ObjectStore(place.settings).read(uri) == (name.encode(), found[uri])
        assert ObjectStore(place.settings).find(uri) == found[uri]
        assert found[uri].size == len(name.encode())
        assert abs((datetime.now(UTC) - found[uri].modified).total_seconds()) < 60
        etag = hashlib.md5(name.encode()).hexdigest()
        assert found[uri].etag == (None if storage.is_local(uri) else etag)
    folders, objects = ObjectStore(place.settings).list_folder(place.uri)
    assert folders == [f"{place.uri}/deep"]
    assert [o.uri for o in objects] == sorted(f"{place.uri}/{name}" for name in NAMES if "/" not in name)
    assert ObjectStore(place.settings).list_folder(f"{place.uri}/deep")[0] == [f"{place.uri}/deep/er"]


def test_what_stands_at_a_location(place: Place) -> None:
    _put(place, "deep/c", "deeper/d")
    for name, kind in [("deep/c", "file"), ("deep", "folder"), ("dee", "nothing"), ("deep/c/d", "nothing")]:
        assert ObjectStore(place.settings).kind(f"{place.uri}/{name}") == kind
        assert (ObjectStore(place.settings).find(f"{place.uri}/{name}") is not None) == (kind == "file")
    assert ObjectStore(place.settings).kind(place.uri) == "folder"


def test_writing_replaces_whole_objects(place: Place) -> None:
    uri = f"{place.uri}/new/object"
    ObjectStore(place.settings).write_bytes(uri, b"one")
    ObjectStore(place.settings).write_bytes(uri, pa.py_buffer(b"two"))
    assert ObjectStore(place.settings).read_bytes(uri) == b"two"
    assert [o.uri for o in ObjectStore(place.settings).list_objects(place.uri)] == [uri]


def test_deleting_a_folder_leaves_its_neighbours(place: Place) -> None:
    _put(place, *NAMES, "deeper/d")
    ObjectStore(place.settings).delete_folder(f"{place.uri}/deep")
    ObjectStore(place.settings).delete_folder(f"{place.uri}/never/was")
    left = {o.uri for o in ObjectStore(place.settings).list_objects(place.uri)}
    assert left == {f"{place.uri}/{name}" for name in [*NAMES, "deeper/d"] if not name.startswith("deep/")}


def test_what_is_not_there_raises_without_its_name(place: Place) -> None:
    _put(place, "deep/c")
    for name in ("ZQXJV", "ZQXJV/ZQXJV", "deep/c/ZQXJV", "deep"):
        with pytest.raises(FileNotFoundError) as caught:
            ObjectStore(place.settings).read(f"{place.uri}/{name}")
        assert place.uri not in str(caught.value) and "ZQXJV" not in str(caught.value)


@pytest.mark.parametrize("name", ["scan.gz", "scan.bz2", "scan.dcm.zst", "scan.lz4"])
def test_an_object_is_read_as_it_lies_whatever_its_name_says(tmp_path: Path, name: str) -> None:
    for content in (b"not packed at all", gzip.compress(b"packed")):
        (tmp_path / name).write_bytes(content)
        assert ObjectStore(STORAGE).read_bytes(storage.canonical(str(tmp_path / name))) == content


def test_names_that_are_not_text_get_a_spelling_that_leads_back(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/M\xfcller"
    os.mkdir(folder)
    # The last one is the UTF-8 of the character that stands for the byte 0xFC.
    for name in (b"\xfc.dcm", b"\xc3\xbc.dcm", b"\xee\xbf\xbc.dcm", b"\xff\xfe"):
        Path(os.fsdecode(folder + b"/" + name)).write_bytes(name)
    found = list(ObjectStore(STORAGE).list_objects(storage.canonical(str(tmp_path))))
    assert len({o.uri.encode("utf-8") for o in found}) == 4
    for each_one in found:
        assert storage.canonical(each_one.uri) == each_one.uri
        assert (
            ObjectStore(STORAGE).read_bytes(each_one.uri)
            == os.fsencode(storage.local_path(each_one.uri)).rpartition(b"/")[2]
        )
    assert storage.canonical(os.fsdecode(folder)) == found[0].uri.rpartition("/")[0]


def test_links_are_followed_but_never_round_in_circles(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    for folder in (root / "a", root / "b", outside):
        folder.mkdir(parents=True)
        (folder / "x.dcm").touch()
    (root / "elsewhere").symlink_to(outside)
    (root / "file link").symlink_to(root / "a/x.dcm")
    (root / "nowhere").symlink_to(root / "absent")
    (root / "self").symlink_to(".")
    (root / "up").symlink_to("..")
    (root / "a/to b").symlink_to(root / "b")
    (root / "b/to a").symlink_to(root / "a")
    os.mkfifo(root / "pipe")
    uri = storage.canonical(str(root))
    found = sorted(o.uri.removeprefix(uri + "/") for o in ObjectStore(STORAGE).list_objects(uri))
    assert found == ["a/to b/x.dcm", "a/x.dcm", "b/to a/x.dcm", "b/x.dcm", "elsewhere/x.dcm", "file link"]
    with pytest.raises(FileNotFoundError):
        ObjectStore(STORAGE).read(f"{uri}/pipe")


def test_a_folder_that_goes_while_it_is_listed_takes_no_other_with_it(tmp_path: Path) -> None:
    """What a listing leaves out is taken for deleted, so it may leave out what is gone and nothing else."""
    for name in ("a", "b", "c"):
        (tmp_path / "archive" / name).mkdir(parents=True)
        (tmp_path / "archive" / name / "one.dcm").touch()
    listed = ObjectStore(STORAGE).list_objects((tmp_path / "archive").as_uri())
    found = [next(listed).uri]
    shutil.rmtree(tmp_path / "archive" / "b")
    found += [each.uri for each in listed]
    assert [uri[-9:] for uri in found] == ["a/one.dcm", "c/one.dcm"]
    shutil.rmtree(tmp_path / "archive")
    with pytest.raises(FileNotFoundError):
        list(ObjectStore(STORAGE).list_objects((tmp_path / "archive").as_uri()))


def test_a_folder_that_may_not_be_read_fails_the_listing() -> None:
    """As another user, since root may read everything; below a folder that this user can reach."""
    folder = Path(tempfile.mkdtemp())
    try:
        folder.chmod(0o755)
        (folder / "ZQXJV").mkdir()
        (folder / "ZQXJV" / "x.dcm").touch()
        (folder / "ZQXJV").chmod(0o000)
        uri = storage.canonical(str(folder))
        assert os.getuid() != 0 or len(list(ObjectStore(STORAGE).list_objects(uri))) == 1
        child = os.fork()
        if child == 0:
            status = 3
            try:
                if os.getuid() == 0:
                    os.setuid(65534)
                list(ObjectStore(STORAGE).list_objects(uri))
            except PermissionError as error:
                status = 0 if "ZQXJV" not in str(error) else 4
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        with pytest.raises(FileNotFoundError):
            list(ObjectStore(STORAGE).list_objects(uri + "/absent"))
    finally:
        (folder / "ZQXJV").chmod(0o700)
        shutil.rmtree(folder)


def test_a_file_that_never_holds_still_is_said_to_be_replaced(tmp_path: Path) -> None:
    """One that grows while it is read is read again; a complete one put in its place is as good as the first."""
    path = tmp_path / "x"
    path.write_bytes(b"a" * 10)

    class Growing:
        left = 1

    def grow(*_: object) -> None:
        if Growing.left:
            Growing.left -= 1
            with path.open("ab") as handle:
                handle.write(b"b")
            os.utime(path, ns=(0, time.time_ns()))

    uri = storage.canonical(str(path))
    for times, raised in ((1, False), (100, True)):
        Growing.left = times
        os.utime(path, ns=(0, 0))
        with pytest.MonkeyPatch.context() as patched:
            real = os.fstat

            def fstat(descriptor: int, real: Callable[[int], os.stat_result] = real) -> os.stat_result:
                found = real(descriptor)
                grow()
                return found

            patched.setattr(os, "fstat", fstat)
            if raised:
                with pytest.raises(storage.Replaced):
                    ObjectStore(STORAGE).read(uri)
                continue
            content, found = ObjectStore(STORAGE).read(uri)
        assert len(content) == found.size == 11


def test_objects_with_empty_components_and_folder_markers(bucket: Place) -> None:
    """Keys may hold empty components; empty keys that end in a slash are what browsers make of folders."""
    client = storage_s3.s3_client(bucket.settings)
    name = bucket.uri.split("/")[2]
    client.put_object(Bucket=name, Key="archive/marked/", Body=b"")
    _put(bucket, "marked/x")
    assert [o.uri for o in ObjectStore(bucket.settings).list_objects(bucket.uri)] == [f"{bucket.uri}/marked/x"]
    assert ObjectStore(bucket.settings).list_folder(f"{bucket.uri}/marked")[0] == []
    assert storage_s3.prefix_of("s3a://b") == ""
    assert storage_s3.prefix_of("s3a://b/") == "/"
    assert storage_s3.prefix_of("s3a://b/a/") == "a//"
    client.put_object(Bucket=name, Key="only/", Body=b"")
    assert ObjectStore(bucket.settings).kind(f"s3a://{name}/only") == "folder"
    ObjectStore(bucket.settings).delete_folder(f"s3a://{name}/only")
    assert ObjectStore(bucket.settings).kind(f"s3a://{name}/only") == "nothing"
    assert ObjectStore(bucket.settings).kind(f"s3a://{name}") == "folder"
    assert ObjectStore(bucket.settings).kind("s3a://no-such-bucket") == "nothing"
    assert ObjectStore(bucket.settings).kind("s3a://no-such-bucket/x") == "nothing"
    with pytest.raises(StorageError) as caught:
        ObjectStore(bucket.settings).list_folder("s3a://no-such-bucket/x")
    assert not isinstance(caught.value, FileNotFoundError)


def test_long_listings_come_in_pages(s3: S3Server, bucket: Place) -> None:
    folder = s3.root / bucket.uri.removeprefix("s3a://")
    for number in range(2300):
        path = folder / f"{number % 7}" / f"{number}.dcm"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert len({o.uri for o in ObjectStore(bucket.settings).list_objects(bucket.uri)}) == 2300
    folders, _ = ObjectStore(bucket.settings).list_folder(bucket.uri)
    assert len(folders) == 7
    ObjectStore(bucket.settings).delete_folder(bucket.uri)
    assert ObjectStore(bucket.settings).kind(bucket.uri) == "nothing"


def test_conditional_writes_have_one_winner(bucket: Place) -> None:
    uri = f"{bucket.uri}/lease"
    first = ObjectStore(bucket.settings).create_if_absent(uri, b"1")
    assert first == hashlib.md5(b"1").hexdigest()
    assert ObjectStore(bucket.settings).create_if_absent(uri, b"2") is None
    second = ObjectStore(bucket.settings).replace_if_match(uri, b"3", first)
    assert second is not None
    assert ObjectStore(bucket.settings).replace_if_match(uri, b"4", first) is None
    assert ObjectStore(bucket.settings).replace_if_match(f"{uri}-absent", b"4", first) is None
    assert ObjectStore(bucket.settings).read_bytes(uri) == b"3"
    assert 0 <= ObjectStore(bucket.settings).seconds_old(uri) < 60


def test_a_conditional_write_whose_reply_was_lost_is_recognised(s3: S3Server, bucket: Place) -> None:
    uri = f"{bucket.uri}/lease"
    with FaultProxy(s3.host, s3.port, [each("PUT", "lease", DropReply())]) as proxy:
        settings = s3_settings(proxy.endpoint)
        first = ObjectStore(settings).create_if_absent(uri, b"1")
        assert first == hashlib.md5(b"1").hexdigest()
        assert [type(fault) for _, fault in proxy.faults()] == [DropReply]
        assert ObjectStore(settings).replace_if_match(uri, b"2", first) == hashlib.md5(b"2").hexdigest()
        assert ObjectStore(settings).create_if_absent(uri, b"3") is None


@pytest.mark.parametrize(
    "rule",
    [
        each("GET", "x$", CutReply(5)),
        each("GET", "x$", Reset()),
        each("GET", "x$", DropReply()),
        each("GET", "x$", Answer(503, "SlowDown"), times=3),
        each("GET", "x$", Answer(500, "InternalError"), times=2),
        share(0.4, 1, Answer(503, "SlowDown")),
    ],
    ids=["cut", "reset", "dropped", "slow down", "internal error", "two of five"],
)
def test_faults_that_pass_are_not_seen(s3: S3Server, bucket: Place, rule: Rule) -> None:
    _put(bucket, "x")
    with FaultProxy(s3.host, s3.port, [rule]) as proxy:
        for _ in range(3):
            content, found = ObjectStore(s3_settings(proxy.endpoint)).read(f"{bucket.uri}/x")
            assert content == b"x" and found.etag == hashlib.md5(b"x").hexdigest()
        assert proxy.faults()


def test_a_stalled_answer_is_asked_for_again(s3: S3Server, bucket: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    assert storage_s3.READ_SECONDS < 30
    monkeypatch.setattr(storage_s3, "READ_SECONDS", 1)
    _put(bucket, "x")
    with FaultProxy(s3.host, s3.port, [each("GET", "x$", Stall(30))]) as proxy:
        began = time.monotonic()
        assert ObjectStore(s3_settings(proxy.endpoint)).read_bytes(f"{bucket.uri}/x") == b"x"
        assert time.monotonic() - began < 10


@pytest.mark.parametrize("rule", [each("GET", "x$", CutReply(1), times=None), each("GET", "x$", Reset(), times=None)])
def test_faults_that_stay_end_in_an_error_without_names(s3: S3Server, bucket: Place, rule: Rule) -> None:
    _put(bucket, "ZQXJV/x")
    with FaultProxy(s3.host, s3.port, [rule]) as proxy:
        with pytest.raises(StorageError) as caught:
            ObjectStore(s3_settings(proxy.endpoint, attempts=2)).read(f"{bucket.uri}/ZQXJV/x")
        assert len(proxy.faults()) == 2
    assert "ZQXJV" not in str(caught.value) and "127.0.0.1" not in str(caught.value)


def test_an_object_replaced_while_it_is_asked_for_describes_itself(s3: S3Server, bucket: Place) -> None:
    uri = f"{bucket.uri}/x"
    ObjectStore(bucket.settings).write_bytes(uri, b"the first")
    rule = each("GET", "x$", Before(lambda: ObjectStore(bucket.settings).write_bytes(uri, b"the second one")))
    with FaultProxy(s3.host, s3.port, [rule]) as proxy:
        content, found = ObjectStore(s3_settings(proxy.endpoint)).read(uri)
    assert (content, found.size) == (b"the second one", 14)
    assert found.etag == hashlib.md5(b"the second one").hexdigest()


@pytest.mark.parametrize(
    ("status", "code", "raised"),
    [(403, "AccessDenied", AccessDenied), (400, "BadRequest", StorageError)],
)
def test_refusals_name_the_bucket_alone(
    s3: S3Server, bucket: Place, status: int, code: str, raised: type[StorageError]
) -> None:
    with FaultProxy(s3.host, s3.port, [lambda _: Answer(status, code)]) as proxy:
        settings = s3_settings(proxy.endpoint)
        calls: list[Callable[[], object]] = [
            lambda: ObjectStore(settings).read(f"{bucket.uri}/ZQXJV"),
            lambda: list(ObjectStore(settings).list_objects(f"{bucket.uri}/ZQXJV")),
            lambda: ObjectStore(settings).write_bytes(f"{bucket.uri}/ZQXJV", b""),
        ]
        for call in calls:
            with pytest.raises(raised) as caught:
                call()
            assert isinstance(caught.value, OSError)
            assert "ZQXJV" not in str(caught.value)
            assert bucket.uri.split("/")[2] in str(caught.value)


@pytest.mark.usefixtures("new_clients")
def test_missing_credentials_are_said(bucket: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(PermissionError, match="no AWS credentials"):
        ObjectStore(bucket.settings).read(f"{bucket.uri}/x")


@pytest.mark.usefixtures("new_clients")
def test_wrong_credentials_are_said_without_the_signature(bucket: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(PermissionError, match=r"refused \(SignatureDoesNotMatch\)") as caught:
        ObjectStore(bucket.settings).read(f"{bucket.uri}/ZQXJV")
    assert "ZQXJV" not in str(caught.value)


def test_a_forked_process_has_a_client_of_its_own(bucket: Place) -> None:
    _put(bucket, "x")
    ours = storage_s3.s3_client(bucket.settings)
    child = os.fork()
    if child == 0:
        same = storage_s3.s3_client(bucket.settings) is ours
        os._exit(0 if not same and ObjectStore(bucket.settings).read_bytes(f"{bucket.uri}/x") == b"x" else 3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
