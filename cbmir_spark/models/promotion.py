"""The gate that a new model passes to become `candidate`."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cbmir_spark.models.weights import Loaded


@dataclass(frozen=True)
class Incumbent:
    """The model that a new one is compared with."""

    version: str
    loaded: "Loaded"


@dataclass(frozen=True)
class Promotion:
    """Whether a new version became `candidate`, why, and the mAP that both reached, where that was measured."""

    taken: bool
    reason: str
    reached: float | None
    incumbent_reached: float | None


def decide(
    reached: float | None, incumbent: Incumbent | None, incumbent_reached: float | None, margin: float
) -> Promotion:
    """Refuse a model whose mAP is worse than the incumbent's on the same split by more than `margin`.

    Without the mAP of either there is nothing to compare, and the new model is taken.
    """
    taken = reached is None or incumbent_reached is None or reached >= incumbent_reached - margin
    if reached is None:
        reason = "there are no validation patients"
    elif incumbent is None:
        reason = "there is no candidate that loads"
    elif incumbent_reached is None:
        reason = f"version {incumbent.version} takes pictures of another preprocessing"
    else:
        worse = "is not worse" if taken else "is worse"
        reason = f"its mAP {worse} than that of version {incumbent.version} by more than {margin}"
    return Promotion(taken, reason, reached, incumbent_reached)
