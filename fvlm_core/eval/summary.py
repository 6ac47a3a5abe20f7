"""A readable summary of an evaluation: the verdict on whether looking helps, and `tables.md`. Both are made from the results alone."""

from typing import Literal, NamedTuple

from fvlm_core.eval.parts.benchmarks import BenchmarksResult
from fvlm_core.eval.parts.losses import LossResult
from fvlm_core.eval.published import comparison_table
from fvlm_core.eval.results import Results
from fvlm_core.eval.tables import headline_table
from fvlm_core.markdown import escape
from fvlm_core.tables import Table, decimals_for, difference


class Verdict(NamedTuple):
    """Whether looking helps."""

    text: str
    tone: Literal["good", "neutral", "bad"]
    note: str
    """The numbers behind the verdict."""

    @property
    def line(self) -> str:
        """Text and note as one paragraph."""
        return f"{self.text} {self.note}"


def verdict(results: Results) -> Verdict:
    """Whether looking helps, from the loss in mode coarse-only minus the loss in coarse->fine on the same samples."""
    losses = results.part(LossResult)
    if not results.looks:
        return Verdict("This model pools its frames and does not look anywhere.", "neutral", "There is no finer pass to compare with.")
    if losses is None or losses.foveation_gain is None:
        return Verdict("Whether looking helps was not measured.", "neutral", "This needs the losses of coarse_only and coarse_fine.")
    gain, gap = losses.foveation_gain.difference, losses.train_inference_gap
    note = f"Loss of coarse-only minus coarse→fine: {difference(gain)} nats per token, over {gain.n} clips and texts."
    if gap is not None:
        noise = " (within noise)" if gap.difference.low <= 0 <= gap.difference.high else ""
        note += f" Autoregressive inference minus coarse→fine: {difference(gap.difference)}{noise}."
    by = f"{abs(gain.value):.{decimals_for(gain.value or 1, 3)}f}"
    if gain.low > 0:
        return Verdict(f"Looking helps: coarse→fine is better than coarse-only by {by} nats per token.", "good", note)
    if gain.high < 0:
        return Verdict(f"Looking hurts: coarse→fine is worse than coarse-only by {by} nats per token.", "bad", note)
    return Verdict("No difference between looking and not looking can be shown.", "neutral", note)


def published_tables(results: Results) -> list[Table]:
    """The comparison with published models, if a benchmark that they report was run."""
    part = results.part(BenchmarksResult)
    table = comparison_table(part.benchmarks, results.run, results.tokens_per_frame) if part else None
    return [table] if table else []


def summary(results: Results) -> str:
    """The content of `tables.md`."""
    head = f"Checkpoint `{results.checkpoint[:12]}`, {results.frame_px} px frames, {results.tokens_per_frame} token(s) per frame. "
    head += "Square brackets: 95 % confidence interval, by clip."
    found = verdict(results)
    parts = [f"# Evaluation of {escape(results.run)}", head, f"**{found.text}** {found.note}"]
    for table in (headline_table(results.headline()), *results.tables(), *published_tables(results)):
        parts += [f"## {table.title}", table.markdown()]
    if figures := results.figures():
        parts += ["## Pictures", *(figure.markdown() for figure in figures)]
    if absent := results.not_measured():
        parts += ["## Not measured", "\n".join(f"* {escape(what)}: {escape(why)}" for what, why in absent.items())]
    return "\n\n".join(parts) + "\n"
