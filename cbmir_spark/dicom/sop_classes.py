"""SOP Class UIDs by what their instances are (PS3.4 Annex B)."""

STORAGE = "1.2.840.10008.5.1.4.1.1."
DICOMDIR = "1.2.840.10008.1.3.10"
# First components below the storage root (PS3.4 table B.5-1): waveforms, presentation states, raw data and
# registrations and segmentations, value maps, surfaces, eye measurements, reports, assessments, annotations,
# documents, displays, protocols, radiotherapy.
NOT_IMAGES = frozenset(
    {"9", "11", "66", "67", "68", "78", "79", "80", "88", "90", "91", "104", "131", "200", "201", "481"}
)
SPECTROSCOPY = STORAGE + "4.2"
# Hanging protocols, palettes, implants (PS3.4 annexes U, X, BB).
NOT_STORAGE = ("1.2.840.10008.5.1.4.38.", "1.2.840.10008.5.1.4.39.", "1.2.840.10008.5.1.4.43.")
ENHANCED = frozenset(STORAGE + end for end in ("2.1", "2.2", "4.1", "4.3", "4.4", "128.1", "130"))
