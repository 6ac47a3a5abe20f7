"""What others have published, to compare with."""

from fvlm_core.eval.references import REFERENCES
from fvlm_core.model.names import Mode
from fvlm_core.release.evidence import Evidence
from fvlm_core.release.figures import Figures
from fvlm_core.release.report import Section
from fvlm_core.release.words import MODES
from fvlm_core.tables import Table


def section(evidence: Evidence, figures: Figures) -> Section:
    benchmarks = list(dict.fromkeys(one.benchmark for one in REFERENCES))
    lines: dict[tuple[str, int, Mode | None], dict[str, float]] = {}
    for one in REFERENCES:
        lines.setdefault((one.model, one.tokens_per_frame, one.mode), {})[one.benchmark] = one.value
    rows = [
        [model, str(tokens), MODES[mode] if mode else "", *(f"{scores[name]:.1f}" if name in scores else "" for name in benchmarks)]
        for (model, tokens, mode), scores in lines.items()
    ]
    sources = ", ".join(f"<{source}>" for source in dict.fromkeys(one.source for one in REFERENCES))
    note = f"Published by their authors, not measured here. Sources: {sources}."
    return Section(title="Published models", blocks=[Table(head=["model", "tokens per frame", "mode", *benchmarks], rows=rows, note=note)])
