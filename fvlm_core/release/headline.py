"""The verdict, one line, and the headline numbers; from the evaluation's results."""

from fvlm_core.release.evidence import Evidence
from fvlm_core.release.report import Tile, Tone
from fvlm_core.release.words import MODES
from fvlm_core.tables import decimals_for, signed


def verdict(evidence: Evidence) -> tuple[str, Tone, str]:
    """Does looking help? The sentence, how it is shown, and what it rests on."""
    gain, gap = evidence.results.foveation_gain, evidence.results.train_inference_gap
    if gain is None:
        return "This model pools its frames and does not look anywhere.", "neutral", "There is no finer pass to compare with."
    difference = gain.difference
    by = f"{abs(difference.value):.{decimals_for(difference.value or 1, 3)}f} nats per token"
    sentence, tone = "No difference between looking and not looking can be shown.", "neutral"
    if difference.low > 0:
        sentence, tone = f"Looking helps: coarse→fine is better than coarse-only by {by}.", "good"
    elif difference.high < 0:
        sentence, tone = f"Looking hurts: coarse→fine is worse than coarse-only by {by}.", "bad"
    note = f"Loss of coarse-only minus coarse→fine: 95 % interval {signed(difference.low)} to {signed(difference.high)} "
    note += f"over {difference.n} clips and texts."
    if gap is not None:
        noise = " (within noise)" if gap.difference.low <= 0 <= gap.difference.high else ""
        note += f" Autoregressive inference minus coarse→fine: {signed(gap.difference.value)}{noise}."
    return sentence, tone, note


def tiles(evidence: Evidence) -> list[Tile]:
    """The headline numbers of the mode to use, each with what it has to be compared with."""
    results, mode = evidence.results, evidence.best_mode
    best = results.modes[mode]
    tiles = [Tile(label=f"loss, {MODES[mode]}", value=f"{best.loss.value:.3f}", note="nats per token")]
    if best.captions is not None:
        tiles.append(
            Tile(label="captions, CIDEr-D", value=f"{best.captions.cider_d.value:.2f}", note=f"BLEU-4 {best.captions.bleu_4.value:.3f}")
        )
    if best.multiple_choice is not None and results.multiple_choice is not None:
        accuracy = f"{best.multiple_choice.accuracy.value:.1%}"
        tiles.append(Tile(label="multiple choice", value=accuracy, note=f"chance {results.multiple_choice.chance:.1%}"))
    asked = {(cell.order, cell.mode): cell for cell in results.question_order}
    first, coarse = asked.get(("question_first", mode)), asked.get(("question_first", "coarse_only"))
    if first is not None and coarse is not None and mode != "coarse_only":
        note = f"coarse-only {coarse.accuracy.value:.1%}"
        tiles.append(Tile(label="question first, accuracy", value=f"{first.accuracy.value:.1%}", note=note))
    if first is not None and first.gaze_hit_rate is not None and results.gaze_chance:
        tiles.append(Tile(label="gaze on target", value=f"{first.gaze_hit_rate.value:.1%}", note=f"chance {results.gaze_chance:.1%}"))
    if evidence.latency is not None and mode in evidence.latency.modes:
        clips = f"{evidence.latency.frames} frames, {evidence.latency.device}"
        tiles.append(Tile(label="time to first token", value=f"{evidence.latency.modes[mode].median_ms:.0f} ms", note=clips))
    return tiles
