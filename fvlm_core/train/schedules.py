"""Learning-rate schedules as pure functions of the step, so that a resumed run needs no scheduler state.

Step 0 is the first optimizer step. All schedules are above 0 at every step, including the first and the last, so that no step is wasted.
"""

import math

from fvlm_core.config import OptimizerSettings

WSD_DECAY_SHARE = 0.2
"""Share of the steps in which `wsd` (warmup-stable-decay) decays."""


def learning_rates(settings: OptimizerSettings, step: int, steps: int) -> dict[str, float]:
    """Return the learning rate of each role at `step` of `steps`."""
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
    """Linear warm-up from 1 / warmup_steps at the first step to 1 at step warmup_steps - 1, then constant."""
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0


def cosine(step: int, steps: int, warmup_steps: int, final_share: float) -> float:
    """Cosine decay from 1 at the end of the warm-up to `final_share` at the end of the run."""
    done = (step - warmup_steps) / max(1, steps - warmup_steps)
    return final_share + (1 - final_share) * 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, done))))


def stable_decay(step: int, steps: int, final_share: float) -> float:
    """1, then linear decay over the last `WSD_DECAY_SHARE` of the steps to `final_share` at the end of the run."""
    decay_steps = max(1, round(WSD_DECAY_SHARE * steps))
    done = (step - (steps - decay_steps) + 1) / (decay_steps + 1)
    return 1 - (1 - final_share) * max(0.0, done)


def converging(step: int, steps: int, peaks: dict[str, float]) -> float:
    """The connector's rate, changing geometrically from its own peak to the larger backbone peak, e.g. from a ratio of 100:1 to 1:1."""
    target = max(peaks["vision"], peaks["llm"])
    return peaks["connector"] * (target / peaks["connector"]) ** (step / max(1, steps - 1))
