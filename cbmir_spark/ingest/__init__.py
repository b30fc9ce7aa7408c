"""Read an archive into SOURCES, TAGS and PIXELS. Entry point: `job.run`; its steps are listing, parse, reconcile."""
