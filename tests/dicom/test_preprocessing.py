"""The settings of the picture and the version that names them."""

from dataclasses import replace

import pytest

from cbmir_spark.errors import ConfigError
from tests.support.dicom_files import PREPROCESSING


def test_the_version_names_everything_that_changes_pixels() -> None:
    changed = [
        PREPROCESSING,
        replace(PREPROCESSING, aspect="stretch"),
        replace(PREPROCESSING, percentiles=(1.0, 98.0)),
        replace(PREPROCESSING, max_frames=9),
        replace(PREPROCESSING, frames="middle"),
        replace(PREPROCESSING, frames=8),
        replace(PREPROCESSING, windows={**PREPROCESSING.windows, "PT": {"*": (0.0, 11.0)}}),
        replace(PREPROCESSING, windows={"CT": {"*": (-160.0, 240.0)}, "PT": {"*": (0.0, 10.0)}}),
    ]
    assert len({each.version for each in changed}) == len(changed)
    reordered = replace(PREPROCESSING, windows=dict(reversed(PREPROCESSING.windows.items())))
    assert reordered.version == PREPROCESSING.version
    assert PREPROCESSING.version.startswith("px1-keep-")


@pytest.mark.parametrize(
    "windows", [{"CTT": {"*": (0.0, 1.0)}}, {"CT": {"CHESTT": (0.0, 1.0)}}, {"CT": {"head": (0.0, 1.0)}}]
)
def test_a_window_for_what_cannot_be_is_refused(windows: dict[str, dict[str, tuple[float, float]]]) -> None:
    with pytest.raises(ConfigError, match=r"pixels\.windows"):
        replace(PREPROCESSING, windows=windows)
