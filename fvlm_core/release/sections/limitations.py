"""Limitations of the release, and negative results."""

from fvlm_core.eval.part import OWN_SPLIT
from fvlm_core.eval.parts.losses import LossResult
from fvlm_core.markdown import escape
from fvlm_core.release.evidence import Evidence
from fvlm_core.release.figures import Figures
from fvlm_core.release.formatting import items
from fvlm_core.release.report import Section
from fvlm_core.scaling.jobs import AblationReport
from fvlm_core.tables import difference, signed

TOY_PARAMS = 20_000_000
"""Smaller than any pretrained backbone in use; such a model only demonstrates the pipeline."""
FULL_FRAME_PX = 224


def section(evidence: Evidence, figures: Figures) -> Section:
    return Section(title="Limitations and negative results", blocks=[items(limitations(evidence))])


def limitations(evidence: Evidence) -> list[str]:
    """The limitations, one markdown sentence each; the card lists them too."""
    results, model = evidence.results, evidence.recipe.model
    found = []
    if evidence.run.manifest.params < TOY_PARAMS:
        found.append(
            "A toy-sized model: it shows that the pipeline and the mechanism work, not what the architecture reaches at full size."
        )
    random = [name for name, part in (("vision encoder", model.vision), ("language model", model.llm)) if part.checkpoint is None]
    if random:
        found.append(f"The {' and the '.join(random)} started from random weights, not from a pretrained checkpoint.")
    if any(one.manifest.name == "vision" for one in evidence.reports.values()):
        found.append(
            "The vision encoder stands in for DINOv2: before the stages it was trained with labels of the rendered digits and of their "
            "neighbours, which DINOv2 never has."
        )
    if results.frame_px < FULL_FRAME_PX:
        found.append(f"Frames are {results.frame_px} px wide; real runs use {FULL_FRAME_PX} px.")
    losses = results.part(LossResult)
    if losses is not None and all(part.dataset == OWN_SPLIT for part in results.parts.values()):
        sources = ", ".join(map(escape, losses.sources))
        found.append(f"Evaluated on held-out samples of the training sources ({sources}), not on public benchmarks.")
    found.append("One training run with one seed: intervals are over validation clips, not over runs.")
    gap = losses.train_inference_gap if losses else None
    if gap is not None and gap.difference.low > 0:
        found.append(f"Autoregressive inference is worse than coarse→fine: {difference(gap.difference)} nats per token.")
    ablations = evidence.report("ablations", AblationReport)
    if ablations is not None:
        rows = ablations.manifest.rows
        for verdict, said in (("worse", "Ablations that are worse than the baseline"), ("diverged", "Ablations that diverged")):
            listed = ", ".join(f"{row.name} ({signed(row.delta)})" for row in rows if row.verdict == verdict)
            found += [f"{said}, in validation loss: {listed}."] if listed else []
        unclear = [row.name for row in rows if row.verdict in ("no evidence", "no verdict")]
        if unclear:
            found.append(f"Ablations that were not shown to differ from the baseline ({ablations.manifest.method}): {', '.join(unclear)}.")
    divergences = sum(len(stage.manifest.divergences) for stage in evidence.stages.values())
    if divergences:
        found.append(f"Training diverged {divergences} time(s) and went back to an earlier checkpoint.")
    found += [f"Not measured: {escape(what)} ({escape(why)})." for what, why in results.not_measured().items()]
    return found + evidence.job.limitations
