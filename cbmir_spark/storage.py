"""Objects below `file:` and `s3a:` roots: list, read, write. No Spark: drivers and tasks use it alike.

Credentials for object storage come from the usual AWS chain (environment, profile, instance role) wherever the
code runs, so that neither Spark's configuration nor a task's closure carries them. No error names an object, since
names may hold what identifies a patient: of `s3a:` the bucket at most.
"""

import errno
import os
import random
import re
import shutil
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    FlexibleChecksumError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
)

from cbmir_spark.config import StorageSettings
from cbmir_spark.errors import AccessDenied, InputError, NotThere, StorageError

_FILE = "file://"
_S3A = "s3a://"
# Schemes that Hadoop's own connectors read; anything else is taken for a slip of the pen.
_HADOOP = {"abfs", "abfss", "alluxio", "cosn", "dbfs", "gs", "hdfs", "jfs", "maprfs", "o3fs", "obs", "ofs", "oss"}
_HADOOP |= {"swebhdfs", "viewfs", "wasb", "wasbs", "webhdfs"}
_HADOOP_URI = re.compile(r"([a-z][a-z0-9]*):(?://([^/]*))?(/.*)?", re.DOTALL)

# A file that is written to all the while is not read forever.
_TRIES = 3
# Silence of this many seconds, and the request is sent anew: servers that stall for half a minute are common.
CONNECT_SECONDS = 10
READ_SECONDS = 20
# Tasks read one object at a time; only a listing beside a lease's renewal needs a second connection.
_CONNECTIONS = 4
# What one DeleteObjects request may name.
_DELETE_AT_ONCE = 1000
# Private-use code points stand for the bytes 0x80 to 0xFF of names that are not UTF-8, which no table could hold.
_RAW = 0xEF00
_RAW_CHARACTERS = re.compile("[\uef80-\uefff]")
_NOT_TEXT = re.compile("[\uef80-\uefff\udc80-\udcff]+")


@dataclass(frozen=True)
class StoredObject:
    """One object as storage describes it: canonical URI, size in bytes, when it was last written (UTC), and its ETag.

    The ETag is None where there is none, as below `file:`. Times of `s3a:` have whole seconds.
    """

    uri: str
    size: int
    modified: datetime
    etag: str | None = None


class Replaced(OSError):
    """An object was replaced each time while it was read."""


def canonical(uri: str) -> str:
    """The one spelling of a location: `file:///absolute/path`, `s3a://bucket/key`, or an archive of another scheme.

    No spelling ends in a slash. Bare paths are local and relative to the working folder. Names are kept as they are:
    nothing is percent-decoded, so that a file called `a%20b` stays itself. Raises InputError for a scheme that neither
    this module nor a connector of Hadoop reads.
    """
    for scheme in (_S3A, "s3://", "s3n://"):
        if uri.startswith(scheme):
            bucket, _, key = uri.removeprefix(scheme).partition("/")
            if not bucket:
                raise InputError(f"{uri}: names no bucket; give s3a://bucket/prefix")
            return (_S3A + bucket + "/" + key.strip("/")).rstrip("/")
    if uri.startswith("file:"):
        return _FILE + os.path.abspath("/" + uri.removeprefix("file:").lstrip("/"))
    hadoop = _HADOOP_URI.fullmatch(uri)
    if hadoop and hadoop[1] in _HADOOP:
        return f"{hadoop[1]}://{hadoop[2] or ''}{(hadoop[3] or '').rstrip('/')}"
    if "://" in uri:
        raise InputError(f"{uri}: scheme {uri.split(':', 1)[0]} is not supported; use a path, file: or s3a:")
    return _FILE + _spelled(os.path.abspath(os.path.expanduser(uri)))


def is_native(uri: str) -> bool:
    """Whether this module itself lists, reads and writes there; other archives are read by Hadoop's connectors."""
    return uri.startswith((_FILE, _S3A))


def join(uri: str, *parts: str) -> str:
    """`uri` with path components below it."""
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)])


def is_local(uri: str) -> bool:
    """Whether a canonical URI lies on the machine's own file system."""
    return uri.startswith(_FILE)


def local_path(uri: str) -> str:
    """The plain path of a canonical `file:` URI."""
    path = uri.removeprefix(_FILE)
    if not _RAW_CHARACTERS.search(path):
        return path
    return os.fsdecode(b"".join(_bytes_of(character) for character in path))


def is_below(uri: str, root: str) -> bool:
    """Whether canonical `uri` lies below canonical `root`, with symbolic links of local paths resolved."""
    if is_local(uri) and is_local(root):
        real, real_root = os.path.realpath(local_path(uri)), os.path.realpath(local_path(root))
        return real.startswith(real_root.rstrip("/") + "/")
    if ".." in PurePosixPath(uri).parts:
        return False
    return uri.startswith(root.rstrip("/") + "/")


def is_link(uri: str) -> bool:
    """Whether a canonical URI is a symbolic link, which may lead out of the folder that it lies in."""
    return is_local(uri) and os.path.islink(local_path(uri))


def kind(uri: str, storage: StorageSettings) -> str:
    """What stands at a canonical URI: `file`, `folder` or `nothing`."""
    if _is_file_uri(uri):
        mode = _mode(local_path(uri))
        return "file" if stat.S_ISREG(mode) else "folder" if stat.S_ISDIR(mode) else "nothing"
    bucket, key = _address(uri)
    if find(uri, storage) is not None:
        return "file"
    try:
        with _told_without_names(bucket):
            answer = _client(storage).list_objects_v2(Bucket=bucket, Prefix=_prefix(uri), MaxKeys=1)
    except FileNotFoundError:
        return "nothing"
    return "folder" if "Contents" in answer or not key else "nothing"


def mount_of(uri: str) -> tuple[int, int] | None:
    """What tells a local folder from another that is mounted in its place; None in object storage, or if it is gone."""
    if not is_local(uri):
        return None
    with suppress(OSError):
        found = os.stat(local_path(uri))
        return found.st_dev, found.st_ino
    return None


def list_folder(uri: str, storage: StorageSettings) -> tuple[list[str], list[StoredObject]]:
    """The folders and the objects directly below a canonical URI, each sorted by URI.

    Links of local folders are followed, but for those that lead back to a folder they lie in. Raises OSError where
    anything there cannot be listed, so that no listing is short unseen.
    """
    if _is_file_uri(uri):
        with _told_without_path():
            folders, objects = _scan(local_path(uri))
    else:
        bucket, _ = _address(uri)
        folders, objects = [], []
        for page in _pages(uri, storage, Delimiter="/"):
            folders += [f"{_S3A}{bucket}/{each['Prefix'][:-1]}" for each in page.get("CommonPrefixes", ())]
            objects += _listed(bucket, page)
    return sorted(folders), sorted(objects, key=lambda o: o.uri)


def list_objects(uri: str, storage: StorageSettings) -> Iterator[StoredObject]:
    """Every object below a canonical URI, at any depth, hidden names included; otherwise as `list_folder`."""
    if _is_file_uri(uri):
        folders = [uri]
        while folders:
            folder = folders.pop()
            try:
                below, objects = list_folder(folder, storage)
            except FileNotFoundError:
                if folder == uri:
                    raise
                # Gone since its parent was listed, and its objects with it; the folders beside it are not.
                continue
            yield from objects
            folders += reversed(below)
    else:
        bucket, _ = _address(uri)
        for page in _pages(uri, storage):
            yield from _listed(bucket, page)


def find(uri: str, storage: StorageSettings) -> StoredObject | None:
    """The object at a canonical URI, None where there is none; a folder or a device is no object."""
    if _is_file_uri(uri):
        with _told_without_path():
            try:
                found = os.stat(local_path(uri))
            except (FileNotFoundError, NotADirectoryError):
                return None
        return _file(uri, found) if stat.S_ISREG(found.st_mode) else None
    bucket, key = _address(uri)
    if not key:
        return None
    try:
        with _told_without_names(bucket):
            answer = _client(storage).head_object(Bucket=bucket, Key=key)
    except FileNotFoundError:
        return None
    return _answered(uri, answer)


def read_bytes(uri: str, storage: StorageSettings) -> bytes:
    """The whole content of an object, as `read` without what storage says of it."""
    return read(uri, storage)[0]


def read(uri: str, storage: StorageSettings) -> tuple[bytes, StoredObject]:
    """The whole content of an object, and what storage says of exactly these bytes.

    An object that changes meanwhile is read again. Raises FileNotFoundError where it is gone, Replaced where it did
    not hold still, OSError where it cannot be read.
    """
    if _is_file_uri(uri):
        with _told_without_path():
            return _read_file(uri)
    bucket, key = _address(uri)
    for attempt in range(storage.attempts):
        with _told_without_names(bucket):
            answer = _client(storage).get_object(Bucket=bucket, Key=key)
            # botocore tries requests again, but not bodies that break off; the new answer describes itself.
            with closing(answer["Body"]) as body, suppress(HTTPClientError, IncompleteReadError, FlexibleChecksumError):
                content: bytes = body.read()
                if len(content) == answer["ContentLength"]:
                    return content, _answered(uri, answer)
        time.sleep(min(2.0**attempt, READ_SECONDS) * random.random() / 4)
    raise StorageError(f"bucket {bucket}: the content of an object broke off {storage.attempts} times")


def write_bytes(uri: str, content: bytes, storage: StorageSettings, durable: bool = True) -> None:
    """Write an object so that readers see all of it or nothing of it.

    What is not `durable`, since nobody would look for it after this machine has failed, does not wait for the disk.
    """
    if _is_file_uri(uri):
        with _told_without_path():
            _write_file(local_path(uri), content, durable)
        return
    bucket, key = _address(uri)
    with _told_without_names(bucket):
        # Arrow's buffers, which a file would take, are no bytes to boto3.
        _client(storage).put_object(Bucket=bucket, Key=key, Body=bytes(content))


def delete(uri: str, storage: StorageSettings) -> None:
    """Remove an object; nothing happens where there is none."""
    if _is_file_uri(uri):
        with _told_without_path(), suppress(FileNotFoundError):
            os.remove(local_path(uri))
        return
    bucket, key = _address(uri)
    with _told_without_names(bucket):
        _client(storage).delete_object(Bucket=bucket, Key=key)


def delete_folder(uri: str, storage: StorageSettings) -> None:
    """Remove a folder and all below it; nothing happens where there is none."""
    if _is_file_uri(uri):
        with _told_without_path(), suppress(FileNotFoundError, NotADirectoryError):
            shutil.rmtree(local_path(uri))
        return
    bucket, _ = _address(uri)
    for page in _pages(uri, storage, MaxKeys=_DELETE_AT_ONCE):
        names = [{"Key": each["Key"]} for each in page.get("Contents", ())]
        if not names:
            continue
        with _told_without_names(bucket):
            answer = _client(storage).delete_objects(Bucket=bucket, Delete={"Objects": names, "Quiet": True})
        if failed := answer.get("Errors"):
            codes = ", ".join(sorted({str(each.get("Code")) for each in failed}))
            raise StorageError(f"bucket {bucket}: {len(failed)} objects could not be deleted ({codes})")


def create_if_absent(uri: str, content: bytes, storage: StorageSettings) -> str | None:
    """Write an `s3a:` object where there is none; its ETag, or None where there is one already.

    `content` has to be the caller's alone: a write whose reply was lost is recognised by it when it is tried again.
    """
    return _put_if(uri, content, storage, {"IfNoneMatch": "*"})


def replace_if_match(uri: str, content: bytes, etag: str, storage: StorageSettings) -> str | None:
    """Replace an `s3a:` object that still has this ETag; its new ETag, or None where it was changed or is gone.

    `content` has to be the caller's alone, as for `create_if_absent`.
    """
    return _put_if(uri, content, storage, {"IfMatch": f'"{etag}"'})


def file_system(storage: StorageSettings, *, ahead: bool = True) -> Any:
    """Object storage as s3fs has it, for libraries that read through fsspec; `ahead` reads more than is asked for."""
    import s3fs

    return s3fs.S3FileSystem(
        endpoint_url=storage.endpoint,
        client_kwargs={"region_name": storage.region},
        config_kwargs={"s3": {"addressing_style": "path" if storage.path_style else "auto"}},
        default_cache_type="readahead" if ahead else "none",
    )


def seconds_old(uri: str, storage: StorageSettings) -> float:
    """For how long an `s3a:` object has not been written, by the storage's own clocks: right to about two seconds.

    Raises FileNotFoundError where it is gone.
    """
    bucket, key = _s3_address(uri)
    with _told_without_names(bucket):
        answer = _client(storage).head_object(Bucket=bucket, Key=key)
    now = parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
    age: float = (now - answer["LastModified"]).total_seconds()
    return max(0.0, age)


def _is_file_uri(uri: str) -> bool:
    """Whether a location is local rather than in S3; every operation asks it, and so refuses all other schemes."""
    if not is_native(uri):
        raise InputError(f"{uri.split(':', 1)[0]}: only archives may lie there; use a path, file: or s3a:")
    return is_local(uri)


# Below file:


def _mode(path: str) -> int:
    with _told_without_path():
        try:
            return os.stat(path).st_mode
        except (FileNotFoundError, NotADirectoryError):
            return 0


def _scan(path: str) -> tuple[list[str], list[StoredObject]]:
    folders, objects = [], []
    here = os.stat(path)
    with os.scandir(path) as entries:
        for entry in entries:
            try:
                found = entry.stat()
            except FileNotFoundError:
                # A link to nothing, or a file deleted since; but where the whole folder went, the listing is not whole.
                if not entry.is_symlink() and not os.path.samestat(here, os.stat(path)):
                    raise
                continue
            uri = _FILE + _spelled(entry.path)
            if stat.S_ISREG(found.st_mode):
                objects.append(_file(uri, found))
            elif stat.S_ISDIR(found.st_mode) and not (entry.is_symlink() and _leads_back(entry.path)):
                folders.append(uri)
    return folders, objects


def _leads_back(link: str) -> bool:
    """Whether a link leads to a folder that it lies in itself, by whatever way: following it would never end."""
    target = os.path.realpath(link).rstrip("/") + "/"
    above = os.path.dirname(link)
    while True:
        if (os.path.realpath(above).rstrip("/") + "/").startswith(target):
            return True
        if above == os.path.dirname(above):
            return False
        above = os.path.dirname(above)


def _read_file(uri: str) -> tuple[bytes, StoredObject]:
    for _ in range(_TRIES):
        try:
            # Without O_NONBLOCK a named pipe would be waited for.
            descriptor = os.open(local_path(uri), os.O_RDONLY | os.O_NONBLOCK)
        except NotADirectoryError:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)) from None
        try:
            before = os.fstat(descriptor)
            if not stat.S_ISREG(before.st_mode):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
            with open(descriptor, "rb", closefd=False) as handle:
                content = handle.read()
            after = os.fstat(descriptor)
        finally:
            os.close(descriptor)
        if (before.st_size, before.st_mtime_ns) == (len(content), after.st_mtime_ns):
            return content, _file(uri, before)
    raise Replaced(f"a file changed {_TRIES} times while it was read")


def _write_file(path: str, content: bytes, durable: bool) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    unfinished = f"{path}.{os.getpid()}.tmp"
    try:
        with open(unfinished, "wb") as handle:
            handle.write(content)
            if durable:
                handle.flush()
                os.fsync(handle.fileno())
        os.replace(unfinished, path)
    except OSError:
        with suppress(OSError):
            os.unlink(unfinished)
        raise


def _file(uri: str, found: os.stat_result) -> StoredObject:
    # Spark's timestamps hold microseconds: the same cut here, or an unchanged file would look new every night.
    microseconds = found.st_mtime_ns // 1000
    modified = datetime.fromtimestamp(microseconds // 1_000_000, UTC).replace(microsecond=microseconds % 1_000_000)
    return StoredObject(uri, found.st_size, modified)


def _spelled(path: str) -> str:
    """A path as text that can be stored: bytes that are not UTF-8 become private-use characters.

    Those characters, in a name that really has them, are spelled byte by byte too, so that the way back is one.
    """
    return path if path.isascii() else _NOT_TEXT.sub(lambda found: _raw(os.fsencode(found[0])), path)


def _raw(content: bytes) -> str:
    return "".join(chr(_RAW + byte) for byte in content)


def _bytes_of(character: str) -> bytes:
    return bytes([ord(character) - _RAW]) if _RAW_CHARACTERS.match(character) else os.fsencode(character)


@contextmanager
def _told_without_path() -> Iterator[None]:
    try:
        yield
    except Replaced:
        raise
    except OSError as error:
        # The number alone decides which subclass of OSError it becomes.
        raise OSError(error.errno, os.strerror(error.errno or errno.EIO)) from None


# Below s3a:


@lru_cache(maxsize=8)
def _client_of(storage: StorageSettings, process: int) -> Any:
    return boto3.session.Session().client(
        "s3",
        endpoint_url=storage.endpoint,
        region_name=storage.region,
        config=Config(
            s3={"addressing_style": "path" if storage.path_style else "virtual"},
            retries={"mode": "standard", "total_max_attempts": storage.attempts},
            connect_timeout=CONNECT_SECONDS,
            read_timeout=READ_SECONDS,
            max_pool_connections=_CONNECTIONS,
            # Many S3-compatible servers know nothing of the checksums that AWS would be sent unasked.
            request_checksum_calculation="when_required",
        ),
    )


def _client(storage: StorageSettings) -> Any:
    # A process that was forked must not share its parent's connections.
    return _client_of(storage, os.getpid())


def _address(uri: str) -> tuple[str, str]:
    bucket, _, key = uri.removeprefix(_S3A).partition("/")
    return bucket, key


def _s3_address(uri: str) -> tuple[str, str]:
    if _is_file_uri(uri):
        raise InputError("conditional writes and their clock are for s3a: alone")
    return _address(uri)


def _prefix(uri: str) -> str:
    """What the keys below a location begin with; keys may hold empty components, so only one slash is added."""
    _, slash, key = uri.removeprefix(_S3A).partition("/")
    return key + "/" if slash else ""


def _pages(uri: str, storage: StorageSettings, **how: object) -> Iterator[Mapping[str, Any]]:
    bucket, _ = _address(uri)
    following: dict[str, object] = {}
    while True:
        with _told_without_names(bucket), _told_of_a_lost_bucket(bucket):
            page = _client(storage).list_objects_v2(Bucket=bucket, Prefix=_prefix(uri), **how, **following)
        yield page
        if not page.get("IsTruncated"):
            return
        following = {"ContinuationToken": page["NextContinuationToken"]}


@contextmanager
def _told_of_a_lost_bucket(bucket: str) -> Iterator[None]:
    """No prefix is ever missing from a listing, only its bucket: which must not pass for a folder that is gone."""
    try:
        yield
    except ClientError as error:
        if error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") == 404:
            raise StorageError(f"bucket {bucket} does not exist") from None
        raise


def _listed(bucket: str, page: Mapping[str, Any]) -> list[StoredObject]:
    # Empty objects whose name ends in a slash only make a folder visible in some browsers.
    return [
        StoredObject(f"{_S3A}{bucket}/{each['Key']}", each["Size"], _whole_seconds(each["LastModified"]), _etag(each))
        for each in page.get("Contents", ())
        if each["Size"] or not each["Key"].endswith("/")
    ]


def _answered(uri: str, answer: Mapping[str, Any]) -> StoredObject:
    return StoredObject(uri, answer["ContentLength"], _whole_seconds(answer["LastModified"]), _etag(answer))


def _whole_seconds(moment: datetime) -> datetime:
    # Some servers list fractions of a second that the header of the object's own answer cannot carry.
    return moment.astimezone(UTC).replace(microsecond=0)


def _etag(answer: Mapping[str, Any]) -> str | None:
    return str(answer.get("ETag") or "").strip('"') or None


def _put_if(uri: str, content: bytes, storage: StorageSettings, condition: Mapping[str, str]) -> str | None:
    bucket, key = _s3_address(uri)
    try:
        with _told_without_names(bucket):
            answer = _client(storage).put_object(Bucket=bucket, Key=key, Body=content, **condition)
        return _etag(answer)
    except (_ConditionFailed, FileNotFoundError):
        try:
            found, described = read(uri, storage)
        except FileNotFoundError:
            return None
        return described.etag if found == content else None


class _ConditionFailed(StorageError):
    """A conditional write found another state than it asked for."""


@contextmanager
def _told_without_names(bucket: str) -> Iterator[None]:
    """What botocore raises, as OSError without the names, addresses and signatures that its own texts hold."""
    try:
        yield
    except ClientError as error:
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        code = str(error.response.get("Error", {}).get("Code"))
        if code == "NoSuchBucket":
            raise NotThere(f"bucket {bucket} does not exist") from None
        if status == 404:
            raise NotThere(f"bucket {bucket}: there is no such object") from None
        if status in (401, 403):
            raise AccessDenied(
                f"bucket {bucket}: refused ({code}); look at the AWS credentials and their policy"
            ) from None
        if status in (409, 412):
            raise _ConditionFailed(f"bucket {bucket}: written by another meanwhile ({code})") from None
        raise StorageError(f"bucket {bucket}: the server answers {code} (HTTP status {status})") from None
    except (NoCredentialsError, PartialCredentialsError):
        raise AccessDenied(f"bucket {bucket}: no AWS credentials in the environment, a profile or a role") from None
    except BotoCoreError as error:
        raise StorageError(f"bucket {bucket}: the request failed ({type(error).__name__})") from None
