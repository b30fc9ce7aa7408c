"""Call S3-compatible storage; errors name a bucket at most."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import lru_cache
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError

from cbmir_spark.config import StorageSettings
from cbmir_spark.errors import AccessDenied, InputError, NotFound, StorageError
from cbmir_spark.storage.uri import S3A, StoredObject, is_file_uri

# A request that is silent for so long is sent again: servers that stall for half a minute are common.
CONNECT_SECONDS = 10
READ_SECONDS = 20
# Tasks read one object at a time; only a listing beside a lease's renewal needs a second connection.
_CONNECTIONS = 4
# Objects that one DeleteObjects request may name.
DELETE_AT_ONCE = 1000


def file_system(storage: StorageSettings, *, ahead: bool = True) -> Any:
    """Build an s3fs file system, for libraries that read through fsspec; `ahead` reads beyond each request."""
    import s3fs

    return s3fs.S3FileSystem(
        endpoint_url=storage.endpoint,
        client_kwargs={"region_name": storage.region},
        config_kwargs={"s3": {"addressing_style": "path" if storage.path_style else "auto"}},
        default_cache_type="readahead" if ahead else "none",
    )


def seconds_old(uri: str, storage: StorageSettings) -> float:
    """Seconds since an `s3a:` object was last written, by the storage's clocks: accurate to about two seconds.

    Raises FileNotFoundError if it is gone.
    """
    bucket, key = s3_address(uri)
    with translate_errors(bucket):
        answer = s3_client(storage).head_object(Bucket=bucket, Key=key)
    now = parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
    age: float = (now - answer["LastModified"]).total_seconds()
    return max(0.0, age)


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
            # Many S3-compatible servers do not support the checksums that boto3 sends by default.
            request_checksum_calculation="when_required",
        ),
    )


def s3_client(storage: StorageSettings) -> Any:
    """The boto3 client of this process."""
    # A forked process must not share its parent's connections.
    return _client_of(storage, os.getpid())


def bucket_and_key(uri: str) -> tuple[str, str]:
    """Split an `s3a:` URI."""
    bucket, _, key = uri.removeprefix(S3A).partition("/")
    return bucket, key


def s3_address(uri: str) -> tuple[str, str]:
    """Split an `s3a:` URI. Raises InputError for any other."""
    if is_file_uri(uri):
        raise InputError("conditional writes need object storage: give an s3a: URI")
    return bucket_and_key(uri)


def prefix_of(uri: str) -> str:
    """The prefix of the keys below a location; keys may have empty components, so only one slash is added."""
    _, slash, key = uri.removeprefix(S3A).partition("/")
    return key + "/" if slash else ""


def pages(uri: str, storage: StorageSettings, **how: object) -> Iterator[Mapping[str, Any]]:
    """List a prefix page by page; `how` are further parameters of ListObjectsV2."""
    bucket, _ = bucket_and_key(uri)
    following: dict[str, object] = {}
    while True:
        with translate_errors(bucket), _raise_if_bucket_missing(bucket):
            page = s3_client(storage).list_objects_v2(Bucket=bucket, Prefix=prefix_of(uri), **how, **following)
        yield page
        if not page.get("IsTruncated"):
            return
        following = {"ContinuationToken": page["NextContinuationToken"]}


@contextmanager
def _raise_if_bucket_missing(bucket: str) -> Iterator[None]:
    """Raise StorageError for 404: a listing lacks its bucket, never a prefix, and is no folder that is gone."""
    try:
        yield
    except ClientError as error:
        if error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") == 404:
            raise StorageError(f"bucket {bucket} does not exist: create it, or check the URI") from None
        raise


def listed_objects(bucket: str, page: Mapping[str, Any]) -> list[StoredObject]:
    """The objects of one page of a listing."""
    # Empty objects whose name ends in a slash only make a folder visible in some tools.
    return [
        StoredObject(f"{S3A}{bucket}/{each['Key']}", each["Size"], _whole_seconds(each["LastModified"]), etag_of(each))
        for each in page.get("Contents", ())
        if each["Size"] or not each["Key"].endswith("/")
    ]


def object_from(uri: str, answer: Mapping[str, Any]) -> StoredObject:
    """Describe an object by the headers of a GET or HEAD."""
    return StoredObject(uri, answer["ContentLength"], _whole_seconds(answer["LastModified"]), etag_of(answer))


def _whole_seconds(moment: datetime) -> datetime:
    # Some servers list fractions of a second, which the Last-Modified header cannot carry.
    return moment.astimezone(UTC).replace(microsecond=0)


def etag_of(answer: Mapping[str, Any]) -> str | None:
    """The ETag without its quotes, None if there is none."""
    return str(answer.get("ETag") or "").strip('"') or None


class ConditionFailed(StorageError):
    """A conditional write found another state than its condition."""


@contextmanager
def translate_errors(bucket: str) -> Iterator[None]:
    """Raise botocore's errors as StorageError, without the names, addresses and signatures in their texts."""
    try:
        yield
    except ClientError as error:
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        code = str(error.response.get("Error", {}).get("Code"))
        if code == "NoSuchBucket":
            raise NotFound(f"bucket {bucket} does not exist: create it, or check the URI") from None
        if status == 404:
            raise NotFound(f"bucket {bucket}: no such object") from None
        if status in (401, 403):
            raise AccessDenied(
                f"bucket {bucket}: refused ({code}); check the AWS credentials and their policy"
            ) from None
        if status in (409, 412):
            raise ConditionFailed(f"bucket {bucket}: another process wrote this object first ({code})") from None
        raise StorageError(f"bucket {bucket}: the server answered {code} (HTTP status {status})") from None
    except (NoCredentialsError, PartialCredentialsError):
        raise AccessDenied(
            f"bucket {bucket}: no AWS credentials found; set them in the environment, a profile or a role"
        ) from None
    except BotoCoreError as error:
        raise StorageError(
            f"bucket {bucket}: the request failed ({type(error).__name__}); check storage.endpoint and the network"
        ) from None
