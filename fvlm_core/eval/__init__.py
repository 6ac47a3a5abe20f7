"""Evaluation of a trained run: `python -m fvlm_core.eval job.yaml`.

`results` is the schema of `results.json` (import it without torch), `job` the settings, `evaluate` the work.
"""
