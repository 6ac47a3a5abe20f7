"""The report's headline numbers, from the evaluation's results."""

from fvlm_core.eval.estimates import Estimate
from fvlm_core.eval.parts.captions import CaptionResult
from fvlm_core.eval.parts.losses import LossResult
from fvlm_core.eval.parts.multiple_choice import ChoiceResult
from fvlm_core.eval.parts.question_order import OrderResult
from fvlm_core.release.evidence import Evidence
from fvlm_core.release.formatting import MODES
from fvlm_core.release.report import Tile


def tiles(evidence: Evidence) -> list[Tile]:
    """The headline numbers of `evidence.best_mode`, each with its baselines."""
    results, mode, latency = evidence.results, evidence.best_mode, evidence.latency
    tiles = []
    if losses := results.part(LossResult):
        loss = losses.modes[mode].loss
        tiles.append(Tile(label=f"loss, {MODES[mode]}", value=f"{loss.value:.3f}", note=f"nats per token, {_spread(loss, '.3f')}"))
    if captions := results.part(CaptionResult):
        score, constant = captions.modes[mode].cider_d, captions.constant.cider_d.value
        note = f"{_spread(score, '.2f')}; one constant caption {constant:.2f}"
        tiles.append(Tile(label="captions, CIDEr-D", value=f"{score.value:.2f}", note=note))
    if choices := results.part(ChoiceResult):
        accuracy, base = choices.modes[mode].accuracy, choices.baselines
        trivial = f"chance {base.chance:.1%}, most frequent position {base.majority:.1%}, blind {base.blind.value:.1%}"
        note = f"{_spread(accuracy, '.1%')}; {trivial}"
        tiles.append(Tile(label="multiple choice", value=f"{accuracy.value:.1%}", note=note))
    order = results.part(OrderResult)
    first, coarse = (order.cell("question_first", one) if order else None for one in (mode, "coarse_only"))
    if order is not None and first is not None and coarse is not None and mode != "coarse_only":
        note = f"{_spread(first.accuracy, '.1%')}; coarse-only {coarse.accuracy.value:.1%}, one constant answer {order.constant:.1%}"
        tiles.append(Tile(label="question first, accuracy", value=f"{first.accuracy.value:.1%}", note=note))
    if order is not None and first is not None and first.gaze_hit_rate is not None and order.gaze_chance:
        note = f"{_spread(first.gaze_hit_rate, '.1%')}; chance {order.gaze_chance:.1%}"
        tiles.append(Tile(label="gaze on target", value=f"{first.gaze_hit_rate.value:.1%}", note=note))
    if latency is not None and mode in latency.modes:
        clips = f"{latency.frames} frames, {latency.device}"
        tiles.append(Tile(label="time to first token", value=f"{latency.modes[mode].first_token.median_ms:.0f} ms", note=clips))
    return tiles


def _spread(estimate: Estimate, form: str) -> str:
    """The confidence interval and sample size, e.g. `[31.2%, 40.1%], n=128 clips, 1 run`."""
    return f"[{estimate.low:{form}}, {estimate.high:{form}}], n={estimate.n} clips, 1 run"
