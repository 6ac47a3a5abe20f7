"""The registry of the evaluation's parts, one line each, in the order in which they are measured and shown.

A field's name is the part's key in the profile (`evaluation.NAME`) and in `results.json`.
"""

from fvlm_core.eval.part import Part, PartResult
from fvlm_core.eval.parts.benchmarks import Benchmarks
from fvlm_core.eval.parts.captions import Captions
from fvlm_core.eval.parts.drift import Drift
from fvlm_core.eval.parts.gaze import Gaze
from fvlm_core.eval.parts.latency import Latency
from fvlm_core.eval.parts.losses import Losses
from fvlm_core.eval.parts.multiple_choice import MultipleChoice
from fvlm_core.eval.parts.question_order import QuestionOrder
from fvlm_core.settings import Settings


class Parts(Settings):
    """The parts of the evaluation."""

    losses: Losses = Losses()
    captions: Captions = Captions()
    multiple_choice: MultipleChoice = MultipleChoice()
    benchmarks: Benchmarks = Benchmarks()
    question_order: QuestionOrder = QuestionOrder()
    gaze: Gaze = Gaze()
    drift: Drift = Drift()
    latency: Latency = Latency()

    def parts(self) -> dict[str, Part]:
        """The settings of all parts, by name."""
        return {name: part for name in type(self).model_fields if isinstance(part := getattr(self, name), Part)}


RESULTS: dict[str, type[PartResult]] = {name: field.default.result for name, field in Parts.model_fields.items()}
"""The result classes, by the part's name."""
