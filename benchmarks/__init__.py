"""Benchmarks: `python -m benchmarks.NAME` prints a table, or one JSON object per line with `--json`. Nothing is asserted."""
