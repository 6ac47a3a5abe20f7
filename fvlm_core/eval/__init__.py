"""Evaluation of a training run: `python -m fvlm_core.eval job.yaml`.

Each part of the evaluation is one file in `parts/` (see `part`). `results` is the schema of `results.json`, `jobs` holds the settings,
and `summary` renders the results as text and tables; none of these imports torch. `evaluate` runs the evaluation.
"""
