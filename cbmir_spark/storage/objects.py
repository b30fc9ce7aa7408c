"""List, read and write objects below `file:` and `s3a:` URIs. No Spark: drivers and tasks use it alike.

Credentials for object storage come from the usual AWS chain (environment, profile, instance role) wherever the
code runs, so neither Spark's configuration nor a task's closure carries them. No error names an object, since
a name may identify a patient: of `s3a:` the bucket at most.
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
from cbmir_spark.storage.local import hide_paths, mode_of, read_file, scan_folder, stored_file, write_file
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
    translate_errors,
)
from cbmir_spark.storage.uri import S3A, StoredObject, is_file_uri, local_path


@dataclass(frozen=True)
class ObjectStore:
    """Objects by canonical URI, local or in the S3-compatible storage that `settings` describe.

    Nothing is opened before a method is called, and instances pickle: drivers and tasks use them alike.
    """

    settings: StorageSettings

    def kind(self, uri: str) -> str:
        """Look up what is at a canonical URI: `file`, `folder` or `nothing`."""
        if is_file_uri(uri):
            mode = mode_of(local_path(uri))
            return "file" if stat.S_ISREG(mode) else "folder" if stat.S_ISDIR(mode) else "nothing"
        bucket, key = bucket_and_key(uri)
        if self.find(uri) is not None:
            return "file"
        try:
            with translate_errors(bucket):
                answer = s3_client(self.settings).list_objects_v2(Bucket=bucket, Prefix=prefix_of(uri), MaxKeys=1)
        except FileNotFoundError:
            return "nothing"
        return "folder" if "Contents" in answer or not key else "nothing"

    def list_folder(self, uri: str) -> tuple[list[str], list[StoredObject]]:
        """List the folders and the objects directly below a canonical URI, each sorted by URI.

        Symbolic links are followed unless they lead to a folder that contains them. Raises OSError if anything there
        cannot be listed: a listing is complete or fails.
        """
        if is_file_uri(uri):
            folders, objects, _ = self.scan_folder(uri)
        else:
            bucket, _ = bucket_and_key(uri)
            folders, objects = [], []
            for page in pages(uri, self.settings, Delimiter="/"):
                folders += [f"{S3A}{bucket}/{each['Prefix'][:-1]}" for each in page.get("CommonPrefixes", ())]
                objects += listed_objects(bucket, page)
        return sorted(folders), sorted(objects, key=lambda o: o.uri)

    def scan_folder(self, uri: str) -> tuple[list[str], list[StoredObject], list[str]]:
        """List a local folder as `list_folder` does, with the URIs of entries that are neither folders nor files."""
        with hide_paths():
            return scan_folder(local_path(uri))

    def list_objects(self, uri: str) -> Iterator[StoredObject]:
        """Iterate over every object below a canonical URI, at any depth, hidden names included; see `list_folder`."""
        if is_file_uri(uri):
            folders = [uri]
            while folders:
                folder = folders.pop()
                try:
                    below, objects = self.list_folder(folder)
                except FileNotFoundError:
                    if folder == uri:
                        raise
                    # Deleted with its objects since its parent was listed; its siblings may still be there.
                    continue
                yield from objects
                folders += reversed(below)
        else:
            bucket, _ = bucket_and_key(uri)
            for page in pages(uri, self.settings):
                yield from listed_objects(bucket, page)

    def find(self, uri: str) -> StoredObject | None:
        """Look up the object at a canonical URI, None if there is none; a folder or a device is no object."""
        if is_file_uri(uri):
            with hide_paths():
                try:
                    found = os.stat(local_path(uri))
                except (FileNotFoundError, NotADirectoryError):
                    return None
            return stored_file(uri, found) if stat.S_ISREG(found.st_mode) else None
        bucket, key = bucket_and_key(uri)
        if not key:
            return None
        try:
            with translate_errors(bucket):
                answer = s3_client(self.settings).head_object(Bucket=bucket, Key=key)
        except FileNotFoundError:
            return None
        return object_from(uri, answer)

    def read_bytes(self, uri: str) -> bytes:
        """Read the whole content of an object; see `read`."""
        return self.read(uri)[0]

    def read(self, uri: str) -> tuple[bytes, StoredObject]:
        """Read the whole content of an object, with the description that belongs to exactly these bytes.

        An object that changes meanwhile is read again. Raises FileNotFoundError if it is gone, Replaced if it changed
        during every attempt, OSError if it cannot be read.
        """
        if is_file_uri(uri):
            with hide_paths():
                return read_file(uri)
        bucket, key = bucket_and_key(uri)
        for attempt in range(self.settings.attempts):
            with translate_errors(bucket):
                answer = s3_client(self.settings).get_object(Bucket=bucket, Key=key)
                # botocore retries requests, but not bodies that break off; the new answer has its own description.
                with (
                    closing(answer["Body"]) as body,
                    suppress(HTTPClientError, IncompleteReadError, FlexibleChecksumError),
                ):
                    content: bytes = body.read()
                    if len(content) == answer["ContentLength"]:
                        return content, object_from(uri, answer)
            time.sleep(min(2.0**attempt, READ_SECONDS) * random.random() / 4)
        raise StorageError(
            f"bucket {bucket}: an object could not be read to its end in {self.settings.attempts} attempts; try again"
        )

    def write_bytes(self, uri: str, content: bytes, durable: bool = True) -> None:
        """Write an object so that readers see all of it or nothing of it.

        With `durable` a local write waits for the disk, so that the object survives a power failure.
        """
        if is_file_uri(uri):
            with hide_paths():
                write_file(local_path(uri), content, durable)
            return
        bucket, key = bucket_and_key(uri)
        with translate_errors(bucket):
            # boto3 does not take Arrow's buffers.
            s3_client(self.settings).put_object(Bucket=bucket, Key=key, Body=bytes(content))

    def delete(self, uri: str) -> None:
        """Delete an object if it exists."""
        if is_file_uri(uri):
            with hide_paths(), suppress(FileNotFoundError):
                os.remove(local_path(uri))
            return
        bucket, key = bucket_and_key(uri)
        with translate_errors(bucket):
            s3_client(self.settings).delete_object(Bucket=bucket, Key=key)

    def delete_folder(self, uri: str) -> None:
        """Delete a folder and all below it if it exists."""
        if is_file_uri(uri):
            with hide_paths(), suppress(FileNotFoundError, NotADirectoryError):
                shutil.rmtree(local_path(uri))
            return
        bucket, _ = bucket_and_key(uri)
        for page in pages(uri, self.settings, MaxKeys=DELETE_AT_ONCE):
            names = [{"Key": each["Key"]} for each in page.get("Contents", ())]
            if not names:
                continue
            with translate_errors(bucket):
                answer = s3_client(self.settings).delete_objects(
                    Bucket=bucket, Delete={"Objects": names, "Quiet": True}
                )
            if failed := answer.get("Errors"):
                codes = ", ".join(sorted({str(each.get("Code")) for each in failed}))
                raise StorageError(
                    f"bucket {bucket}: {len(failed)} objects were not deleted ({codes}); check the credentials' policy"
                )

    def create_if_absent(self, uri: str, content: bytes) -> str | None:
        """Write an `s3a:` object if there is none; its ETag, or None if there is one already.

        `content` must be unique to the caller: a retry after a lost reply recognises the caller's write by it.
        """
        return self._put_if(uri, content, {"IfNoneMatch": "*"})

    def replace_if_match(self, uri: str, content: bytes, etag: str) -> str | None:
        """Replace an `s3a:` object that still has this ETag; its new ETag, or None if it was changed or is gone.

        `content` must be unique to the caller, as for `create_if_absent`.
        """
        return self._put_if(uri, content, {"IfMatch": f'"{etag}"'})

    def _put_if(self, uri: str, content: bytes, condition: Mapping[str, str]) -> str | None:
        bucket, key = s3_address(uri)
        try:
            with translate_errors(bucket):
                answer = s3_client(self.settings).put_object(Bucket=bucket, Key=key, Body=content, **condition)
            return etag_of(answer)
        except (ConditionFailed, FileNotFoundError):
            try:
                found, described = self.read(uri)
            except FileNotFoundError:
                return None
            return described.etag if found == content else None

    def file_system(self, *, ahead: bool = True) -> Any:
        """Build an s3fs file system, for libraries that read through fsspec; `ahead` reads beyond each request."""
        return file_system(self.settings, ahead=ahead)

    def seconds_old(self, uri: str) -> float:
        """Seconds since an `s3a:` object was last written, by the storage's clock: accurate to about two seconds.

        Raises FileNotFoundError if there is no such object.
        """
        return seconds_old(uri, self.settings)
