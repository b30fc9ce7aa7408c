"""Archives to try the jobs on; no Spark: drawn phantoms for the demo and tests, labelled pictures wrapped as DICOM.

Start at `archive.write_demo_archive` and `wrap.wrap_pictures`.
"""
