"""Training: one program for all stages, ablations and grid runs, configured by a recipe (`torchrun -m fvlm_core.train recipe.yaml`)."""
