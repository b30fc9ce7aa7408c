"""The gate for `candidate`: what is compared, and the reason that is given."""

import pytest

from cbmir_spark.models.promotion import Incumbent, decide

# The weights are not looked at.
STANDING = Incumbent("4", loaded=None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("reached", "incumbent", "incumbent_reached", "taken", "reason"),
    [
        (None, None, None, True, "there are no validation patients"),
        (None, STANDING, 0.9, True, "there are no validation patients"),
        (0.1, None, None, True, "there is no candidate that loads"),
        (0.1, STANDING, None, True, "version 4 takes pictures of another preprocessing"),
        (0.88, STANDING, 0.9, False, "its mAP is worse than that of version 4 by more than 0.01"),
        (0.9, STANDING, 0.9, True, "its mAP is not worse than that of version 4 by more than 0.01"),
    ],
)
def test_a_model_is_refused_only_for_a_map_that_is_worse_by_more_than_the_margin(
    reached: float | None, incumbent: Incumbent | None, incumbent_reached: float | None, taken: bool, reason: str
) -> None:
    found = decide(reached, incumbent, incumbent_reached, margin=0.01)
    assert (found.taken, found.reason) == (taken, reason)
    assert (found.reached, found.incumbent_reached) == (reached, incumbent_reached)
