"""What is fast, measured: `python -m benchmarks.NAME` prints a table, `--json` one JSON object a line. Nothing is asserted."""
