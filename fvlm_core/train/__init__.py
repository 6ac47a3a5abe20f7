"""Training: one program for every stage, ablation and grid run, all by recipe (`torchrun -m fvlm_core.train recipe.yaml`)."""
