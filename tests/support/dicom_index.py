"""Outcome and reason of each shared real file, predicted from the index beside them by hand-written rules."""

import csv
from collections.abc import Mapping
from pathlib import Path

from cbmir_spark.dicom.read import Reason

# Names of SOP classes, as the index writes them, of objects that are no images.
_NO_IMAGES = ("SR Storage", "Segmentation", "Waveform", "RT ", "Palette", "Annotations", "Value Mapping", ".66.7")
# What the index cannot know: objects without a valid SOP Instance UID, and those whose file meta information alone
# names an image's class.
_WITHOUT_UID = ("LSL_RGB_ILV0.dcm", "LSL_RGB_ILV2.dcm", "LSN_RGB_ILV0.dcm", "bad_sequence.dcm")
_IMAGES_BY_META = ("UN_sequence.dcm", "priv_SQ.dcm", "chrSQEncoding.dcm")
# Files that the decoders of the index refuse: progressive JPEG, 12 bits, no transfer syntax, an odd last frame.
_GAINED = (
    "CR-MONO1-10-chest",
    "OT-PAL-8-face",
    "NM1_JPLY",
    "RG3_JPLY",
    "multiframe.dcm",
    "CTImage.dcm_JPEGProcess10_12TransferSyntax_1.2.840.10008.1.2.4.55.dcm",
    "CTImage.dcm_JPEGProcess6_8TransferSyntax_1.2.840.10008.1.2.4.53.dcm",
)
_BY_NAME: dict[str, tuple[str, str | None]] = {
    "GH340.dcm": ("not_an_image", Reason.NOT_DICOM),
    "meta_missing_tsyntax.dcm": ("rejected", Reason.MALFORMED),
    "GH177_D_CLUNIE_CT1_IVRLE_BigEndian_undefined_length.dcm": ("rejected", Reason.MALFORMED),
    # Both lack nothing but the delimiter behind their fragments.
    "emri_small_jpeg_2k_lossless_too_short.dcm": ("ingested", None),
    "GH1339.dcm": ("ingested", None),
    "GH1146.dcm": ("rejected", Reason.NO_PIXELS),
    "genFile.dcm": ("rejected", Reason.UNDECODABLE),
    "JPEG2000-embedded-sequence-delimiter.dcm": ("rejected", Reason.UNDECODABLE),
}


def rows(shared_data: Path) -> list[dict[str, str]]:
    """All rows of the index; `file` is relative to the folder."""
    with (shared_data / "dicom_index.csv").open(newline="", encoding="utf-8") as index:
        return list(csv.DictReader(index))


def predicted(row: Mapping[str, str]) -> tuple[str, str | None]:
    """Outcome and reason of a row of the index; an image may turn out to be a duplicate or a conflict."""
    name = row["file"].rsplit("/", 1)[1]
    if name in _BY_NAME:
        return _BY_NAME[name]
    if name.startswith(("DICOMDIR", "DIRFILE")):
        return "not_an_image", Reason.DICOMDIR
    if any(part in row["sop_class"] for part in _NO_IMAGES):
        return "not_an_image", Reason.NOT_IMAGE_CLASS
    if row["decode"] == "no-pixels":
        is_image = row["sop_class"].endswith("Image Storage") or name in _IMAGES_BY_META
        return "rejected" if is_image else "not_an_image", Reason.NO_PIXELS
    if name.endswith(_WITHOUT_UID):
        return "rejected", Reason.NO_UID
    if (row["decode"] == "ok") == (name in _GAINED):
        raise AssertionError(f"{name} decodes here or in the index alone: add it to or remove it from _GAINED")
    return "ingested", None
