"""A comparison of ways to choose which patches are encoded. It is not about the released model, and is the same in every report.

`python -m benchmarks.selectors --record` writes `selectors.json` beside this file; docs/selectors.md says how the results were made.
"""

from collections.abc import Sequence
from pathlib import Path

from pydantic import TypeAdapter

from fvlm_core.eval.estimates import Estimate
from fvlm_core.eval.stats import SeedDifference, over_seeds
from fvlm_core.release.evidence import Evidence
from fvlm_core.release.figures import Figures
from fvlm_core.release.report import Block, Section
from fvlm_core.settings import Settings
from fvlm_core.tables import Table, number

RECORD = Path(__file__).with_suffix(".json")
OURS = "ours"


class Accuracy(Settings):
    """Accuracy of one selector (a way to choose patches) in one rendered world."""

    world: str
    selector: str
    accuracy: Estimate
    """Mean over the seeds, with its confidence interval over clips."""
    seeds: int
    mflop: float
    """MFLOPs to encode and read one frame."""
    by_seed: dict[int, float] = {}
    """Accuracy by training seed; records of before it was kept lack it."""


ACCURACIES = TypeAdapter(list[Accuracy])


def section(evidence: Evidence, figures: Figures) -> Section:
    del evidence, figures
    text = (
        "A model with a glance encodes only the patches that a selector chooses. This compares selectors at equal FLOPs in three rendered "
        "worlds: the question names the place (*asked*); little changes, and the question is about the change (*still*); "
        "only the previous frame says where to look (*hunt*). "
        f"*{OURS}* chooses by the language model's hidden state. These results say nothing about real video."
    )
    return Section(title="Selectors: which patches to encode", blocks=[text, *blocks(ACCURACIES.validate_json(RECORD.read_bytes()))])


def blocks(found: Sequence[Accuracy]) -> list[Block]:
    """The accuracies, and the differences between `OURS` and every other selector over training seeds."""
    worlds = list(dict.fromkeys(one.world for one in found))
    by = {(one.selector, one.world): one for one in found}
    selectors = list(dict.fromkeys(one.selector for one in found))
    rows = [[name, f"{by[name, worlds[0]].mflop:.1f}", *(number(by[name, world].accuracy) for world in worlds)] for name in selectors]
    first = found[0]
    note = (
        f"{first.accuracy.n} held-out clips, {first.seeds} seeds; 95 % intervals over clips, for these very models. Chance is 0.1. "
        "oracle and full (every patch) are references, not competitors; merging costs more. docs/selectors.md describes each."
    )
    accuracies = Table(head=["selector", "MFLOP a frame", *worlds], rows=rows, marked=[selectors.index(OURS)], note=note)
    gains = {world: seed_differences(found, world) for world in worlds}
    if not any(gains.values()):
        return [accuracies]
    others = [name for name in selectors if name != OURS]
    rows = [[name, *(seed_cell(gains[world].get(name)) for world in worlds)] for name in others]
    text = (
        f"*{OURS}* minus each selector: the difference of every training seed, Student's 95 % interval over the seeds, and the p-value of "
        "its test, Holm-adjusted over the selectors of a world. A difference between methods must hold over seeds."
    )
    return [accuracies, text, Table(head=["selector", *worlds], rows=rows)]


def seed_differences(found: Sequence[Accuracy], world: str) -> dict[str, SeedDifference]:
    """`OURS` minus every other selector of a world, over training seeds."""
    by_seed = {one.selector: one.by_seed for one in found if one.world == world}
    return over_seeds(by_seed.pop(OURS, {}), by_seed)


def seed_cell(one: SeedDifference | None) -> str:
    """Format a difference: by seed, then interval and p-value."""
    if one is None:
        return ""
    values = " ".join(f"{value:+.3f}" for value in one.by_seed.values())
    return f"{values}; [{one.low:+.3f}, {one.high:+.3f}], p {one.p_holm:.2g}"
