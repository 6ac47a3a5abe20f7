"""Published numbers to stand beside ours. Nothing here was measured by this evaluation; every number says where it comes from."""

from fvlm_core.model.names import Mode
from fvlm_core.settings import Settings
from fvlm_core.tables import Table

SMOLVLM2 = "https://huggingface.co/HuggingFaceTB/SmolVLM2-{}-Video-Instruct"
FVLM = "https://huggingface.co/sanps/fVLM-{}"


class Reference(Settings):
    """One published number."""

    model: str
    tokens_per_frame: int
    """Visual tokens that the language model reads per frame."""
    benchmark: str
    value: float
    """Accuracy in percent (DocVQA: ANLS)."""
    mode: Mode | None = None
    """For foveated models."""
    source: str


def _row(model: str, tokens: int, source: str, scores: dict[str, float], mode: Mode | None = None) -> list[Reference]:
    return [
        Reference(model=model, tokens_per_frame=tokens, benchmark=benchmark, value=value, mode=mode, source=source)
        for benchmark, value in scores.items()
    ]


REFERENCES: tuple[Reference, ...] = (
    *_row("SmolVLM2-256M", 64, SMOLVLM2.format("256M"), {"MVBench": 32.7, "Video-MME": 33.7, "MLVU": 40.6}),
    *_row("SmolVLM2-256M", 64, FVLM.format("135M"), {"ScienceQA": 73.8}),
    *_row("SmolVLM2-500M", 64, SMOLVLM2.format("500M"), {"MVBench": 39.73, "Video-MME": 42.2, "MLVU": 47.3}),
    *_row("SmolVLM2-500M", 64, FVLM.format("135M"), {"ScienceQA": 80.0}),
    *_row(
        "SmolVLM2-2.2B",
        81,
        "https://huggingface.co/HuggingFaceTB/SmolVLM2-2.2B-Instruct",
        {"MVBench": 46.27, "Video-MME": 52.1, "MLVU": 55.2, "MMMU": 42.0, "MathVista": 51.5, "DocVQA": 79.98, "ScienceQA": 90.0},
    ),
    *_row("fVLM-135M", 1, FVLM.format("135M"), {"MVBench": 27.4, "Video-MME": 26.2, "ScienceQA": 34.7}, "coarse_only"),
    *_row("fVLM-135M", 1, FVLM.format("135M"), {"MVBench": 28.0, "Video-MME": 29.5, "ScienceQA": 36.0}, "coarse_fine"),
    *_row("fVLM-135M", 1, FVLM.format("135M"), {"MVBench": 27.9, "Video-MME": 28.7, "ScienceQA": 36.0}, "autoregressive"),
    *_row("fVLM-1.7B", 1, FVLM.format("1.7B"), {"MVBench": 30.8, "Video-MME": 30.5, "ScienceQA": 49.0}, "coarse_only"),
)


def references_table() -> Table:
    """The numbers, a line per model and mode, with a column per benchmark."""
    benchmarks = list(dict.fromkeys(one.benchmark for one in REFERENCES))
    lines: dict[tuple[str, int, str], dict[str, float]] = {}
    for one in REFERENCES:
        lines.setdefault((one.model, one.tokens_per_frame, one.mode or ""), {})[one.benchmark] = one.value
    rows = [
        [model, str(tokens), mode, *(f"{scores[name]:.1f}" if name in scores else "" for name in benchmarks)]
        for (model, tokens, mode), scores in lines.items()
    ]
    sources = ", ".join(f"<{one}>" for one in dict.fromkeys(one.source for one in REFERENCES))
    return Table(
        title="Published models",
        head=["model", "tokens per frame", "mode", *benchmarks],
        rows=rows,
        note=f"Published by their authors, not measured here. Sources: {sources}.",
    )
