"""Base classes for the parts of the evaluation. To add a part, write one file in `parts/` with two classes, and one line in
`parts/__init__.py`.

* A `Part` holds the part's settings, found under `evaluation:` in a profile, and its `measure` method, which returns the result.
* A `PartResult` is the part's entry in `results.json` and knows how to show itself: its tables, its rows of the result table and of the
  model card, and its figures. The code that prints results uses only these methods and knows no part by name.

Importing a part must not import torch: dependencies of the measurement are imported inside `measure`.
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
    """Raised by `measure` if the part has no result. Not a failure: the reason is recorded in the results."""


@dataclass(frozen=True)
class Context:
    """The inputs of a measurement."""

    subject: "Subject"
    answerer: "FoveatedAnswerer"
    """The same model, for multiple choice and benchmarks."""
    split: "ValidationSplit"
    modes: list[Mode]
    """Modes to measure, in the order of `MODES`."""
    bootstrap: "Bootstrap"
    """Computes all estimates, with the evaluation's seed."""
    output: Path
    """The evaluation's output folder, for figures."""
    ranks: Ranks = ALONE
    note: Callable[[str], None] = lambda text: None
    """Reports progress."""


class PartResult(Settings):
    """The result of one part. Subclasses add fields for its numbers and override the methods that show them."""

    title: ClassVar[str]
    """Name of the part in reports and above its tables."""
    dataset: ClassVar[Dataset] = OWN_SPLIT
    timing: ClassVar[bool] = False
    """True for timings, which differ from run to run: they are stored in a separate file, outside the evaluation's identity."""

    absent: dict[str, str] = {}
    """Measurements of this part that were not made, with the reasons."""

    @abstractmethod
    def count(self) -> int:
        """Number of measured samples (clips, questions)."""

    def headline(self) -> list[Metric]:
        """Rows of the result table."""
        return []

    def tables(self) -> list[Table]:
        """Tables of all numbers."""
        return []

    def figures(self) -> list[Figure]:
        """Figures drawn by the part."""
        return []

    def card_results(self) -> list[Metric]:
        """Entries in the model card's metadata."""
        return [metric for metric in self.headline() if metric.hub_type]


class Part(Settings):
    """Settings and measurement of one part of the evaluation."""

    result: ClassVar[type[PartResult]]
    """The class that `measure` returns and `results.json` stores."""
    needs_queries: ClassVar[bool] = False
    """Whether the part can only measure models with queries, not those that pool their patches."""

    @abstractmethod
    def measure(self, context: Context) -> PartResult:
        """Run the measurement. Raises NotMeasuredError if there is nothing to measure."""

    def outside(self) -> dict[str, Path]:
        """External files and folders that the part reads, by the dotted path of the setting that names them."""
        return {}


def require(found: int, wanted: int, what: str) -> None:
    """Raise NotMeasuredError if no samples were found; `wanted` is the number that the settings ask for (0: switched off)."""
    if not found:
        raise NotMeasuredError(f"the validation split has no {what}" if wanted else "switched off")
