"""Objects by URI, on the local file system and in S3-compatible storage; what is imported here is public."""

from cbmir_spark.storage.local import mount_of
from cbmir_spark.storage.objects import (
    create_if_absent,
    delete,
    delete_folder,
    find,
    kind,
    list_folder,
    list_objects,
    read,
    read_bytes,
    replace_if_match,
    write_bytes,
)
from cbmir_spark.storage.s3 import CONNECT_SECONDS, READ_SECONDS, file_system, s3_client, seconds_old
from cbmir_spark.storage.uri import (
    Replaced,
    StoredObject,
    canonical,
    is_below,
    is_link,
    is_local,
    is_native,
    join,
    local_path,
)

__all__ = [
    "CONNECT_SECONDS",
    "READ_SECONDS",
    "Replaced",
    "StoredObject",
    "canonical",
    "create_if_absent",
    "delete",
    "delete_folder",
    "file_system",
    "find",
    "is_below",
    "is_link",
    "is_local",
    "is_native",
    "join",
    "kind",
    "list_folder",
    "list_objects",
    "local_path",
    "mount_of",
    "read",
    "read_bytes",
    "replace_if_match",
    "s3_client",
    "seconds_old",
    "write_bytes",
]
