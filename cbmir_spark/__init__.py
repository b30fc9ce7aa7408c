"""Content-based retrieval of DICOM images from archives, as distributed Spark jobs."""

__version__ = "0.1.0"
