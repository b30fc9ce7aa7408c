"""Embed batches of pictures with a loaded model."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from cbmir_spark.errors import ModelError
from cbmir_spark.models.artifact import UNKNOWN, Manifest
from cbmir_spark.models.networks import SIDE
from cbmir_spark.models.weights import Loaded

# Rows of one forward pass of embed_batches; smaller batches are filled up. BLAS kernels work on blocks of 4 or 6 rows
# and may round the rest of a batch differently: 12 leaves no rest, and one query costs little.
_ROWS = 12
_THREADS = threading.Lock()


@dataclass(frozen=True)
class Embedded:
    """Vectors and classes of N pictures.

    vectors: (N, D) float32. scores: (N, classes) float32, softmax renormalised over the labels that are
    possible for each picture's modality. labels and probabilities (N,): the best score and its class, or
    None and 0 where the model learned no class of that modality.
    """

    vectors: NDArray[np.float32]
    scores: NDArray[np.float32]
    labels: tuple[str | None, ...]
    probabilities: NDArray[np.float32]


def embed_batches(loaded: Loaded, pixels: NDArray[np.uint8], modalities: Sequence[str] | None = None) -> Embedded:
    """Embed and classify (N, 256, 256) uint8 pixels; runs per task, on the model's device.

    `modalities` are the N normalised Modality values; UNKNOWN, or no modalities, leaves every class open.
    On one type of processor, a frame gets the same bytes alone and in any batch, in every process: the network runs on
    one thread, over a fixed number of rows. Between types of processors vectors differ by up to 1e-5 of their length.
    Raises ModelError for pixels of another shape or type.
    """
    if pixels.dtype != np.uint8 or pixels.shape[1:] != (SIDE, SIDE):
        raise ModelError(f"pixels are {pixels.dtype} {pixels.shape}, the network takes uint8 (N, 256, 256)")
    model, manifest = loaded.model, loaded.manifest
    device = model.device
    vectors = np.empty((len(pixels), manifest.embedding_dim), dtype=np.float32)
    logits = np.empty((len(pixels), len(manifest.classes)), dtype=np.float32)
    with _one_thread(), torch.inference_mode():
        for start in range(0, len(pixels), _ROWS):
            rows = pixels[start : start + _ROWS]
            batch = np.zeros((_ROWS, SIDE, SIDE), dtype=np.uint8)
            batch[: len(rows)] = rows
            inputs = model.to_input(torch.from_numpy(batch).to(device)).contiguous(memory_format=torch.channels_last)
            embedded = model.embed(inputs)
            vectors[start : start + len(rows)] = embedded[: len(rows)].cpu().numpy()
            logits[start : start + len(rows)] = model.classify(embedded)[: len(rows)].cpu().numpy()
    scores = class_scores(logits, manifest, modalities)
    best = scores.argmax(axis=1) if len(scores) else np.zeros(0, dtype=np.int64)
    probabilities = scores[np.arange(len(scores)), best]
    labels = tuple(
        manifest.classes[index] if probability > 0 else None
        for index, probability in zip(best, probabilities, strict=True)
    )
    return Embedded(vectors, scores, labels, probabilities)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one thread: matrix products round differently with each number of threads.

    MKL's number of threads is one for the whole process, hence the lock. Spark gives its Python workers one thread each
    anyway.
    """
    with _THREADS:
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def class_scores(
    logits: NDArray[np.float32], manifest: Manifest, modalities: Sequence[str] | None = None
) -> NDArray[np.float32]:
    """Apply the softmax to (N, classes) logits over the classes possible for each row's modality; 0 for the others."""
    allowed = np.ones(logits.shape, dtype=bool)
    for row, modality in enumerate(modalities or ()):
        if modality != UNKNOWN:
            possible = manifest.possible.get(modality, ())
            allowed[row] = [name in possible for name in manifest.classes]
    # Masked before the softmax, not divided after it: a sum that underflows would leave 0/0.
    masked = np.where(allowed, logits.astype(np.float64), -np.inf)
    top = masked.max(axis=1, keepdims=True, initial=-np.inf)
    weights = np.exp(masked - np.where(np.isfinite(top), top, 0.0))
    total = weights.sum(axis=1, keepdims=True)
    shares: NDArray[np.float64] = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
    return shares.astype(np.float32)
