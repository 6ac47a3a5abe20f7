"""The scaling study: points, fits with intervals, five plots, and the size to train.

`python -m fvlm_core.scaling.grid job.yaml` reads the finished runs of a grid (sizes x budgets x variants). Every fit is tried
and reported; one that the runs do not determine has no value and says why.
"""

import csv
import hashlib
import io
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from pydantic import Field

from fvlm_core.cli import run_job
from fvlm_core.errors import UserError
from fvlm_core.manifest import file_entries, write_atomically
from fvlm_core.progress import Progress
from fvlm_core.scaling import plots
from fvlm_core.scaling.fits import (
    Fit,
    Grid,
    NotIdentifiableError,
    Parabola,
    crossover,
    fit_allocation,
    fit_data_law,
    fit_law,
    fit_law_huber,
    fit_parabola,
    quantities,
)
from fvlm_core.scaling.jobs import (
    FITS_FILE,
    PLOTS,
    POINTS_FILE,
    SCALING_TEXT,
    VARIANTS,
    GridJob,
    GridPoint,
    GridRun,
    Quantity,
    ScalingReport,
    Variant,
)
from fvlm_core.scaling.runs import FinishedRun, same_shards
from fvlm_core.settings import Settings

LAW_NUMBERS = ("E", "A", "alpha", "B", "beta")
SIGNIFICANT_DIGITS = 9
"""Of fitted numbers in files: fewer than a double has, so that files do not depend on the order of a sum."""


class HeldOut(Settings):
    """The joint law fitted without the largest budget, and asked for it."""

    budget_flops: float
    mean_relative_error: Quantity


class VariantFits(Settings):
    """Everything fitted to the runs of one variant."""

    law: dict[str, Quantity]
    """E, A, alpha, B, beta of L(N, D) = E + A / N^alpha + B / D^beta; N in parameters, D in labelled tokens."""
    law_huber: dict[str, Quantity]
    """The same by Huber loss on logarithms and L-BFGS: the cross-check."""
    data: dict[str, Quantity]
    """beta of L = E + B / D^beta at fixed size, one exponent for all sizes; E and B of each size by `E.size`, `B.size`."""
    iso_flop: dict[str, Quantity]
    """Best N of every budget, by parabola."""
    allocation: dict[str, Quantity]
    """exponent of N* ~ C^exponent."""
    held_out: HeldOut | None


class Fits(Settings):
    """`fits.json`: equal points and seed give equal bytes."""

    points_sha256: str
    """Of `points.csv`."""
    seed: int
    resamples: int
    variants: dict[Variant, VariantFits]
    crossover_flops: Quantity
    token_ratio_at_equal_loss: Quantity
    """Visual tokens that the baseline reads in training over those that the foveated model reads, at the best loss both reach."""
    chosen: str
    chosen_reason: str
    notes: list[str] = Field(default_factory=list)


class Study:
    """The fits of one variant, with the objects that plots draw."""

    def __init__(self, points: Sequence[GridPoint], *, resamples: int, seed: int) -> None:
        self.points = points
        self.grid = to_grid(points)
        sizes = {point.params: point.size for point in points}
        self.law, law = self._try(fit_law, LAW_NUMBERS, resamples, seed)
        self.data_law, data = self._try(fit_data_law, ("beta",), resamples, seed)
        self.allocation, allocation = self._try(fit_allocation, ("exponent",), resamples, seed)
        self.parabolas: list[Parabola] = []
        iso_flop: dict[str, Quantity] = {}
        for budget in np.unique(self.grid.budget):
            iso_flop[f"{budget:.3e}"] = self._parabola(budget)
        if self.data_law is not None:
            for params, e, b in zip(self.data_law.sizes, self.data_law.E, self.data_law.B, strict=True):
                data |= {f"E.{sizes[int(params)]}": Quantity(value=float(e)), f"B.{sizes[int(params)]}": Quantity(value=float(b))}
        self.fits = VariantFits(
            law=law,
            law_huber=self._huber(),
            data=data,
            iso_flop=iso_flop,
            allocation=allocation,
            held_out=self._held_out(),
        )

    @property
    def best(self) -> dict[float, float]:
        """Lowest loss of every budget."""
        return {float(budget): float(self.grid.loss[self.grid.budget == budget].min()) for budget in np.unique(self.grid.budget)}

    @property
    def frontier(self) -> list[GridPoint]:
        """Runs that no other run beats with as few visual tokens."""
        kept: list[GridPoint] = []
        for point in sorted(self.points, key=lambda point: (point.visual_tokens, point.loss)):
            if not kept or point.loss < kept[-1].loss:
                kept.append(point)
        return kept

    @property
    def cost_per_token(self) -> np.ndarray:
        """Coefficients of log(FLOPs per labelled token) over log N: the encoder costs too, so it is not 6 N."""
        spent = np.array([point.flops for point in self.points]) / self.grid.tokens
        degree = min(2, len(np.unique(self.grid.params)) - 1)
        return np.polyfit(np.log(self.grid.params), np.log(spent), degree)

    def _try(self, fit: Callable[[Grid], Fit], names: Sequence[str], resamples: int, seed: int) -> tuple[Fit | None, dict[str, Quantity]]:
        try:
            return quantities(self.grid, fit, resamples=resamples, seed=seed)
        except NotIdentifiableError as error:
            return None, {name: Quantity(value=None, reason=f"not identifiable: {error}") for name in names}

    def _huber(self) -> dict[str, Quantity]:
        try:
            return {name: Quantity(value=value) for name, value in fit_law_huber(self.grid).numbers().items()}
        except NotIdentifiableError as error:
            return {name: Quantity(value=None, reason=f"not identifiable: {error}") for name in LAW_NUMBERS}

    def _parabola(self, budget: float) -> Quantity:
        try:
            self.parabolas.append(fit_parabola(self.grid, budget))
            return Quantity(value=self.parabolas[-1].optimum())
        except NotIdentifiableError as error:
            return Quantity(value=None, reason=str(error))

    def _held_out(self) -> HeldOut | None:
        """None where there is one budget only."""
        budget = float(self.grid.budget.max())
        known, held = np.flatnonzero(self.grid.budget < budget), np.flatnonzero(self.grid.budget == budget)
        if not len(known):
            return None
        try:
            test = self.grid.take(held)
            error = float(np.abs(fit_law(self.grid.take(known)).predict(test) / test.loss - 1).mean())
            return HeldOut(budget_flops=budget, mean_relative_error=Quantity(value=error))
        except NotIdentifiableError as reason:
            nothing = Quantity(value=None, reason=f"without the largest budget the law is not identifiable: {reason}")
            return HeldOut(budget_flops=budget, mean_relative_error=nothing)


def study(job: GridJob) -> ScalingReport:
    """Fit, plot, choose. Raises UserError for runs that are missing, given twice, or cannot be compared."""
    started = time.monotonic()
    finished = _read(job)
    points = [_point(run, finished[_name(run)]) for run in job.runs]
    table = points_csv(points).encode()
    write_atomically(job.output / POINTS_FILE, table)
    studies: dict[Variant, Study] = {
        variant: Study(own, resamples=job.resamples, seed=job.seed)
        for variant in VARIANTS
        if (own := [point for point in points if point.variant == variant])
    }
    chosen, reason = choose(studies, target_flops=job.target_flops)
    fits = Fits(
        points_sha256=hashlib.sha256(table).hexdigest(),
        seed=job.seed,
        resamples=job.resamples,
        variants={variant: one.fits for variant, one in studies.items()},
        crossover_flops=_crossover(studies),
        token_ratio_at_equal_loss=_token_ratio(studies),
        chosen=chosen,
        chosen_reason=reason,
        notes=["one run and one seed per cell of the grid", "N counts all parameters, D labelled tokens, FLOPs include the vision encoder"],
    )
    fits = Fits.model_validate(_rounded(fits.model_dump(mode="json")))
    write_atomically(job.output / FITS_FILE, fits.model_dump_json(indent=2).encode())
    write_atomically(job.output / SCALING_TEXT, markdown(points, fits).encode())
    _plot(job, points, studies, fits)
    return ScalingReport(
        name="scaling",
        settings_hash=job.hash(exclude={"output"}),
        inputs={name: run.manifest.digest for name, run in finished.items()},
        counts={"runs": len(points)},
        files=file_entries(job.output, [POINTS_FILE, FITS_FILE, SCALING_TEXT, *PLOTS]),
        seconds=time.monotonic() - started,
        points=points,
        exponents={
            f"{variant}.{name}": part[key]
            for variant, one in fits.variants.items()
            for name, part, key in (
                ("alpha", one.law, "alpha"),
                ("beta", one.law, "beta"),
                ("data_beta", one.data, "beta"),
                ("allocation", one.allocation, "exponent"),
            )
        },
        crossover_flops=fits.crossover_flops,
        chosen=chosen,
        chosen_reason=reason,
        run_seconds=sum(run.manifest.seconds for run in finished.values()),
    ).write(job.output)


def choose(studies: dict[Variant, Study], *, target_flops: float | None) -> tuple[str, str]:
    """The size to train and why: by the joint law where it is identified and a target beyond the grid is given, else by the
    lowest measured loss of the foveated model at the largest budget that all sizes were run at (equal losses: the smaller).

    Raises UserError without a foveated run.
    """
    if "foveated" not in studies:
        raise UserError("no foveated run to choose a size from", where="runs", fix="give at least one run of the variant foveated")
    one = studies["foveated"]
    budgets = {size: {point.budget_flops for point in one.points if point.size == size} for size in (point.size for point in one.points)}
    shared = set.intersection(*budgets.values())
    if target_flops is not None and one.law is not None and target_flops > one.grid.budget.max():
        sizes = {point.size: point.params for point in one.points}
        per_token = {size: float(np.exp(np.polyval(one.cost_per_token, np.log(params)))) for size, params in sizes.items()}
        predicted = {
            size: float(one.law.loss(np.array(params), np.array(target_flops / per_token[size]))) for size, params in sizes.items()
        }
        chosen = min(predicted, key=lambda size: (predicted[size], sizes[size]))
        return chosen, f"lowest loss predicted by the joint law at {target_flops:.2e} FLOPs: {_listed(predicted)}"
    if not shared:
        raise UserError(
            "no budget was run at every size, so sizes cannot be compared",
            where="runs",
            fix="run the foveated variant at one budget at all sizes",
        )
    budget = max(shared)
    at_largest = sorted((point for point in one.points if point.budget_flops == budget), key=lambda point: (point.loss, point.params))
    reason = f"lowest measured loss at the largest budget, {budget:.2e} FLOPs: {_listed({p.size: p.loss for p in at_largest})}"
    if target_flops is not None and target_flops > budget:
        reason += f"; no law could be fitted that says what holds at the final {target_flops:.2e} FLOPs"
    return at_largest[0].size, reason


def to_grid(points: Sequence[GridPoint]) -> Grid:
    """Points as arrays."""
    columns = zip(*((point.params, point.tokens, point.loss, point.budget_flops) for point in points), strict=True)
    return Grid(*(np.array(column, dtype=np.float64) for column in columns))


def points_csv(points: Sequence[GridPoint]) -> str:
    """`points.csv`: everything the fits use."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [*GridPoint.model_fields, "visual_tokens"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(point.model_dump() | {"visual_tokens": point.visual_tokens} for point in points)
    return text.getvalue()


def markdown(points: Sequence[GridPoint], fits: Fits) -> str:
    """`scaling.md`: the grid, what was fitted, what could not be, and the choice."""
    budgets = sorted({point.budget_flops for point in points})
    losses = {(point.variant, point.size, point.budget_flops): point.loss for point in points}
    rows = dict.fromkeys((point.variant, point.size, point.params) for point in points)
    lines = [f"Chosen size: **{fits.chosen}** ({fits.chosen_reason}).", ""]
    lines += [
        f"| variant | size | parameters | {' | '.join(f'{budget:.1e} FLOPs' for budget in budgets)} |",
        "|---" * (3 + len(budgets)) + "|",
    ]
    for variant, size, params in rows:
        cells = [f"{losses[variant, size, budget]:.4f}" if (variant, size, budget) in losses else "" for budget in budgets]
        lines.append(f"| {variant} | {size} | {params:,} | {' | '.join(cells)} |")
    lines += ["", "| fit | value | 95 % interval |", "|---|---|---|"]
    for name, quantity in fit_rows(fits):
        lines.append(f"| {name} | {show(quantity)} | {show_interval(quantity)} |")
    return "\n".join([*lines, "", *(f"* {note}" for note in fits.notes), ""])


def fit_rows(fits: Fits) -> list[tuple[str, Quantity]]:
    """The headline fits with their names, for tables."""
    rows = []
    for variant, one in fits.variants.items():
        rows += [(f"{variant}: {name} of the joint law", one.law[name]) for name in ("alpha", "beta", "E")]
        rows += [(f"{variant}: beta at fixed size", one.data["beta"])]
        rows += [(f"{variant}: exponent of the best size over budget", one.allocation["exponent"])]
        if one.held_out is not None:
            rows.append((f"{variant}: held-out error at the largest budget", one.held_out.mean_relative_error))
    return [
        *rows,
        ("crossover (FLOPs)", fits.crossover_flops),
        ("visual tokens at equal loss, baseline / foveated", fits.token_ratio_at_equal_loss),
    ]


def show(quantity: Quantity) -> str:
    """A fitted value for reading."""
    return f"{quantity.value:.4g}" if quantity.value is not None else f"none: {quantity.reason}"


def show_interval(quantity: Quantity) -> str:
    """Its interval for reading."""
    if quantity.value is None:
        return ""
    interval = "" if quantity.low is None or quantity.high is None else f"{quantity.low:.4g} to {quantity.high:.4g}"
    return "; ".join(part for part in (interval, quantity.reason) if part)


def _read(job: GridJob) -> dict[str, FinishedRun]:
    names = [_name(run) for run in job.runs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"given twice: {', '.join(twice)}", where="runs", fix="give every size, budget and variant once")
    progress = Progress(job.output, len(job.runs))
    finished: dict[str, FinishedRun] = {}
    for number, (name, run) in enumerate(zip(names, job.runs, strict=True)):
        finished[name] = FinishedRun.read(run.run)
        progress.update(number + 1, note=name)
    same_shards(finished)
    return finished


def _name(run: GridRun) -> str:
    return f"{run.size} {run.budget_flops:.4e} {run.variant}"


def _point(run: GridRun, finished: FinishedRun) -> GridPoint:
    manifest = finished.manifest
    return GridPoint(
        size=run.size,
        variant=run.variant,
        params=run.params or manifest.params,
        budget_flops=run.budget_flops,
        flops=manifest.flops,
        samples=manifest.samples_seen,
        frames=manifest.frames_seen,
        tokens_per_frame=finished.recipe.model.tokens_per_frame,
        tokens=manifest.label_tokens_seen,
        loss=manifest.final_loss,
    )


def _crossover(studies: dict[Variant, Study]) -> Quantity:
    if len(studies) < len(VARIANTS):
        return Quantity(value=None, reason="only one variant was run")
    ours, theirs = (studies[variant].best for variant in VARIANTS)
    budgets = sorted(ours.keys() & theirs.keys())
    try:
        return Quantity(value=crossover(budgets, [ours[c] - theirs[c] for c in budgets]), reason="no interval: one run per cell")
    except NotIdentifiableError as error:
        return Quantity(value=None, reason=str(error))


def _token_ratio(studies: dict[Variant, Study]) -> Quantity:
    """At the lowest loss that both variants reach, interpolated along the frontiers in log tokens."""
    if len(studies) < len(VARIANTS):
        return Quantity(value=None, reason="only one variant was run")
    fronts = [studies[variant].frontier for variant in VARIANTS]
    target = max(front[-1].loss for front in fronts)
    if any(front[0].loss < target for front in fronts):
        return Quantity(value=None, reason="the frontiers share no loss")
    ours, theirs = (
        np.interp(-target, [-point.loss for point in front], np.log([max(1, point.visual_tokens) for point in front])) for front in fronts
    )
    return Quantity(value=float(np.exp(theirs - ours)), reason=f"at a loss of {target:.4f}")


def _plot(job: GridJob, points: list[GridPoint], studies: dict[Variant, Study], fits: Fits) -> None:
    iso_flop, crossing, efficiency, data, allocation = (job.output / name for name in PLOTS)
    plots.plot_iso_flop(iso_flop, points, {variant: one.parabolas for variant, one in studies.items()})
    plots.plot_crossover(crossing, points, {variant: one.best for variant, one in studies.items()}, fits.crossover_flops.value)
    plots.plot_token_efficiency(efficiency, points, {variant: one.frontier for variant, one in studies.items()})
    plots.plot_data_scaling(data, points, {variant: one.data_law for variant, one in studies.items()})
    plots.plot_allocation(
        allocation,
        points,
        allocations={variant: one.allocation for variant, one in studies.items()},
        laws={variant: one.law for variant, one in studies.items()},
        parabolas={variant: one.parabolas for variant, one in studies.items()},
        costs={variant: one.cost_per_token for variant, one in studies.items()},
    )


def _listed(losses: dict[str, float]) -> str:
    return ", ".join(f"{name} {loss:.4f}" for name, loss in sorted(losses.items(), key=lambda item: item[1]))


def _rounded(value: Any) -> Any:
    """Floats to `SIGNIFICANT_DIGITS`, in nested values."""
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_rounded(part) for part in value]
    return float(f"{value:.{SIGNIFICANT_DIGITS}g}") if isinstance(value, float) else value


if __name__ == "__main__":
    run_job(GridJob, study)
