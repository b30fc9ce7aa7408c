"""The policy on text that is burned into pixels: where it has to be expected, and what that keeps a picture from.

Text is never removed from pixels here but by the crop of ultrasound to its regions. So a picture in which it has to
be expected is kept out of training snapshots and off pages, unless `privacy.burned_in` says `include`. Expected it is

- where BurnedInAnnotation (PS3.3 section C.7.6.1) is YES, and in captured screens, whatever their headers say;
- unless BurnedInAnnotation is NO: in ultrasound from which no region was cut out; in Secondary Capture, and wherever
  ConversionType tells of a scanner, a grabber or a camera; in pictures of visible light and other kinds that grabbers
  make; where the modality is not known; and beside overlays, in planes of their own or in unused bits of the pixels.

No Spark and no pydicom: parsing decides it for each object, readers ask `allowed` of what was decided.
"""

from typing import Literal

from cbmir_spark.dicom.vocabulary_tables import UNKNOWN

_STORAGE = "1.2.840.10008.5.1.4.1.1."
# Secondary Capture, ultrasound (the retired classes too) and visible light, with all classes below them (PS3.4 B.5).
_RISKY_CLASSES = tuple(_STORAGE + end for end in ("7", "3", "6", "77"))
_ULTRASOUND = tuple(_STORAGE + end for end in ("3", "6"))
_RISKY_MODALITIES = frozenset({"US", "IVUS", "SC", "OT", "ES", "XC", "DG", "GM", "SM", UNKNOWN})
_ULTRASOUND_MODALITIES = frozenset({"US", "IVUS"})


def expected(
    *, burned_in: str, kind: str, modality: str, sop_class: str | None, cropped: bool, converted: bool, overlays: bool
) -> bool:
    """Whether text has to be expected in an object's pixels: `text_risk` of TAGS.

    `burned_in` is YES, NO or UNKNOWN, `modality` a term of the vocabulary. `cropped` says that regions of ultrasound
    were cut out, `converted` that there is a ConversionType, `overlays` that there are elements of groups 60xx.
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
    """Whether a picture may be shown or learned from; null, as older rows have it, counts as a risk."""
    return choice == "include" or text_risk is False


def _is_of(sop_class: str | None, classes: tuple[str, ...]) -> bool:
    return any(sop_class == root or (sop_class or "").startswith(root + ".") for root in classes)
