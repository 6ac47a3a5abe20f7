"""Names in a released folder that several modules need; light to import."""

WEIGHTS_PREFIX = "model."
"""Of a parameter in the released folder; the rest is its name in training."""
EVAL_RESULTS_FILE = ".eval_results/fvlm.yaml"
"""Results on datasets of the hub, which it shows on the model's page and the datasets' leaderboards."""
