"""Whether the model looks for what is asked: the question before the frames and after them; from the evaluation's results."""

from collections.abc import Callable

from fvlm_core.eval.results import ORDERS, Estimate, Order, OrderCell
from fvlm_core.eval.tables import number
from fvlm_core.markdown import escape
from fvlm_core.model.names import MODES as ALL_MODES
from fvlm_core.model.names import Mode
from fvlm_core.release.evidence import Evidence
from fvlm_core.release.figures import Figures
from fvlm_core.release.report import Block, Section
from fvlm_core.release.words import MODES
from fvlm_core.tables import Table

TITLE = "Question order"
PARTS: dict[str, Callable[[OrderCell], Estimate | None]] = {
    "later frames": lambda cell: cell.later_frames,
    "first frame": lambda cell: cell.first_frame,
    "all frames": lambda cell: cell.accuracy,
}


def section(evidence: Evidence, figures: Figures) -> Section:
    results = evidence.results
    cells = {(cell.order, cell.mode): cell for cell in results.question_order}
    if not cells:
        return Section(title=TITLE, missing=escape(results.absent.get("question_order", "the question orders were not evaluated")))
    modes: list[Mode] = [mode for mode in ALL_MODES if any(key[1] == mode for key in cells)]

    def row(name: str, order: Order, pick: Callable[[OrderCell], Estimate | None]) -> list[str]:
        return [name, *(number(pick(cells[order, mode])) if (order, mode) in cells else "" for mode in modes)]

    accuracy = [row(f"{order.replace('_', ' ')}, {part}", order, pick) for order in ORDERS for part, pick in PARTS.items()]
    hits = [row(order.replace("_", " "), order, lambda cell: cell.gaze_hit_rate) for order in ORDERS]
    note = "Accuracy on questions about a place in each frame. A coarse pass reads every frame alike, so only a fine one can use the "
    note += "question; with the question after the frames no mode knows where to look."
    head = [MODES[mode] for mode in modes]
    blocks: list[Block] = [Table(head=["accuracy", *head], rows=[row for row in accuracy if any(row[1:])], note=note)]
    if hits := [row for row in hits if any(row[1:])]:
        chance = f"; by chance {results.gaze_chance:.3f}" if results.gaze_chance else ""
        said = f"Share of later frames whose attention peak is on the asked place{chance}."
        blocks.append(Table(head=["gaze on target", *head], rows=hits, note=said))
    return Section(title=TITLE, blocks=blocks)
