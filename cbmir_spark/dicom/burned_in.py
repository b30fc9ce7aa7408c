"""The policy on text burned into pixels: which objects are at risk, and what their pictures may be used for.

Nothing here removes text from pixels, except for the crop of ultrasound to its regions. Pictures at risk therefore stay
out of training snapshots and HTML pages, unless `privacy.burned_in` is `include`. An object is at risk

- where BurnedInAnnotation (PS3.3 section C.7.6.1) is YES, and where it is a captured screen, whatever its header says;
- unless BurnedInAnnotation is NO: ultrasound that was not cropped; Secondary Capture; any object with a ConversionType,
  so from a film scanner, a frame grabber or a camera; visible light and other modalities that frame grabbers produce;
  an unknown modality; and any object with overlays, in separate planes or in unused bits of the pixels.

Parsing decides it once for each object (`expected`); readers of the tables apply the setting (`allowed`).
"""

from typing import Literal

from cbmir_spark.dicom.sop_classes import SECONDARY_CAPTURE, STORAGE_ROOT
from cbmir_spark.dicom.vocabulary_tables import UNKNOWN

# Ultrasound (with the retired classes) and visible light, each with all classes below it (PS3.4 section B.5).
_ULTRASOUND = (STORAGE_ROOT + "3", STORAGE_ROOT + "6")
_VISIBLE_LIGHT = STORAGE_ROOT + "77"
_RISKY_CLASSES = (SECONDARY_CAPTURE, *_ULTRASOUND, _VISIBLE_LIGHT)
_RISKY_MODALITIES = frozenset({"US", "IVUS", "SC", "OT", "ES", "XC", "DG", "GM", "SM", UNKNOWN})
_ULTRASOUND_MODALITIES = frozenset({"US", "IVUS"})


def expected(
    *, burned_in: str, kind: str, modality: str, sop_class: str | None, cropped: bool, converted: bool, overlays: bool
) -> bool:
    """Decide whether an object's pixels may show burned-in text: `text_risk` of TAGS.

    `burned_in` is YES, NO or UNKNOWN, `modality` a term of the vocabulary. `cropped`: the picture shows the regions of
    an ultrasound alone; `converted`: there is a ConversionType; `overlays`: there are elements of groups 60xx.
    """
    if burned_in == "YES" or kind == "screen":
        return True
    if burned_in == "NO":
        return False
    if overlays or converted:
        return True
    if cropped and (modality in _ULTRASOUND_MODALITIES or _is_of(sop_class, _ULTRASOUND)):
        return False
    return modality in _RISKY_MODALITIES or _is_of(sop_class, _RISKY_CLASSES)


def allowed(text_risk: bool | None, choice: Literal["include", "exclude"]) -> bool:
    """Decide whether a picture may be shown and trained on; null, as in rows of older lakes, counts as a risk."""
    return choice == "include" or text_risk is False


def _is_of(sop_class: str | None, classes: tuple[str, ...]) -> bool:
    return any(sop_class == root or (sop_class or "").startswith(root + ".") for root in classes)
