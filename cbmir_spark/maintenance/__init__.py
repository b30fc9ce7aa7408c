"""Change what a lake holds without reading its archive: `forget` erases, `remap` applies a new vocabulary."""
