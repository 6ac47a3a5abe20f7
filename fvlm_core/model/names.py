"""Names of inference modes and parameter roles. Does not import torch, so that settings and reports can use it."""

from typing import Literal, get_args

Mode = Literal["coarse_only", "coarse_fine", "autoregressive"]
"""An inference mode; see `fvlm_core.model.inference`."""
MODES: tuple[Mode, ...] = get_args(Mode)
Role = Literal["connector", "vision", "llm"]
"""The part of the model that a parameter belongs to, which determines its learning rate."""
ROLES: tuple[Role, ...] = get_args(Role)
SHORT_MODES: dict[str, Mode] = {"coarse": "coarse_only", "fine": "coarse_fine", "autoregressive": "autoregressive"}
"""Short names of the modes, accepted by released models."""
