"""Content-based retrieval of DICOM images from archives, as distributed Spark jobs."""

import logging

__version__ = "0.1.0"

# A library is silent until its user configures logging; see `log`.
logging.getLogger(__name__).addHandler(logging.NullHandler())
