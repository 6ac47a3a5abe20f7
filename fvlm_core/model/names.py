"""Names of the model's modes and of its parameters' roles; no torch here, so settings, results and reports use them too."""

from typing import Literal, get_args

Mode = Literal["coarse_only", "coarse_fine", "autoregressive"]
"""A way to run the model at inference; see `fvlm_core.model.inference`."""
MODES: tuple[Mode, ...] = get_args(Mode)
Role = Literal["connector", "vision", "llm"]
"""What a parameter belongs to: decides its learning rate."""
ROLES: tuple[Role, ...] = get_args(Role)
SHORT_MODES: dict[str, Mode] = {"coarse": "coarse_only", "fine": "coarse_fine", "autoregressive": "autoregressive"}
"""As a user of a released model may name them."""
