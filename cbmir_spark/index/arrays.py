"""Convert columns of Arrow batches to numpy arrays, without a copy where the layout allows it."""

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cbmir_spark.errors import TableError
from cbmir_spark.lake import columns as cols


def vectors_of(batch: pa.RecordBatch, dimension: int) -> NDArray[np.float32]:
    """Get the (n, D) float32 vectors of a batch; see `matrix`."""
    return matrix(batch.column(cols.VECTOR), dimension)


def matrix(lists: pa.ListArray | pa.ChunkedArray, dimension: int | None = None) -> NDArray[np.float32]:
    """Convert a column of lists to (n, D) float32, without a copy if it is one chunk.

    Raises TableError if a list does not have `dimension` values (None: as many as the first).
    """
    if isinstance(lists, pa.ChunkedArray):
        lists = lists.chunk(0) if lists.num_chunks == 1 else lists.combine_chunks()
    lengths = np.diff(lists.offsets.to_numpy())
    expected = dimension if dimension is not None else int(lengths[0]) if len(lengths) else 0
    if not (lengths == expected).all():
        wrong = int((lengths != expected).sum())
        raise TableError(f"{wrong} of {len(lengths)} vectors do not have {expected} values: run `cbmir index`")
    flat: NDArray[np.float32] = lists.flatten().to_numpy(zero_copy_only=True)
    return flat.reshape(len(lists), expected)


def vector_column(vectors: NDArray[np.float32]) -> pa.Array:
    """Convert (n, D) float32 to an Arrow list column."""
    offsets = np.arange(0, vectors.size + 1, vectors.shape[1], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(vectors.reshape(-1)))


def pixels_of(batch: pa.RecordBatch) -> NDArray[np.uint8]:
    """Get the (n, 256, 256) uint8 pixels of a batch, without a copy. Raises TableError for frames of another size."""
    column = batch.column(cols.PIXELS_COLUMN)
    offsets = np.frombuffer(column.buffers()[1], dtype=np.int32)[column.offset : column.offset + len(column) + 1]
    if not (np.diff(offsets) == cols.FRAME_BYTES).all():
        raise TableError(f"PIXELS holds frames that are not {cols.FRAME_BYTES} bytes long: ingest into a new lake")
    values = np.frombuffer(column.buffers()[2], dtype=np.uint8)
    return values[offsets[0] : offsets[-1]].reshape(-1, cols.SIDE, cols.SIDE)
