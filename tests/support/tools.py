"""Programs that tests run and that pip does not install; `.ci/packages.txt` lists their Debian packages."""

import os
import shutil
from pathlib import Path

import pytest

REQUIRED = "CBMIR_REQUIRE_TOOLS"

# Commands refuse variables of CBMIR_ that are not settings: processes that tests start get it under another name.
INHERITED = "TESTS_REQUIRE_TOOLS"
if os.environ.pop(REQUIRED, None) == "1":
    os.environ[INHERITED] = "1"


def require_tool(*names: str) -> Path:
    """The first of these programs on the PATH.

    Skips the test where there is none, or fails it where CBMIR_REQUIRE_TOOLS is 1, as in CI.
    """
    for name in names:
        found = shutil.which(name)
        if found:
            return Path(found)
    reason = f"none of {', '.join(names)} is on the PATH; .ci/packages.txt says what installs the tools of tests"
    if os.environ.get(INHERITED) == "1":
        pytest.fail(f"{reason} ({REQUIRED}=1)", pytrace=False)
    pytest.skip(reason)
