"""Objects below `file:` and `s3a:` roots: list, read, write. No Spark: drivers and tasks use it alike.

Credentials for object storage come from the usual AWS chain (environment, profile, instance role) wherever the
code runs, so that neither Spark's configuration nor a task's closure carries them.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import PurePosixPath

from pyarrow import fs

from cbmir_spark.config import StorageSettings
from cbmir_spark.errors import InputError

_FILE = "file://"
_S3A = "s3a://"
_TRIES = 3


@dataclass(frozen=True)
class StoredObject:
    """One object as storage describes it: canonical URI, size in bytes, when it was last written (UTC), and its ETag.

    The ETag is None below `file:`, where there is none.
    """

    uri: str
    size: int
    modified: datetime
    etag: str | None = None


class Replaced(OSError):
    """An object was replaced each time while it was read."""


def canonical(uri: str) -> str:
    """The one spelling of a location: `file:///absolute/path` or `s3a://bucket/key`, without a final slash.

    Bare paths are local and relative to the working folder. Names are kept as they are: nothing is percent-decoded,
    so that a file called `a%20b` stays itself. Raises InputError for another scheme.
    """
    for scheme in (_S3A, "s3://", "s3n://"):
        if uri.startswith(scheme):
            bucket, _, key = uri.removeprefix(scheme).partition("/")
            if not bucket:
                raise InputError(f"{uri}: names no bucket; give s3a://bucket/prefix")
            return (_S3A + bucket + "/" + key.strip("/")).rstrip("/")
    if uri.startswith("file:"):
        path = "/" + uri.removeprefix("file:").lstrip("/")
    elif "://" in uri:
        raise InputError(f"{uri}: scheme {uri.split(':', 1)[0]} is not supported; use a path, file: or s3a:")
    else:
        path = os.path.expanduser(uri)
    return _FILE + os.path.abspath(path)


def join(uri: str, *parts: str) -> str:
    """`uri` with path components below it."""
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)])


def is_local(uri: str) -> bool:
    """Whether a canonical URI lies on the machine's own file system."""
    return uri.startswith(_FILE)


def local_path(uri: str) -> str:
    """The plain path of a canonical `file:` URI."""
    return uri.removeprefix(_FILE)


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
    filesystem, path = _open(uri, storage)
    found = filesystem.get_file_info(path).type
    return {fs.FileType.File: "file", fs.FileType.Directory: "folder"}.get(found, "nothing")


def list_folder(uri: str, storage: StorageSettings) -> tuple[list[str], list[StoredObject]]:
    """The folders and the objects directly below a canonical URI, each sorted by URI."""
    filesystem, path = _open(uri, storage)
    folders, objects = [], []
    for info in filesystem.get_file_info(fs.FileSelector(path)):
        if info.type == fs.FileType.Directory:
            folders.append(_uri(info.path, uri))
        elif info.type == fs.FileType.File:
            objects.append(_stored(info, uri))
    return sorted(folders), sorted(objects, key=lambda o: o.uri)


def list_objects(uri: str, storage: StorageSettings) -> Iterator[StoredObject]:
    """Every object below a canonical URI, at any depth, hidden names included."""
    filesystem, path = _open(uri, storage)
    for info in filesystem.get_file_info(fs.FileSelector(path, recursive=True)):
        if info.type == fs.FileType.File:
            yield _stored(info, uri)


def find(uri: str, storage: StorageSettings) -> StoredObject | None:
    """The object at a canonical URI, None where there is none; a folder or a device is no object."""
    filesystem, path = _open(uri, storage)
    info = filesystem.get_file_info(path)
    return _stored(info, uri) if info.type == fs.FileType.File else None


def read_bytes(uri: str, storage: StorageSettings) -> bytes:
    """The whole content of an object. Raises FileNotFoundError where it is gone, OSError where it cannot be read."""
    filesystem, path = _open(uri, storage)
    # Without compression=None pyarrow unpacks whatever is called .gz or .bz2.
    with filesystem.open_input_stream(path, compression=None) as stream:
        content: bytes = stream.read()
    return content


def read(uri: str, storage: StorageSettings) -> tuple[bytes, StoredObject]:
    """The whole content of an object, and what storage says of exactly these bytes.

    An object that is replaced meanwhile is read again. Raises FileNotFoundError where it is gone, Replaced where it
    did not hold still, OSError where it cannot be read.
    """
    for _ in range(_TRIES):
        before = find(uri, storage)
        if before is None:
            raise FileNotFoundError(uri)
        content = read_bytes(uri, storage)
        if find(uri, storage) == before and len(content) == before.size:
            return content, before
    raise Replaced(uri)


def write_bytes(uri: str, content: bytes, storage: StorageSettings) -> None:
    """Write an object so that readers see all of it or nothing of it."""
    filesystem, path = _open(uri, storage)
    if not is_local(uri):
        with filesystem.open_output_stream(path, compression=None) as stream:
            stream.write(content)
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    unfinished = f"{path}.{os.getpid()}.tmp"
    with open(unfinished, "wb") as handle:
        handle.write(content)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(unfinished, path)


def delete(uri: str, storage: StorageSettings) -> None:
    """Remove an object; nothing happens where there is none."""
    filesystem, path = _open(uri, storage)
    if filesystem.get_file_info(path).type == fs.FileType.File:
        filesystem.delete_file(path)


def delete_folder(uri: str, storage: StorageSettings) -> None:
    """Remove a folder and all below it; nothing happens where there is none."""
    filesystem, path = _open(uri, storage)
    if filesystem.get_file_info(path).type == fs.FileType.Directory:
        filesystem.delete_dir(path)


def _open(uri: str, storage: StorageSettings) -> tuple[fs.FileSystem, str]:
    if is_local(uri):
        return _local(), local_path(uri)
    return _s3(storage), uri.removeprefix(_S3A)


@lru_cache(maxsize=1)
def _local() -> fs.FileSystem:
    return fs.LocalFileSystem()


@lru_cache(maxsize=4)
def _s3(storage: StorageSettings) -> fs.FileSystem:
    scheme, _, host = (storage.endpoint or "").rpartition("://")
    return fs.S3FileSystem(
        region=storage.region,
        endpoint_override=host or None,
        scheme=scheme or "https",
    )


def _uri(path: str, root: str) -> str:
    return (_FILE if is_local(root) else _S3A) + path


def _stored(info: fs.FileInfo, root: str) -> StoredObject:
    # Spark's timestamps hold microseconds: the same cut here, or an unchanged file would look new every night.
    microseconds = info.mtime_ns // 1000
    modified = datetime.fromtimestamp(microseconds // 1_000_000, UTC).replace(microsecond=microseconds % 1_000_000)
    return StoredObject(_uri(info.path, root), info.size, modified)
