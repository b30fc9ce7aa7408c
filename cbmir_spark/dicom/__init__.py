"""Read DICOM objects as the Standard prescribes: allow-listed tags and 256×256 gray pictures; no Spark.

`read.read_instance` reads one object, `decoder.Decoder` does so in a child process that may die. `preprocessing` and
`vocabulary` are their settings. Importing the package changes nothing for pydicom's other users.
"""
