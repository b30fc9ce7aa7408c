"""Principal directions of a model's features, for lower bounds of distances."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cbmir_spark.errors import ModelError

PROJECTION_DIRECTIONS = 128
# Rows per block of a projection.
_PROJECTED = 1_024


@dataclass(frozen=True)
class Projection:
    """Directions in which the feature vectors of a model vary most, for lower bounds of distances.

    With orthonormal rows P, p = P(x − mean) and r = ‖(x − mean) − Pᵀp‖, any two vectors are at least
    √(‖p₁ − p₂‖² + (r₁ − r₂)²) apart (design decision 4). mean is (D,) and directions (K, D), both float64.
    """

    mean: NDArray[np.float64]
    directions: NDArray[np.float64]

    @property
    def defect(self) -> float:
        """‖PPᵀ − I‖₂: the distance of the rows from orthonormal, which a proved bound has to allow for."""
        gram = self.directions @ self.directions.T
        return float(np.linalg.norm(gram - np.eye(len(gram)), 2))

    def apply(self, vectors: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
        """Project (N, D) float32 vectors to (N, K) float32 coordinates and (N,) float64 residual norms.

        The residual is formed and then measured, since ‖x‖² − ‖p‖² loses the digits that the bound depends on. Memory:
        two float64 blocks of _PROJECTED rows, beside the arguments and results.
        """
        coordinates = np.empty((len(vectors), len(self.directions)), np.float32)
        squares = np.empty(len(vectors))
        for start in range(0, len(vectors), _PROJECTED):
            block = slice(start, start + _PROJECTED)
            residual = vectors[block].astype(np.float64)
            residual -= self.mean
            found = residual @ self.directions.T
            residual -= found @ self.directions
            coordinates[block] = found
            squares[block] = np.einsum("nd,nd->n", residual, residual)
        return coordinates, np.sqrt(squares)

    @staticmethod
    def fit(batches: Iterable[NDArray[np.float32]], directions: int = PROJECTION_DIRECTIONS) -> "Projection":
        """Find the principal directions of all rows of the (n, D) batches, in float64; batches are read once.

        There are min(directions, D) of them, also where the rows span less: any orthonormal rows give a
        valid bound. Raises ModelError where there are no rows.
        """
        count, mean, scatter = 0, np.zeros(0), np.zeros((0, 0))
        for batch in batches:
            rows = batch.astype(np.float64)
            if not len(rows):
                continue
            batch_mean = rows.mean(axis=0)
            rows -= batch_mean
            if not count:
                count, mean, scatter = len(rows), batch_mean, rows.T @ rows
                continue
            # Chan et al. 1983: means and scatters of two sets combined, without the cancellation of Σx².
            total = count + len(batch)
            shift = batch_mean - mean
            scatter += rows.T @ rows + np.outer(shift, shift) * (count * len(batch) / total)
            mean = mean + shift * (len(batch) / total)
            count = total
        if not count:
            raise ModelError("no feature vectors to fit the projection on; the train split is empty")
        _, eigenvectors = np.linalg.eigh(scatter)
        leading = eigenvectors[:, ::-1][:, :directions]
        orthonormal, _ = np.linalg.qr(leading)
        return Projection(mean=mean, directions=np.ascontiguousarray(orthonormal.T))
