"""A process that is killed at a given moment, without losing the test's own."""

from collections.abc import Callable
from typing import Any


class Killed(BaseException):
    """In the place of SIGKILL: no handler of `Exception` sees it."""


def dying(step: Callable[..., Any], calls: int) -> Callable[..., Any]:
    """`step`, killed right after its call of this number."""
    left = calls

    def run(*arguments: Any, **options: Any) -> Any:
        nonlocal left
        left -= 1
        result = step(*arguments, **options)
        if left == 0:
            raise Killed
        return result

    return run
