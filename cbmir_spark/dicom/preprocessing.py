"""Settings of the 256×256 picture, and the version that names them."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from cbmir_spark.dicom.vocabulary_tables import BODY_PARTS, MODALITIES
from cbmir_spark.errors import ConfigError

# Bump with any change of the code that changes a pixel: index, training and queries must agree on it.
PIXELS_REVISION = 1


@dataclass(frozen=True)
class Preprocessing:
    """Everything that decides what the network sees of a frame; `version` names it, and travels with models.

    `windows` gives [low, high] by modality and body part, "*" for the rest of a modality: CT in Hounsfield units,
    PT in SUV by body weight. Everything else takes `percentiles` of what is not padding. `frames` is the policy
    of multi-frame objects: `auto` is all of enhanced CT, MR and PT and the middle one of everything else; all
    means at most `max_frames`, evenly spaced. A number is that many of any object, evenly spaced.
    """

    aspect: Literal["keep", "stretch"]
    windows: Mapping[str, Mapping[str, tuple[float, float]]]
    percentiles: tuple[float, float]
    max_frames: int
    frames: Literal["auto", "all", "middle"] | int = "auto"

    def __post_init__(self) -> None:
        """Raises ConfigError for a window that no image could ever take: a slip there would pass unseen."""
        for modality, parts in self.windows.items():
            if modality not in MODALITIES:
                raise ConfigError(f"pixels.windows: {modality!r} is no modality of the vocabulary")
            if unknown := [part for part in parts if part != "*" and part not in BODY_PARTS]:
                raise ConfigError(f"pixels.windows.{modality}: {unknown[0]!r} is no body part of the vocabulary")

    @cached_property
    def version(self) -> str:
        """A short name that changes with every value, or line of code, that changes a pixel."""
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
        """The fixed window of a modality and body part, None where percentiles decide."""
        parts = self.windows.get(modality, {})
        return parts.get(body_part) or parts.get("*")

    def chosen(self, frames: int, enhanced: bool) -> list[int]:
        """Numbers (from 0) of the frames to read of an object that has `frames` of them."""
        if self.frames == "middle" or (self.frames == "auto" and not enhanced):
            return [frames // 2]
        wanted = min(frames, self.frames if isinstance(self.frames, int) else self.max_frames)
        return [(2 * i + 1) * frames // (2 * wanted) for i in range(wanted)]
