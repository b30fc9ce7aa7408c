"""Spell, join and compare the URIs of objects; all but links is string work."""

import os
import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import PurePosixPath

from cbmir_spark.errors import InputError

FILE = "file://"
S3A = "s3a://"
# Schemes that Hadoop's connectors read; any other is refused as a typo.
_HADOOP = {"abfs", "abfss", "alluxio", "cosn", "dbfs", "gs", "hdfs", "jfs", "maprfs", "o3fs", "obs", "ofs", "oss"}
_HADOOP |= {"swebhdfs", "viewfs", "wasb", "wasbs", "webhdfs"}
_HADOOP_URI = re.compile(r"([a-z][a-z0-9]*):(?://([^/]*))?(/.*)?", re.DOTALL)
# Private-use code points stand for the bytes 0x80 to 0xFF of names that are not UTF-8, which no table could hold.
_RAW = 0xEF00
_RAW_CHARACTERS = re.compile("[\uef80-\uefff]")
_NOT_TEXT = re.compile("[\uef80-\uefff\udc80-\udcff]+")


@dataclass(frozen=True)
class StoredObject:
    """One object as storage describes it: canonical URI, size in bytes, time of its last write (UTC), and ETag.

    The ETag is None where there is none, as below `file:`. Times below `s3a:` have whole seconds.
    """

    uri: str
    size: int
    modified: datetime
    etag: str | None = None


class Replaced(OSError):
    """An object changed during every attempt to read it."""


def canonical(uri: str) -> str:
    """Spell a location as `file:///absolute/path`, `s3a://bucket/key`, or a URI of another Hadoop scheme.

    The result has no trailing slash. Bare paths are local and relative to the working folder. Nothing is
    percent-decoded, so that a file called `a%20b` stays itself. Raises InputError for a scheme that neither this
    package nor a connector of Hadoop reads.
    """
    for scheme in (S3A, "s3://", "s3n://"):
        if uri.startswith(scheme):
            bucket, _, key = uri.removeprefix(scheme).partition("/")
            if not bucket:
                raise InputError(f"{uri}: names no bucket; give s3a://bucket/prefix")
            return (S3A + bucket + "/" + key.strip("/")).rstrip("/")
    if uri.startswith("file:"):
        return FILE + os.path.abspath("/" + uri.removeprefix("file:").lstrip("/"))
    hadoop = _HADOOP_URI.fullmatch(uri)
    if hadoop and hadoop[1] in _HADOOP:
        return f"{hadoop[1]}://{hadoop[2] or ''}{(hadoop[3] or '').rstrip('/')}"
    if "://" in uri:
        raise InputError(f"{uri}: scheme {uri.split(':', 1)[0]} is not supported; use a path, file: or s3a:")
    return FILE + spelled(os.path.abspath(os.path.expanduser(uri)))


def is_native(uri: str) -> bool:
    """True if this package lists, reads and writes there; Hadoop's connectors read archives of other schemes."""
    return uri.startswith((FILE, S3A))


def join(uri: str, *parts: str) -> str:
    """Append path components to a URI."""
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)])


def is_local(uri: str) -> bool:
    """True if a canonical URI is on the local file system."""
    return uri.startswith(FILE)


def local_path(uri: str) -> str:
    """Convert a canonical `file:` URI to a path."""
    path = uri.removeprefix(FILE)
    if not _RAW_CHARACTERS.search(path):
        return path
    return os.fsdecode(b"".join(_bytes_of(character) for character in path))


def is_below(uri: str, root: str) -> bool:
    """True if canonical `uri` is below canonical `root`; symbolic links in local paths are resolved."""
    if is_local(uri) and is_local(root):
        real, real_root = os.path.realpath(local_path(uri)), os.path.realpath(local_path(root))
        return real.startswith(real_root.rstrip("/") + "/")
    if ".." in PurePosixPath(uri).parts:
        return False
    return uri.startswith(root.rstrip("/") + "/")


def is_link(uri: str) -> bool:
    """True if a canonical URI is a symbolic link, which may lead out of its folder."""
    return is_local(uri) and os.path.islink(local_path(uri))


def is_file_uri(uri: str) -> bool:
    """True if a location is local, False if in S3. Raises InputError for any other scheme."""
    if not is_native(uri):
        raise InputError(f"{uri.split(':', 1)[0]}: only archives may lie there; use a path, file: or s3a:")
    return is_local(uri)


def spelled(path: str) -> str:
    """Convert a path to text that can be stored: bytes that are not UTF-8 become private-use characters.

    A name that contains those very characters has them replaced byte by byte too, so that the conversion can be undone.
    """
    return path if path.isascii() else _NOT_TEXT.sub(lambda found: _raw(os.fsencode(found[0])), path)


def _raw(content: bytes) -> str:
    return "".join(chr(_RAW + byte) for byte in content)


def _bytes_of(character: str) -> bytes:
    return bytes([ord(character) - _RAW]) if _RAW_CHARACTERS.match(character) else os.fsencode(character)
