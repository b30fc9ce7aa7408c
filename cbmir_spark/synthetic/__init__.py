"""Synthetic archives for the demo and the tests, and DICOM wrapped around labelled pictures."""
