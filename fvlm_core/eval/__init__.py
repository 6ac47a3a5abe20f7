"""Evaluation of a trained run: `python -m fvlm_core.eval job.yaml`.

A part of the evaluation is one file in `parts/` (see `part`). `results` is the schema of `results.json`, `jobs` the settings,
`summary` what was found in words and tables: all are imported without torch. `evaluate` is the work.
"""
