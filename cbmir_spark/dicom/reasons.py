"""Why an object has no image: the reasons, what each one means, what a site can do, and the errors that carry them."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

__all__ = ["EXPLANATIONS", "Explanation", "NotAnImage", "Reason", "Rejected"]


class Reason(StrEnum):
    """Reasons why an object has no image; values of the column `reason`."""

    # not_an_image
    NOT_DICOM = "NOT_DICOM"
    DICOMDIR = "DICOMDIR"
    NOT_IMAGE_CLASS = "NOT_IMAGE_CLASS"
    NO_PIXELS = "NO_PIXELS"  # rejected where the SOP class is an image's
    # rejected
    EMPTY = "EMPTY"
    TRUNCATED = "TRUNCATED"
    MALFORMED = "MALFORMED"
    BAD_DEFLATE = "BAD_DEFLATE"
    WRONG_SYNTAX = "WRONG_SYNTAX"
    NO_UID = "NO_UID"
    UNSUPPORTED = "UNSUPPORTED"
    UNSUPPORTED_FORMAT = "UNSUPPORTED_FORMAT"
    UNDECODABLE = "UNDECODABLE"
    TOO_LARGE = "TOO_LARGE"
    TIMEOUT = "TIMEOUT"
    CRASHED = "CRASHED"
    INTERNAL = "INTERNAL"


@dataclass(frozen=True)
class Explanation:
    """What a reason means for an object, and what a site can do about it: a plain sentence each."""

    meaning: str
    action: str


EXPLANATIONS: Mapping[Reason, Explanation] = {
    Reason.NOT_DICOM: Explanation(
        "It is not a DICOM file, whatever its name.",
        "Nothing, unless it should be one: then copy it from its source again.",
    ),
    Reason.DICOMDIR: Explanation(
        "It is the directory of a CD or another medium.",
        "Nothing: the images that it lists are objects of their own.",
    ),
    Reason.NOT_IMAGE_CLASS: Explanation(
        "By its SOP class it is a report, plan, segmentation, waveform or the like.",
        "Nothing: only images are ingested.",
    ),
    Reason.NO_PIXELS: Explanation(
        "It has a header, but no pixel data.",
        "If it should be an image, copy it from its source again.",
    ),
    Reason.EMPTY: Explanation(
        "It has no bytes.",
        "Copy it from its source again.",
    ),
    Reason.TRUNCATED: Explanation(
        "Bytes that it declares are missing, mostly at its end.",
        "Copy it from its source again.",
    ),
    Reason.MALFORMED: Explanation(
        "Its structure or its image description contradicts itself.",
        "Export it again; if that changes nothing, ask the maker of what wrote it.",
    ),
    Reason.BAD_DEFLATE: Explanation(
        "Its transfer syntax is the deflated one, but its data set does not inflate.",
        "Copy it from its source again, or export it without deflation.",
    ),
    Reason.WRONG_SYNTAX: Explanation(
        "Its pixel data is in another encoding than its transfer syntax says, and cannot be recognised.",
        "Export it again, as Explicit VR Little Endian.",
    ),
    Reason.NO_UID: Explanation(
        "It has no valid SOP Instance UID.",
        "Export it again from an archive that gives it one.",
    ),
    Reason.UNSUPPORTED: Explanation(
        "Its transfer syntax has no decoder here.",
        "Export it in another one, such as Explicit VR Little Endian or JPEG 2000.",
    ),
    Reason.UNSUPPORTED_FORMAT: Explanation(
        "Its color model, its samples per pixel or its bits have no decoder here.",
        "Convert it to MONOCHROME2 or RGB with 8 or 16 bits.",
    ),
    Reason.UNDECODABLE: Explanation(
        "The codec refused its pixel data, or they are of another image than the header describes.",
        "Copy it from its source again; if that changes nothing, export it uncompressed.",
    ),
    Reason.TOO_LARGE: Explanation(
        "It exceeds a limit of size, depth or count, or the memory of the decoder.",
        "If it is sound, raise `ingest.max_object_mb` or `ingest.decoder_memory_mb`.",
    ),
    Reason.TIMEOUT: Explanation(
        "Decoding it took longer than the settings allow.",
        "If it is sound, raise `ingest.decoder_seconds`.",
    ),
    Reason.CRASHED: Explanation(
        "The process that decoded it died; no other object is affected.",
        "Copy it from its source again; if that changes nothing, report it as a bug.",
    ),
    Reason.INTERNAL: Explanation(
        "This package failed on it, which is a bug.",
        "Report it with what `cbmir --version` prints.",
    ),
}


class NotAnImage(Exception):
    """A valid object that is not an image; `reason` is its kind. The message carries no tag value."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason.value)
        self.reason = reason


class Rejected(Exception):
    """An object that should be an image and cannot be read as one, for `reason`. The message carries no tag value.

    `detail` says more, such as the rule that is broken or the transfer syntax; it carries no tag value either.
    """

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(f"{reason.value} ({detail})" if detail else reason.value)
        self.reason = reason
        self.detail = detail
