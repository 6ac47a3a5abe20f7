"""Ablation tables, scaling-law fits, their plots, and the choices made from them."""
