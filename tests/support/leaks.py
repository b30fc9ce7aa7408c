"""Whatever a job left on disk, unpacked so that it can be searched: Parquet columns decoded, archives inflated."""

import io
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

# The third byte of gzip names its only method.
_ZSTD, _GZIP, _ZIP, _PARQUET = b"\x28\xb5\x2f\xfd", b"\x1f\x8b\x08", b"PK\x03\x04", b"PAR1"


def contents(root: Path) -> Iterator[tuple[str, bytes]]:
    """Every file below `root`: its name below `root` with its bytes, and the same once more for what is packed in it.

    Names themselves come first, as the content of "".
    """
    files = sorted(path for path in root.rglob("*") if path.is_file() or path.is_symlink())
    yield "", "\n".join(str(path.relative_to(root)) for path in root.rglob("*")).encode("utf-8", "surrogateescape")
    for path in files:
        content = path.read_bytes()
        name = str(path.relative_to(root))
        yield name, content
        for inner in unpacked(content):
            yield f"{name} (unpacked)", inner


def unpacked(content: bytes) -> Iterator[bytes]:
    """What Parquet, gzip, zstd and zip hold, one in the other."""
    found: list[bytes] = []
    if content[:4] == _PARQUET:
        table = pq.read_table(pa.BufferReader(content))
        found = [part for column in table.columns for part in _values(column)]
        yield from found
        return
    if content[:4] == _ZSTD:
        # Spark ends a log in the middle of a frame where it was killed: what there is of it counts.
        found = [b"".join(_zstd(content))]
    elif content[:3] == _GZIP:
        found = [b"".join(_gzip(content))]
    elif content[:4] == _ZIP:
        with zipfile.ZipFile(io.BytesIO(content)) as packed:
            found = [packed.read(name) for name in packed.namelist()]
    for inner in found:
        yield inner
        yield from unpacked(inner)


def _zstd(content: bytes) -> Iterator[bytes]:
    stream = pa.CompressedInputStream(pa.BufferReader(content), "zstd")
    while True:
        try:
            part = stream.read(1 << 16)
        except (OSError, pa.ArrowException):
            return
        if not part:
            return
        yield part


def _gzip(content: bytes) -> Iterator[bytes]:
    """Inflate the members of a gzip file as far as they go; random bytes may begin like one."""
    while content[:3] == _GZIP:
        member = zlib.decompressobj(16 + zlib.MAX_WBITS)
        for start in range(0, len(content), 1 << 16):
            try:
                yield member.decompress(content[start : start + (1 << 16)])
            except zlib.error:
                return
            if member.eof:
                content = member.unused_data + content[start + (1 << 16) :]
                break
        else:
            return


def _values(column: pa.ChunkedArray) -> Iterator[bytes]:
    """All values of a column as text or bytes, one in a line; structures, lists and maps by what they hold."""
    for chunk in column.chunks:
        yield from _of_array(chunk)


def _of_array(array: pa.Array) -> Iterator[bytes]:
    kind = array.type
    if pa.types.is_struct(kind):
        for number in range(kind.num_fields):
            yield from _of_array(array.field(number))
    elif pa.types.is_map(kind):
        yield from _of_array(array.keys)
        yield from _of_array(array.items)
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        yield from _of_array(array.flatten())
    elif pa.types.is_dictionary(kind):
        yield from _of_array(array.dictionary_decode())
    elif pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        yield b"\n".join(value for value in array.to_pylist() if value is not None)
    elif not pa.types.is_floating(kind) or len(array) < 10_000:
        yield "\n".join(str(value) for value in array.to_pylist() if value is not None).encode("utf-8", "surrogatepass")
    else:
        yield array.to_numpy(zero_copy_only=False).tobytes()
