"""SOP Class UIDs by the kind of their instances (PS3.4 Annex B)."""

STORAGE_ROOT = "1.2.840.10008.5.1.4.1.1."

SECONDARY_CAPTURE = STORAGE_ROOT + "7"
WHOLE_SLIDE = frozenset(STORAGE_ROOT + end for end in ("77.1.6", "77.1.8", "77.1.9"))
# Enhanced CT, MR and PET, and the classes that older objects were converted to.
ENHANCED_MULTIFRAME = frozenset(STORAGE_ROOT + end for end in ("2.1", "2.2", "4.1", "4.3", "4.4", "128.1", "130"))

MEDIA_DIRECTORY = "1.2.840.10008.1.3.10"
# Spectra lie in Spectroscopy Data (5600,0020), not in pixel data.
MR_SPECTROSCOPY = STORAGE_ROOT + "4.2"
# First components below the storage root (PS3.4 table B.5-1): waveforms, presentation states, raw data and
# registrations and segmentations, value maps, surfaces, eye measurements, reports, assessments, annotations,
# documents, displays, protocols, radiotherapy.
NON_IMAGE_FAMILIES = frozenset(
    {"9", "11", "66", "67", "68", "78", "79", "80", "88", "90", "91", "104", "131", "200", "201", "481"}
)
# Hanging protocols, palettes, implants (PS3.4 annexes U, X, BB).
NON_PATIENT_ROOTS = ("1.2.840.10008.5.1.4.38.", "1.2.840.10008.5.1.4.39.", "1.2.840.10008.5.1.4.43.")


def is_image(sop_class: str) -> bool:
    """Decide whether instances of a class may be images: all but the classes known to be something else."""
    if sop_class == MR_SPECTROSCOPY or sop_class.startswith(NON_PATIENT_ROOTS):
        return False
    below_root = sop_class.removeprefix(STORAGE_ROOT)
    return below_root == sop_class or below_root.split(".")[0] not in NON_IMAGE_FAMILIES
