"""Answer lists of query images or series. Entry point: `job.run`; `kernel` and `bounds` hold the arithmetic."""
