"""The headline numbers; from the evaluation's results."""

from fvlm_core.eval.parts.captions import CaptionResult
from fvlm_core.eval.parts.losses import LossResult
from fvlm_core.eval.parts.multiple_choice import ChoiceResult
from fvlm_core.eval.parts.question_order import OrderResult
from fvlm_core.release.evidence import Evidence
from fvlm_core.release.report import Tile
from fvlm_core.release.words import MODES


def tiles(evidence: Evidence) -> list[Tile]:
    """The headline numbers of the mode to use, each with what it has to be compared with."""
    results, mode, latency = evidence.results, evidence.best_mode, evidence.latency
    tiles = []
    if losses := results.part(LossResult):
        tiles.append(Tile(label=f"loss, {MODES[mode]}", value=f"{losses.modes[mode].loss.value:.3f}", note="nats per token"))
    if captions := results.part(CaptionResult):
        note = f"constant caption {captions.constant.cider_d.value:.2f}"
        tiles.append(Tile(label="captions, CIDEr-D", value=f"{captions.modes[mode].cider_d.value:.2f}", note=note))
    if choices := results.part(ChoiceResult):
        accuracy = f"{choices.modes[mode].accuracy.value:.1%}"
        tiles.append(Tile(label="multiple choice", value=accuracy, note=f"chance {choices.baselines.chance:.1%}"))
    order = results.part(OrderResult)
    first, coarse = (order.cell("question_first", one) if order else None for one in (mode, "coarse_only"))
    if first is not None and coarse is not None and mode != "coarse_only":
        note = f"coarse-only {coarse.accuracy.value:.1%}"
        tiles.append(Tile(label="question first, accuracy", value=f"{first.accuracy.value:.1%}", note=note))
    if order is not None and first is not None and first.gaze_hit_rate is not None and order.gaze_chance:
        tiles.append(Tile(label="gaze on target", value=f"{first.gaze_hit_rate.value:.1%}", note=f"chance {order.gaze_chance:.1%}"))
    if latency is not None and mode in latency.modes:
        clips = f"{latency.frames} frames, {latency.device}"
        tiles.append(Tile(label="time to first token", value=f"{latency.modes[mode].median_ms:.0f} ms", note=clips))
    return tiles
