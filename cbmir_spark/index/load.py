"""Load a published model with torch, once per Python worker."""

from functools import lru_cache

from cbmir_spark.index.open import read_model
from cbmir_spark.models import weights
from cbmir_spark.models.weights import Loaded
from cbmir_spark.storage import ObjectStore


@lru_cache(maxsize=1)
def load(folder: str, store: ObjectStore) -> Loaded:
    """Load the model that `publish_model` put into a folder, once per Python worker; see `read_model`.

    A folder's content never changes, since its name holds the model's digest.
    """
    return weights.load(read_model(folder, store))
