"""Names in a released folder that several modules need; light to import."""

WEIGHTS_PREFIX = "model."
"""Prefix of parameter names in the released folder; the rest is the name in training."""
EVAL_RESULTS_FILE = ".eval_results/fvlm.yaml"
"""Results on hub datasets, which the hub shows on the model's page and on the datasets' leaderboards."""
