"""Settings that decide the pixels of the 256×256 picture, and the version that names them."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from cbmir_spark.dicom.vocabulary_tables import BODY_PARTS, MODALITIES
from cbmir_spark.errors import ConfigError

# Increase it with a change of the code that changes the pixels of sound objects: index, training and queries must agree
# on it, so that no lake and no model can be used with another one.
PIXELS_REVISION = 1
# Increase it with a change that reads some objects in another way, and describe it in maintenance/revisions.py: then
# `cbmir upgrade` finds what to read again. Models remain valid.
READING_REVISION = 2


@dataclass(frozen=True)
class Preprocessing:
    """Settings that decide what the network sees of a frame; models record their `version`.

    `windows` gives (low, high) by modality and body part, "*" for all other parts of a modality: CT in Hounsfield
    units, PT in SUV by body weight. Everything else takes two `percentiles` of the pixels that are not padding.
    `frames` chooses the frames of multi-frame objects: the `middle` one; `all`, but at most `max_frames`; `auto`, all
    of enhanced CT, MR and PT and the middle one of everything else; or a number of them. Several are evenly spaced.

    Raises ConfigError for a window of an unknown modality or body part.
    """

    aspect: Literal["keep", "stretch"]
    windows: Mapping[str, Mapping[str, tuple[float, float]]]
    percentiles: tuple[float, float]
    max_frames: int
    frames: Literal["auto", "all", "middle"] | int = "auto"

    def __post_init__(self) -> None:
        for modality, parts in self.windows.items():
            if modality not in MODALITIES:
                raise ConfigError(
                    f"pixels.windows: {modality!r} is not a known modality: `cbmir vocabulary` lists them"
                )
            if unknown := [part for part in parts if part != "*" and part not in BODY_PARTS]:
                raise ConfigError(
                    f"pixels.windows.{modality}: {unknown[0]!r} is not a known body part: `cbmir vocabulary` lists them"
                )

    @cached_property
    def version(self) -> str:
        """A short name that changes with every setting, and with PIXELS_REVISION."""
        text = json.dumps(
            [
                {
                    m: {p: [float(x) for x in window] for p, window in parts.items()}
                    for m, parts in self.windows.items()
                },
                [float(x) for x in self.percentiles],
                self.max_frames,
                self.frames,
            ],
            sort_keys=True,
        )
        digest = hashlib.sha256(f"{PIXELS_REVISION} {self.aspect} {text}".encode()).hexdigest()
        return f"px{PIXELS_REVISION}-{self.aspect}-{digest[:8]}"

    def window(self, modality: str, body_part: str) -> tuple[float, float] | None:
        """Look up the fixed window of a modality and body part; None where percentiles decide."""
        parts = self.windows.get(modality, {})
        return parts.get(body_part) or parts.get("*")

    def chosen(self, frames: int, enhanced: bool) -> list[int]:
        """Choose the frames to read, numbered from 0, of an object that has `frames` of them."""
        if self.frames == "middle" or (self.frames == "auto" and not enhanced):
            return [frames // 2]
        wanted = min(frames, self.frames if isinstance(self.frames, int) else self.max_frames)
        return [(2 * i + 1) * frames // (2 * wanted) for i in range(wanted)]
