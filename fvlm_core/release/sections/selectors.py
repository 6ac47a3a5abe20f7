"""Which way to choose what is encoded wins when: a comparison that is the repository's and not the released model's, equal in every report.

`selectors.json` beside this file is what `python -m benchmarks.selectors --record` leaves of its results; how they were made is in
docs/selectors.md.
"""

from pathlib import Path

from pydantic import TypeAdapter

from fvlm_core.eval.estimates import Estimate
from fvlm_core.release.evidence import Evidence
from fvlm_core.release.figures import Figures
from fvlm_core.release.report import Section
from fvlm_core.settings import Settings
from fvlm_core.tables import Table, number

RECORD = Path(__file__).with_suffix(".json")
OURS = "ours"


class Accuracy(Settings):
    """One way to choose (a selector) in one world."""

    world: str
    selector: str
    accuracy: Estimate
    """Mean over the seeds, with its interval over clips."""
    seeds: int
    mflop: float
    """Of encoding and reading one frame."""


ACCURACIES = TypeAdapter(list[Accuracy])


def section(evidence: Evidence, figures: Figures) -> Section:
    del evidence, figures
    found = ACCURACIES.validate_json(RECORD.read_bytes())
    worlds = list(dict.fromkeys(one.world for one in found))
    by = {(one.selector, one.world): one for one in found}
    selectors = list(dict.fromkeys(one.selector for one in found))
    rows = [[name, f"{by[name, worlds[0]].mflop:.1f}", *(number(by[name, world].accuracy) for world in worlds)] for name in selectors]
    first = found[0]
    note = (
        f"{first.accuracy.n} held-out clips, {first.seeds} seeds, 95 % intervals over clips. Chance is 0.1. "
        "oracle and full (every patch) are bounds, not rivals; merging costs more. docs/selectors.md says how each is made."
    )
    text = (
        "A model with a glance encodes only the patches that something chooses. In three rendered worlds, at equal FLOPs: the question "
        "names the place (*asked*), little changes and the change is asked about (*still*), "
        "only the frame before says where to look (*hunt*). "
        f"*{OURS}* is the choice by the language model's state. Nothing here is about real video."
    )
    table = Table(head=["choice", "MFLOP a frame", *worlds], rows=rows, marked=[selectors.index(OURS)], note=note)
    return Section(title="Which choice of what to encode wins when", blocks=[text, table])
