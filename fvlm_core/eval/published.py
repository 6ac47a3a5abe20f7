"""Compare results with published numbers of other models (`published.yaml`): a table and a plot of the benchmarks that were run.

The numbers in that file were not measured here; every row names its source.
"""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import yaml
from pydantic import Field, TypeAdapter

from fvlm_core.eval.benchmark_result import BenchmarkResult
from fvlm_core.eval.benchmarks import benchmark
from fvlm_core.figures import Figure
from fvlm_core.model.names import Mode
from fvlm_core.settings import Settings
from fvlm_core.tables import Table

if TYPE_CHECKING:
    from fvlm_core.eval.answerers.answerer import Answerer

FILE = Path(__file__).with_name("published.yaml")
PICTURE = "comparison.png"
OTHERS = "Models with another number of frames, another prompt or another way to read the answer: near, not equal, conditions."


class Published(Settings):
    """Numbers of one model from one source."""

    model: str
    tokens: int | None
    """Visual tokens per frame that the language model reads; None if the number varies."""
    mode: Mode | None = None
    """Inference mode of a foveated model."""
    source: Annotated[str, Field(pattern=r"^https://")]
    scores: dict[str, Annotated[float, Field(ge=0, le=100)]]
    """Scores in percent, by the name of the benchmark in this package."""


@cache
def published() -> list[Published]:
    """All published numbers in `published.yaml`."""
    return TypeAdapter(list[Published]).validate_python(yaml.safe_load(FILE.read_text()))


def comparison_table(found: Mapping[str, BenchmarkResult], name: str, tokens: int) -> Table | None:
    """The measured modes and the published models on the benchmarks that were run; None if none of them has published numbers."""
    others = [one for one in published() if any(known in found for known in one.scores)]
    if not others:
        return None
    columns = [known for known in found if any(known in one.scores for one in others)]
    lines: dict[tuple[str, str, str], dict[str, str]] = {}
    for known in columns:
        for mode, one in found[known].of(found[known].main_order).items():
            value = one.headline
            shown = f"{100 * value.value:.1f} [{100 * value.low:.1f}, {100 * value.high:.1f}]"
            lines.setdefault((f"{name} (measured here)", str(tokens), mode), {})[known] = shown
    for one in others:
        line = lines.setdefault((one.model, "" if one.tokens is None else str(one.tokens), one.mode or ""), {})
        line |= {known: f"{value:.1f}" for known, value in one.scores.items()}
    sources = ", ".join(f"<{source}>" for source in dict.fromkeys(one.source for one in others))
    limited = [known for known in columns if found[known].note]
    note = f"Percent. {OTHERS} Published by their authors or cited, not measured here: {sources}."
    note += "".join(f" {found[known].title}: {found[known].note}" for known in limited)
    return Table(
        title="Published models",
        head=["model", "tokens per frame", "mode", *(benchmark(known).title for known in columns)],
        rows=[[*who, *(scores.get(known, "") for known in columns)] for who, scores in lines.items() if any(k in scores for k in columns)],
        note=note,
    )


def comparison(found: Mapping[str, BenchmarkResult], answerer: "Answerer", output: Path) -> Figure | None:
    """Plot accuracy over visual tokens per frame, with one panel per benchmark that was run and has published numbers."""
    known = [name for name in found if any(name in one.scores and one.tokens for one in published())]
    if not known:
        return None
    import matplotlib
    from matplotlib.figure import Figure as Canvas

    with matplotlib.rc_context({"font.family": "DejaVu Sans", "font.size": 8}):  # ships with matplotlib, so it is the same everywhere
        canvas = Canvas(figsize=(3.6 * len(known), 3.2), dpi=110, layout="constrained")
        for place, (axes, name) in enumerate(zip(canvas.subplots(1, len(known), squeeze=False)[0], known, strict=True)):
            _panel(axes, name, found[name], answerer)
            if place == 0:
                axes.set_ylabel("percent")
        output.mkdir(parents=True, exist_ok=True)
        canvas.savefig(output / PICTURE, metadata={"Software": None})
    names = ", ".join(benchmark(name).title for name in known)
    return Figure(file=PICTURE, caption=f"{names}: score over visual tokens per frame. Filled: measured here, with 95 % intervals.")


def _panel(axes, name: str, result: BenchmarkResult, answerer: "Answerer") -> None:
    best = {}
    for one in published():
        if name in one.scores and one.tokens and one.scores[name] > best.get(one.model, (0, 0))[1]:
            best[one.model] = (one.tokens, one.scores[name])
    for model, (tokens, score) in best.items():
        axes.plot(tokens, score, "o", markerfacecolor="none", color="0.4")
        axes.annotate(model, (tokens, score), textcoords="offset points", xytext=(4, 3), fontsize=6)
    for marker, (mode, one) in zip("s^D", result.of(result.main_order).items(), strict=False):
        value = one.headline
        spread = [[100 * (value.value - value.low)], [100 * (value.high - value.value)]]
        axes.errorbar(answerer.tokens_per_frame, 100 * value.value, yerr=spread, fmt=marker, capsize=2, label=f"{answerer.name}, {mode}")
    if result.chance is not None:
        axes.axhline(100 * result.chance, color="0.7", linewidth=0.8, linestyle="--", label="chance")
    axes.set(xscale="log", xlabel="visual tokens per frame", title=result.title)
    axes.legend(fontsize=6)
