"""Published benchmarks, the gaze benchmark and your own questions, in every mode and order, with controls (`fvlm_core.eval.benchmarks`).

The records of the items are stored in `items/`: a killed evaluation resumes from there, and all torchrun ranks write there.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Self

from pydantic import Field, model_validator

from fvlm_core.errors import UserError
from fvlm_core.eval.asking import AskSettings, ask_all, collect, wait_for_all
from fvlm_core.eval.benchmark_result import BenchmarkResult, benchmark_result
from fvlm_core.eval.benchmark_tables import benchmark_tables
from fvlm_core.eval.benchmarks import NAMES, benchmark
from fvlm_core.eval.benchmarks.benchmark import Loaded, Scorer, load
from fvlm_core.eval.estimates import Dataset, Estimate, Metric
from fvlm_core.eval.part import Context, Count, NotMeasuredError, Part, PartResult
from fvlm_core.eval.ranks import ALONE, Ranks
from fvlm_core.figures import Figure
from fvlm_core.settings import EXECUTION
from fvlm_core.tables import Table

if TYPE_CHECKING:  # it needs torch
    from fvlm_core.eval.answerers.answerer import Answerer
    from fvlm_core.eval.stats import Bootstrap

ITEMS_FOLDER = "items"
VALIDATION = "validation"
SHARE = Annotated[float, Field(ge=0, le=1)]


class BenchmarksResult(PartResult):
    """Results of the benchmarks that were run."""

    title = "Benchmarks"

    benchmarks: dict[str, BenchmarkResult]
    """Results by benchmark name."""
    comparison: Figure | None = None
    """Plot of accuracy over visual tokens per frame, with published models."""

    def count(self) -> int:
        """Number of questions."""
        return sum(one.questions for one in self.benchmarks.values())

    def headline(self) -> list[Metric]:
        """The headline number of each benchmark, in every mode."""
        return [metric(one) for one in self.benchmarks.values()]

    def tables(self) -> list[Table]:
        """All tables of all benchmarks."""
        return [table for one in self.benchmarks.values() for table in benchmark_tables(one)]

    def figures(self) -> list[Figure]:
        """The comparison with published models, if any."""
        return [self.comparison] if self.comparison else []


class Benchmarks(Part):
    """Published benchmarks, the gaze benchmark and your own questions."""

    result = BenchmarksResult

    run: list[str] = []
    """Names of the benchmarks to run, e.g. `videomme`; see docs/benchmarks.md."""
    data: Annotated[dict[str, Path], EXECUTION] = {}
    """Folder (or OWNER/NAME of a dataset on the hub) of each benchmark, by name. The content of the annotation files is part of the
    evaluation's identity; their location is not. `gaze` needs no folder; `validation` reads the run's own shards by default."""
    limit: Count = 0
    """Maximum number of items per benchmark, spread evenly over its rows; 0 uses all."""
    ask: AskSettings = AskSettings()
    """Question orders, controls and scoring methods."""
    scorer: Scorer | None = None
    """Scoring method of the headline numbers: the likelihood of the options' letters (`letter`) or of their texts (`sum`, `mean`, `pmi`).
    None uses each benchmark's default. A separate table compares all methods."""
    max_missing_share: Annotated[SHARE, EXECUTION] = 0.01
    """Maximum share of a benchmark's items that may lack media, be unreadable, or fail to decode; more is an error."""

    @model_validator(mode="after")
    def _known(self) -> Self:
        if unknown := [name for name in [*self.run, *self.data] if name not in NAMES]:
            raise ValueError(f"there is no benchmark {', '.join(unknown)}; there are {', '.join(NAMES)}")
        if lacking := [n for n in self.run if n not in self.data and n != VALIDATION and benchmark(n).needs_folder]:
            raise ValueError(f"data: give the folder of {', '.join(lacking)}")
        return self

    def in_modes(self, modes: Sequence[str] | None) -> Self:
        """A copy that runs these modes, unless the settings name their own."""
        return self.model_copy(update={"ask": self.ask.model_copy(update={"modes": self.ask.modes or (list(modes) if modes else None)})})

    def outside(self) -> dict[str, Path]:
        """The folders of the benchmarks to run."""
        return {f"data.{name}": self.data[name] for name in self.run if name in self.data}

    def measure(self, context: Context) -> BenchmarksResult:
        """Ask all items, together with the other ranks, and aggregate the records."""
        if not self.run:
            raise NotMeasuredError("no benchmark was asked for (evaluation.benchmarks.run)")
        from fvlm_core.eval.published import comparison

        loaded = self.load(context.split.shards.folder)
        self.ask_items(loaded, context.answerer, context.output, context.ranks, context.note)
        found = add_up(self, loaded, context.answerer, context.output, context.bootstrap)
        return BenchmarksResult(benchmarks=found, comparison=comparison(found, context.answerer, context.output))

    def load(self, shards: Path | None) -> dict[str, Loaded]:
        """Load the items of all benchmarks. Raises UserError if data are missing or in another format."""
        found = {}
        for name in self.run:
            folder = self.data.get(name, shards if name == VALIDATION else None)
            found[name] = load(benchmark(name), folder, limit=self.limit, max_missing_share=self.max_missing_share)
        return found

    def ask_items(
        self,
        loaded: dict[str, Loaded],
        answerer: "Answerer",
        output: Path,
        ranks: Ranks = ALONE,
        note: Callable[[str], None] = lambda text: None,
        done: Callable[[int], None] = lambda items: None,
    ) -> None:
        """Ask the items in this rank's shards; rank 0 then waits for the other ranks."""
        for name, one in loaded.items():
            asked = 0

            def report(items: int, name: str = name, total: int = len(one.items)) -> None:
                nonlocal asked
                asked += items
                note(f"{name}: {asked} of {total} questions")
                done(items)

            note(f"{name}: 0 of {len(one.items)} questions")
            ask_all(
                answerer, one, self.ask, output / ITEMS_FOLDER / name, ranks=ranks, max_missing_share=self.max_missing_share, done=report
            )
        if ranks.rank == 0 and ranks.size > 1:
            for name, one in loaded.items():
                wait_for_all(answerer, one, self.ask, output / ITEMS_FOLDER / name)


def add_up(
    settings: Benchmarks, loaded: dict[str, Loaded], answerer: "Answerer", output: Path, bootstrap: "Bootstrap"
) -> dict[str, BenchmarkResult]:
    """Aggregate benchmarks whose shards are all finished. Raises UserError if a shard is not, or no item could be decoded."""
    results = {}
    for name, one in loaded.items():
        records = collect(answerer, one, settings.ask, output / ITEMS_FOLDER / name, max_missing_share=settings.max_missing_share)
        if not any(not record.error for record in records):
            raise UserError(f"none of the items of {name} could be decoded", where=name, fix="replace the media")
        rule = answerer.rule
        results[name] = benchmark_result(one, records, bootstrap, fps=rule.fps, frame_px=rule.frame_px, scorer=settings.scorer)
    return results


def metric(result: BenchmarkResult) -> Metric:
    """A benchmark's row of the result table."""
    baselines: dict[str, Estimate | float] = {}
    if result.chance is not None and result.majority is not None:
        baselines = {"chance": result.chance, "constant": result.majority}
    if result.blind is not None:
        baselines["no frames"] = result.blind
    shown = result.of(result.main_order)
    return Metric(
        name=result.title,
        values={mode: one.headline for mode, one in shown.items()},
        baselines=baselines,
        hub_type=result.metric,
        dataset=Dataset(type=result.dataset, name=result.title, split=result.split),
    )
