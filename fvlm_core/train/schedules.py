"""Learning-rate schedules, as pure functions of the step: nothing to save, nothing that can drift on resume.

Step 0 is the first optimizer step. Every schedule is above 0 at every step, the first and the last included, so no step is
computed in vain.
"""

import math

from fvlm_core.config import OptimizerSettings

WSD_DECAY_SHARE = 0.2
"""Share of the steps over which `wsd` decays."""


def learning_rates(settings: OptimizerSettings, step: int, steps: int) -> dict[str, float]:
    """The learning rate of each role at `step` of `steps`."""
    peaks, warmup_steps = settings.peaks, settings.warmup_of(steps)
    factor = warmup(step, warmup_steps)
    if settings.schedule == "cosine":
        factor = min(factor, cosine(step, steps, warmup_steps, settings.final_share))
    elif settings.schedule == "wsd":
        factor = min(factor, stable_decay(step, steps, settings.final_share))
    rates = {role: peak * factor for role, peak in peaks.items()}
    if settings.schedule == "converging":
        rates["connector"] = converging(step, steps, peaks) * factor
    return rates


def warmup(step: int, warmup_steps: int) -> float:
    """Rises in a line from 1 / warmup_steps at the first step to 1 at step warmup_steps - 1, and stays."""
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0


def cosine(step: int, steps: int, warmup_steps: int, final_share: float) -> float:
    """Half a cosine from 1 where the warm-up ends down to `final_share` where the run ends."""
    done = (step - warmup_steps) / max(1, steps - warmup_steps)
    return final_share + (1 - final_share) * 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, done))))


def stable_decay(step: int, steps: int, final_share: float) -> float:
    """1, and over the last `WSD_DECAY_SHARE` of the steps in a line down to `final_share` where the run ends."""
    decay_steps = max(1, round(WSD_DECAY_SHARE * steps))
    done = (step - (steps - decay_steps) + 1) / (decay_steps + 1)
    return 1 - (1 - final_share) * max(0.0, done)


def converging(step: int, steps: int, peaks: dict[str, float]) -> float:
    """The connector's rate on its way from its own to the (higher) backbone's: the same ratio every step, e.g. 100:1 -> 1:1."""
    target = max(peaks["vision"], peaks["llm"])
    return peaks["connector"] * (target / peaks["connector"]) ** (step / max(1, steps - 1))
