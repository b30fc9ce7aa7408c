"""FEATURES: one vector per frame, one Delta table per model. Entry points: `job.run`, `open.open_index`."""
