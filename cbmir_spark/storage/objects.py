"""Objects below `file:` and `s3a:` roots: list, read, write. No Spark: drivers and tasks use it alike.

Credentials for object storage come from the usual AWS chain (environment, profile, instance role) wherever the
code runs, so that neither Spark's configuration nor a task's closure carries them. No error names an object, since
names may hold what identifies a patient: of `s3a:` the bucket at most.
"""

import os
import random
import shutil
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Any

from botocore.exceptions import FlexibleChecksumError, HTTPClientError, IncompleteReadError

from cbmir_spark.config import StorageSettings
from cbmir_spark.errors import StorageError
from cbmir_spark.storage.local import mode_of, read_file, scan_folder, stored_file, without_path, write_file
from cbmir_spark.storage.s3 import (
    DELETE_AT_ONCE,
    READ_SECONDS,
    ConditionFailed,
    bucket_and_key,
    etag_of,
    file_system,
    listed_objects,
    object_from,
    pages,
    prefix_of,
    s3_address,
    s3_client,
    seconds_old,
    without_names,
)
from cbmir_spark.storage.uri import S3A, StoredObject, is_file_uri, local_path


@dataclass(frozen=True)
class ObjectStore:
    """Objects by canonical URI, local or in the S3-compatible storage that `settings` describe.

    Nothing is opened before a method is called, and instances pickle: drivers and tasks use them alike.
    """

    settings: StorageSettings

    def kind(self, uri: str) -> str:
        """What stands at a canonical URI: `file`, `folder` or `nothing`."""
        if is_file_uri(uri):
            mode = mode_of(local_path(uri))
            return "file" if stat.S_ISREG(mode) else "folder" if stat.S_ISDIR(mode) else "nothing"
        bucket, key = bucket_and_key(uri)
        if self.find(uri) is not None:
            return "file"
        try:
            with without_names(bucket):
                answer = s3_client(self.settings).list_objects_v2(Bucket=bucket, Prefix=prefix_of(uri), MaxKeys=1)
        except FileNotFoundError:
            return "nothing"
        return "folder" if "Contents" in answer or not key else "nothing"

    def list_folder(self, uri: str) -> tuple[list[str], list[StoredObject]]:
        """The folders and the objects directly below a canonical URI, each sorted by URI.

        Links of local folders are followed, but for those that lead back to a folder they lie in. Raises OSError where
        anything there cannot be listed, so that no listing is short unseen.
        """
        if is_file_uri(uri):
            with without_path():
                folders, objects = scan_folder(local_path(uri))
        else:
            bucket, _ = bucket_and_key(uri)
            folders, objects = [], []
            for page in pages(uri, self.settings, Delimiter="/"):
                folders += [f"{S3A}{bucket}/{each['Prefix'][:-1]}" for each in page.get("CommonPrefixes", ())]
                objects += listed_objects(bucket, page)
        return sorted(folders), sorted(objects, key=lambda o: o.uri)

    def list_objects(self, uri: str) -> Iterator[StoredObject]:
        """Every object below a canonical URI, at any depth, hidden names included; otherwise as `list_folder`."""
        if is_file_uri(uri):
            folders = [uri]
            while folders:
                folder = folders.pop()
                try:
                    below, objects = self.list_folder(folder)
                except FileNotFoundError:
                    if folder == uri:
                        raise
                    # Gone since its parent was listed, and its objects with it; the folders beside it are not.
                    continue
                yield from objects
                folders += reversed(below)
        else:
            bucket, _ = bucket_and_key(uri)
            for page in pages(uri, self.settings):
                yield from listed_objects(bucket, page)

    def find(self, uri: str) -> StoredObject | None:
        """The object at a canonical URI, None where there is none; a folder or a device is no object."""
        if is_file_uri(uri):
            with without_path():
                try:
                    found = os.stat(local_path(uri))
                except (FileNotFoundError, NotADirectoryError):
                    return None
            return stored_file(uri, found) if stat.S_ISREG(found.st_mode) else None
        bucket, key = bucket_and_key(uri)
        if not key:
            return None
        try:
            with without_names(bucket):
                answer = s3_client(self.settings).head_object(Bucket=bucket, Key=key)
        except FileNotFoundError:
            return None
        return object_from(uri, answer)

    def read_bytes(self, uri: str) -> bytes:
        """The whole content of an object, as `read` without what storage says of it."""
        return self.read(uri)[0]

    def read(self, uri: str) -> tuple[bytes, StoredObject]:
        """The whole content of an object, and what storage says of exactly these bytes.

        An object that changes meanwhile is read again. Raises FileNotFoundError where it is gone, Replaced where it did
        not hold still, OSError where it cannot be read.
        """
        if is_file_uri(uri):
            with without_path():
                return read_file(uri)
        bucket, key = bucket_and_key(uri)
        for attempt in range(self.settings.attempts):
            with without_names(bucket):
                answer = s3_client(self.settings).get_object(Bucket=bucket, Key=key)
                # botocore tries requests again, but not bodies that break off; the new answer describes itself.
                with (
                    closing(answer["Body"]) as body,
                    suppress(HTTPClientError, IncompleteReadError, FlexibleChecksumError),
                ):
                    content: bytes = body.read()
                    if len(content) == answer["ContentLength"]:
                        return content, object_from(uri, answer)
            time.sleep(min(2.0**attempt, READ_SECONDS) * random.random() / 4)
        raise StorageError(f"bucket {bucket}: the content of an object broke off {self.settings.attempts} times")

    def write_bytes(self, uri: str, content: bytes, durable: bool = True) -> None:
        """Write an object so that readers see all of it or nothing of it.

        What is not `durable`, since nobody would look for it after this machine has failed, does not wait for the disk.
        """
        if is_file_uri(uri):
            with without_path():
                write_file(local_path(uri), content, durable)
            return
        bucket, key = bucket_and_key(uri)
        with without_names(bucket):
            # Arrow's buffers, which a file would take, are no bytes to boto3.
            s3_client(self.settings).put_object(Bucket=bucket, Key=key, Body=bytes(content))

    def delete(self, uri: str) -> None:
        """Remove an object; nothing happens where there is none."""
        if is_file_uri(uri):
            with without_path(), suppress(FileNotFoundError):
                os.remove(local_path(uri))
            return
        bucket, key = bucket_and_key(uri)
        with without_names(bucket):
            s3_client(self.settings).delete_object(Bucket=bucket, Key=key)

    def delete_folder(self, uri: str) -> None:
        """Remove a folder and all below it; nothing happens where there is none."""
        if is_file_uri(uri):
            with without_path(), suppress(FileNotFoundError, NotADirectoryError):
                shutil.rmtree(local_path(uri))
            return
        bucket, _ = bucket_and_key(uri)
        for page in pages(uri, self.settings, MaxKeys=DELETE_AT_ONCE):
            names = [{"Key": each["Key"]} for each in page.get("Contents", ())]
            if not names:
                continue
            with without_names(bucket):
                answer = s3_client(self.settings).delete_objects(
                    Bucket=bucket, Delete={"Objects": names, "Quiet": True}
                )
            if failed := answer.get("Errors"):
                codes = ", ".join(sorted({str(each.get("Code")) for each in failed}))
                raise StorageError(f"bucket {bucket}: {len(failed)} objects could not be deleted ({codes})")

    def create_if_absent(self, uri: str, content: bytes) -> str | None:
        """Write an `s3a:` object where there is none; its ETag, or None where there is one already.

        `content` has to be the caller's alone: a write whose reply was lost is recognised by it when it is tried again.
        """
        return self._put_if(uri, content, {"IfNoneMatch": "*"})

    def replace_if_match(self, uri: str, content: bytes, etag: str) -> str | None:
        """Replace an `s3a:` object that still has this ETag; its new ETag, or None where it was changed or is gone.

        `content` has to be the caller's alone, as for `create_if_absent`.
        """
        return self._put_if(uri, content, {"IfMatch": f'"{etag}"'})

    def _put_if(self, uri: str, content: bytes, condition: Mapping[str, str]) -> str | None:
        bucket, key = s3_address(uri)
        try:
            with without_names(bucket):
                answer = s3_client(self.settings).put_object(Bucket=bucket, Key=key, Body=content, **condition)
            return etag_of(answer)
        except (ConditionFailed, FileNotFoundError):
            try:
                found, described = self.read(uri)
            except FileNotFoundError:
                return None
            return described.etag if found == content else None

    def file_system(self, *, ahead: bool = True) -> Any:
        """Object storage as an s3fs file system, for libraries that read through fsspec.

        `ahead` reads more than was asked for.
        """
        return file_system(self.settings, ahead=ahead)

    def seconds_old(self, uri: str) -> float:
        """Seconds since an `s3a:` object was last written, by the storage's own clock: right to about two seconds.

        Raises FileNotFoundError where there is no such object.
        """
        return seconds_old(uri, self.settings)
