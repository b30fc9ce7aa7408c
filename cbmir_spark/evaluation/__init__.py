"""Measure classification and retrieval on patients that training never saw. Entry point: `job.run`."""
