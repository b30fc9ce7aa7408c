"""The model that MLflow users load and serve: a torch program that needs nothing of this package."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from cbmir_spark.models.networks import SIDE, Network


class Served(nn.Module):
    """uint8 (N, 256, 256) pixels → float32 (N, classes) probabilities."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.softmax(self.network(self.network.to_input(pixels)), dim=1)


def log_served(network: Network, classes: Sequence[str]) -> Any:
    """Log the served model to MLflow's active run, without pickle; MLflow's description of it. Runs on the driver."""
    import mlflow.pytorch
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    with warnings.catch_warnings():
        # torch warns that it reads the program from a buffer that is not writable.
        warnings.simplefilter("ignore", UserWarning)
        return mlflow.pytorch.log_model(
            Served(network).eval(),
            name="model",
            serialization_format="pt2",
            signature=ModelSignature(
                inputs=Schema([TensorSpec(np.dtype(np.uint8), (-1, SIDE, SIDE))]),
                outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, len(classes)))]),
            ),
            # Two rows: torch.export takes a side of length one for a constant.
            input_example=np.zeros((2, SIDE, SIDE), dtype=np.uint8),
            # Otherwise MLflow starts another Python to find out.
            pip_requirements=[f"torch=={torch.__version__.partition('+')[0]}", f"numpy=={np.__version__}"],
        )
