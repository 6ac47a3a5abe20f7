"""The door for measurements: a part of the evaluation is one file in `parts/` with two classes, and one line in `parts/__init__.py`.

* A `Part` is the part's settings, as the profile's `evaluation:` shows them, and `measure`, which makes its result.
* A `PartResult` is what `results.json` keeps of it, and how that is shown: its tables, its lines of the result table and of the model
  card, its pictures. Everything that prints results asks for these and knows no part by name.

Importing a part imports no torch: what only measuring needs is imported in `measure`.
"""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from fvlm_core.eval.estimates import Dataset, Metric
from fvlm_core.eval.ranks import ALONE, Ranks
from fvlm_core.figures import Figure
from fvlm_core.model.names import Mode
from fvlm_core.settings import Settings
from fvlm_core.tables import Table

if TYPE_CHECKING:  # they need torch
    from fvlm_core.eval.answerers.foveated import FoveatedAnswerer
    from fvlm_core.eval.stats import Bootstrap
    from fvlm_core.eval.subject import Subject
    from fvlm_core.eval.validation import ValidationSplit

Count = Annotated[int, Field(ge=0)]
OWN_SPLIT = Dataset(type="fvlm-validation", name="fVLM validation split")


class NotMeasuredError(Exception):
    """Raised by `measure`: why the part has no result. Not a fault; the reason becomes part of the results."""


@dataclass(frozen=True)
class Context:
    """What a part can measure with."""

    subject: "Subject"
    answerer: "FoveatedAnswerer"
    """The same model, for multiple choice and benchmarks."""
    split: "ValidationSplit"
    modes: list[Mode]
    """To measure, in the order of `MODES`."""
    bootstrap: "Bootstrap"
    """Makes every estimate; its seed is the evaluation's."""
    output: Path
    """The evaluation's folder, for pictures."""
    ranks: Ranks = ALONE
    note: Callable[[str], None] = lambda text: None
    """Reports what is being done."""


class PartResult(Settings):
    """What one part measured. Subclasses add its numbers, and show as much of themselves as they have to show."""

    title: ClassVar[str]
    """Names the part in reports and above its tables."""
    dataset: ClassVar[Dataset] = OWN_SPLIT
    timing: ClassVar[bool] = False
    """Numbers of the machine, which differ from run to run: kept in a file of their own, outside the evaluation's identity."""

    absent: dict[str, str] = {}
    """What of the part was not measured, and why."""

    @abstractmethod
    def count(self) -> int:
        """How many samples (clips, questions) were measured."""

    def headline(self) -> list[Metric]:
        """Its lines of the result table."""
        return []

    def tables(self) -> list[Table]:
        """All its numbers, to be read."""
        return []

    def figures(self) -> list[Figure]:
        """What it drew."""
        return []

    def card_results(self) -> list[Metric]:
        """Its entries in the model card's metadata."""
        return [metric for metric in self.headline() if metric.hub_type]


class Part(Settings):
    """The settings of one part of the evaluation, and its measuring."""

    result: ClassVar[type[PartResult]]
    """What `measure` returns and `results.json` holds."""
    needs_queries: ClassVar[bool] = False
    """Whether only a model that looks somewhere can be measured (not one that pools its patches)."""

    @abstractmethod
    def measure(self, context: Context) -> PartResult:
        """Measure. Raises NotMeasuredError where there is nothing to measure on."""

    def outside(self) -> dict[str, Path]:
        """Files and folders from outside that it reads, by the dotted path of the setting that names them."""
        return {}


def require(found: int, wanted: int, what: str) -> None:
    """Raises NotMeasuredError where nothing was found to measure on. `wanted`: how many the settings ask for."""
    if not found:
        raise NotMeasuredError(f"the validation split has no {what}" if wanted else "switched off")
