"""Read, write and list files of the local file system; errors do not contain paths."""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime

from cbmir_spark.storage.uri import FILE, Replaced, StoredObject, is_local, local_path, spelled

# Errors of a name or a link itself, whatever the state of the storage.
NO_FILE = (errno.ELOOP, errno.ENOTDIR, errno.ENAMETOOLONG)
# Attempts to read a file that is being written.
_TRIES = 3


def mount_of(uri: str) -> tuple[int, int] | None:
    """Identify a local folder by device and inode, which change if another is mounted over it.

    None in object storage, or if the folder is gone.
    """
    if not is_local(uri):
        return None
    with suppress(OSError):
        found = os.stat(local_path(uri))
        return found.st_dev, found.st_ino
    return None


def mode_of(path: str) -> int:
    """The file mode of a path, 0 if nothing is there."""
    with hide_paths():
        try:
            return os.stat(path).st_mode
        except (FileNotFoundError, NotADirectoryError):
            return 0


def scan_folder(path: str) -> tuple[list[str], list[StoredObject], list[str]]:
    """List the folders (URIs), the files, and the other entries (URIs) directly below a folder, unsorted.

    The others are links that lead nowhere or round in circles, names that the system does not take, pipes, sockets and
    devices.
    """
    folders, objects, others = [], [], []
    here = os.stat(path)
    with os.scandir(path) as entries:
        for entry in entries:
            try:
                found = entry.stat()
            except FileNotFoundError:
                # A dangling link, or a file deleted since; but if the whole folder is gone, the listing is incomplete.
                if entry.is_symlink():
                    others.append(FILE + spelled(entry.path))
                elif not os.path.samestat(here, os.stat(path)):
                    raise
                continue
            except OSError as error:
                if error.errno not in NO_FILE:
                    raise
                others.append(FILE + spelled(entry.path))
                continue
            uri = FILE + spelled(entry.path)
            if stat.S_ISREG(found.st_mode):
                objects.append(stored_file(uri, found))
            elif stat.S_ISDIR(found.st_mode) and not (entry.is_symlink() and _leads_back(entry.path)):
                folders.append(uri)
            elif not stat.S_ISDIR(found.st_mode):
                others.append(uri)
    return folders, objects, others


def _leads_back(link: str) -> bool:
    """True if a link leads to one of the folders that contain it, so that following it would never end."""
    target = os.path.realpath(link).rstrip("/") + "/"
    above = os.path.dirname(link)
    while True:
        if (os.path.realpath(above).rstrip("/") + "/").startswith(target):
            return True
        if above == os.path.dirname(above):
            return False
        above = os.path.dirname(above)


def read_file(uri: str) -> tuple[bytes, StoredObject]:
    """Read a file that does not change meanwhile. Raises Replaced if it changes on every attempt."""
    for _ in range(_TRIES):
        try:
            # Without O_NONBLOCK, opening a named pipe would block.
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
            return content, stored_file(uri, before)
    raise Replaced(f"a file changed {_TRIES} times while it was read")


def write_file(path: str, content: bytes, durable: bool) -> None:
    """Write a file so that readers see all of it or nothing."""
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


def stored_file(uri: str, found: os.stat_result) -> StoredObject:
    """Describe a file by its URI and status."""
    # Spark's timestamps have microseconds: with more digits an unchanged file would look new every night.
    microseconds = found.st_mtime_ns // 1000
    modified = datetime.fromtimestamp(microseconds // 1_000_000, UTC).replace(microsecond=microseconds % 1_000_000)
    return StoredObject(uri, found.st_size, modified)


@contextmanager
def hide_paths() -> Iterator[None]:
    """Raise an OSError of the block again, of the same class but without the path in its text."""
    try:
        yield
    except Replaced:
        raise
    except OSError as error:
        # OSError picks its subclass by the number.
        raise OSError(error.errno, os.strerror(error.errno or errno.EIO)) from None
