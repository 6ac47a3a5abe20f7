"""The data of training and evaluation, and the samples that were left out."""

from fvlm_core.markdown import escape
from fvlm_core.release.evidence import Evidence
from fvlm_core.release.figures import Figures
from fvlm_core.release.formatting import items
from fvlm_core.release.report import Block, Section
from fvlm_core.tables import Table

BAD_CLIPS_SHOWN = 10


def section(evidence: Evidence, figures: Figures) -> Section:
    shards = evidence.shards
    rows = [
        [one.name, one.kind, one.split, f"{one.samples:,}", f"{one.conversations:,}", f"{one.frames:,}", f"{one.tokens:,}"]
        for one in sorted(shards.sources, key=lambda one: (one.split, one.name))
    ]
    note = f"Frames of {shards.frame_px} px at {shards.fps:g} per second; a vocabulary of {shards.vocab_size:,} tokens. "
    note += "Mixture of the last stage: " + ", ".join(f"{escape(part.source)} {part.share:.0%}" for part in evidence.recipe.data.mixture)
    head = ["source", "kind", "split", "samples", "conversations", "frames", "text tokens"]
    blocks: list[Block] = [Table(head=head, rows=rows, note=f"{note}.")]
    if shards.lost:
        lost = [[one.source, one.reason, f"{one.samples:,}"] for one in shards.lost]
        shown = [f"{escape(clip.url)}: {escape(clip.reason)}" for clip in shards.bad[:BAD_CLIPS_SHOWN]]
        left = sum(one.samples for one in shards.lost) - len(shown)
        blocks += ["#### Samples that were left out", Table(head=["source", "reason", "samples"], rows=lost)]
        blocks += ["The first of them:", items(shown + ([f"and {left} more"] if left else []))]
    return Section(title="Data", blocks=blocks)
