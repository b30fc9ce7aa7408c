"""Objects by URI, on the local file system and in S3-compatible storage. Import from here, not from the modules."""

from cbmir_spark.storage.local import NO_FILE, mount_of
from cbmir_spark.storage.objects import ObjectStore
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
    "NO_FILE",
    "ObjectStore",
    "Replaced",
    "StoredObject",
    "canonical",
    "is_below",
    "is_link",
    "is_local",
    "is_native",
    "join",
    "local_path",
    "mount_of",
]
