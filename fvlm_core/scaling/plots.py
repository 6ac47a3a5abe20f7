"""Plots of run comparisons and of the scaling study. Identical inputs give identical files; losses are in nats per labelled token."""

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np
from matplotlib.axes import Axes

from fvlm_core.canvas import COLOURS, WIDTH, canvas
from fvlm_core.scaling.fits import Allocation, DataLaw, Law, NotIdentifiableError, Parabola
from fvlm_core.scaling.jobs import PLOTS, VARIANTS, AblationRow, GridPoint, Variant
from fvlm_core.scaling.study import Study
from fvlm_core.scaling.tables import marked_name
from fvlm_core.tables import signed

BETTER, WORSE, NEUTRAL = "#2a9d6f", "#d1495b", "#8d99a6"
LINES: dict[Variant, str] = {"foveated": "-", "baseline": "--"}
MARKERS: dict[Variant, str] = {"foveated": "o", "baseline": "s"}
Item = TypeVar("Item")
LOSS = "validation loss (nats/token)"


def plot_deltas(path: Path, rows: Sequence[AblationRow], baseline: AblationRow) -> None:
    """Plot the differences to the baseline, best first, including runs that are worse."""
    ordered = sorted((row for row in rows if row.name != baseline.name), key=lambda row: row.delta, reverse=True)
    with _figure(path, (WIDTH, 1.2 + 0.36 * len(ordered))) as axes:
        deltas = [row.delta for row in ordered]
        colours = [{"better": BETTER, "worse": WORSE}.get(row.verdict, NEUTRAL) for row in ordered]
        axes.barh(range(len(ordered)), deltas, color=colours, height=0.66)
        for place, row in enumerate(ordered):
            if row.low is not None and row.high is not None:
                axes.plot([row.low, row.high], [place, place], color="#30363d", linewidth=1)
        axes.set_yticks(range(len(ordered)), [marked_name(row) for row in ordered])
        axes.axvline(0, color="#30363d", linewidth=1)
        reach = max(map(abs, (*deltas, *(end for row in ordered for end in (row.low, row.high) if end is not None))), default=0) or 1.0
        for place, delta in enumerate(deltas):
            ends = [end for end in (delta, ordered[place].low, ordered[place].high) if end is not None]
            beside = (max(ends) if delta >= 0 else min(ends)) + np.copysign(0.015 * reach, delta)
            axes.text(beside, place, signed(delta), va="center", ha="left" if delta >= 0 else "right", fontsize=9)
        drawn = [0.0, *deltas, *(end for row in ordered for end in (row.low, row.high) if end is not None)]
        low, high = min(drawn), max(drawn)
        axes.set_xlim(low - (0.3 * reach if low < 0 else 0.05 * reach), high + (0.3 * reach if high > 0 else 0.05 * reach))
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(f"difference in validation loss to {baseline.name} ({baseline.loss:.4f} nats/token); left is better")
        title = "grey: neither better nor worse; lines: 95 % intervals; *: control; †: another validation set"
        axes.set_title(title, fontsize=9, loc="right", color="#5b6770")


def plot_grid(output: Path, points: Sequence[GridPoint], studies: dict[Variant, Study], crossing: float | None) -> None:
    """Draw the five plots of a grid (`PLOTS`), each as PNG and SVG."""
    iso_flop, crossover, efficiency, data, allocation = (output / name for name in PLOTS)
    plot_iso_flop(iso_flop, points, {variant: one.parabolas for variant, one in studies.items()})
    plot_crossover(crossover, points, {variant: one.best for variant, one in studies.items()}, crossing)
    plot_token_efficiency(efficiency, points, {variant: one.frontier for variant, one in studies.items()})
    plot_data_scaling(data, points, {variant: one.data_law for variant, one in studies.items()})
    plot_allocation(
        allocation,
        points,
        allocations={variant: one.allocation for variant, one in studies.items()},
        laws={variant: one.law for variant, one in studies.items()},
        parabolas={variant: one.parabolas for variant, one in studies.items()},
        costs={variant: one.cost_per_token for variant, one in studies.items()},
    )


def plot_iso_flop(path: Path, points: Sequence[GridPoint], parabolas: dict[Variant, list[Parabola]]) -> None:
    """Plot loss over size, with one curve per budget; a star marks a budget's best size if it lies inside the grid."""
    with _panels(path) as panels:
        for axes, variant in zip(panels, VARIANTS, strict=True):
            budgets = sorted({point.budget_flops for point in points if point.variant == variant})
            curves = {parabola.budget: parabola for parabola in parabolas.get(variant, [])}
            for colour, budget in _coloured(budgets):
                here = sorted(_of(points, variant, budget=budget), key=lambda point: point.params)
                sizes = np.array([point.params for point in here])
                axes.plot(sizes, [point.loss for point in here], MARKERS[variant], color=colour, label=f"{budget:.1e} FLOPs")
                if (curve := curves.get(budget)) is not None:
                    dense = np.geomspace(sizes.min(), sizes.max(), 100)
                    axes.plot(dense, curve.loss(dense), color=colour, linewidth=1.2)
                    _star(axes, curve, colour)
                else:
                    axes.plot(sizes, [point.loss for point in here], color=colour, linewidth=1, alpha=0.6)
            _finish(axes, variant, "parameters", LOSS)
            ticks = sorted({point.params for point in _of(points, variant)})
            axes.set_xticks(ticks, [_short(n) for n in ticks])
            axes.minorticks_off()


def plot_crossover(path: Path, points: Sequence[GridPoint], best: dict[Variant, dict[float, float]], crossing: float | None) -> None:
    """Plot the best loss of each budget (left), and foveated minus baseline per size and for the best size (right)."""
    with _panels(path) as (left, right):
        for colour, variant in zip(COLOURS, VARIANTS, strict=False):
            if variant not in best:
                continue
            budgets = sorted(best[variant])
            losses = [best[variant][budget] for budget in budgets]
            left.plot(budgets, losses, LINES[variant] + MARKERS[variant], color=colour, label=f"{variant}, best size")
        ours, theirs = (best.get(variant, {}) for variant in VARIANTS)
        shared = sorted(ours.keys() & theirs.keys())
        if shared:  # a wide line in the background: it coincides with a size's line if that size is best in both variants
            right.plot(shared, [ours[c] - theirs[c] for c in shared], color="black", linewidth=7, alpha=0.25, label="best of each")
            right.axhline(0, color="#30363d", linewidth=1)
        sizes = _sizes(points)
        for colour, size in _coloured(sizes):
            if not (pairs := _pairs(points, size)):
                continue
            right.plot([p[0] for p in pairs], [p[1] for p in pairs], "o-", color=colour, linewidth=1, alpha=0.75, label=size)
        for axes in (left, right):
            if crossing is not None:
                axes.axvline(crossing, color=WORSE, linestyle=":", label=f"crossover {crossing:.1e}")
        _finish(left, "best loss per budget", "training FLOPs", LOSS)
        _finish(right, "foveated minus baseline (below 0: foveated better)", "training FLOPs", "difference (nats/token)")


def plot_token_efficiency(path: Path, points: Sequence[GridPoint], frontiers: dict[Variant, list[GridPoint]]) -> None:
    """Plot loss over the visual tokens that the language model read in training, with the Pareto frontier of each variant."""
    with _figure(path, (WIDTH, 4.6)) as axes:
        for colour, variant in zip(COLOURS, VARIANTS, strict=False):
            here = [point for point in _of(points, variant) if point.visual_tokens]  # points from a user's table have none
            if not here:
                continue
            tokens = sorted({point.tokens_per_frame for point in here})
            label = f"{variant}, {'/'.join(map(str, tokens))} token{'s' if tokens != [1] else ''} per frame"
            axes.plot([p.visual_tokens for p in here], [p.loss for p in here], MARKERS[variant], color=colour, alpha=0.45, label=label)
            front = [point for point in frontiers.get(variant, []) if point.visual_tokens]
            axes.plot([p.visual_tokens for p in front], [p.loss for p in front], LINES[variant], color=colour, linewidth=2)
        _finish(axes, "token-efficiency frontier", "visual tokens read in training", LOSS)


def plot_data_scaling(path: Path, points: Sequence[GridPoint], laws: dict[Variant, DataLaw | None]) -> None:
    """Plot loss over data, with one curve per size: the fitted law, or the measured losses if there is no fit."""
    with _panels(path) as panels:
        for axes, variant in zip(panels, VARIANTS, strict=True):
            for colour, size in _coloured(_sizes(points)):
                here = sorted((point for point in _of(points, variant) if point.size == size), key=lambda point: point.tokens)
                if not here:
                    continue
                tokens = np.array([point.tokens for point in here])
                axes.plot(tokens, [point.loss for point in here], MARKERS[variant], color=colour, label=size)
                if (law := laws.get(variant)) is not None:
                    dense = np.geomspace(tokens.min(), tokens.max(), 100)
                    axes.plot(dense, law.loss(np.full(100, float(here[0].params)), dense), color=colour, linewidth=1.2)
                else:
                    axes.plot(tokens, [point.loss for point in here], color=colour, linewidth=1, alpha=0.6)
            _finish(axes, variant, "labelled tokens", LOSS)


def plot_allocation(
    path: Path,
    points: Sequence[GridPoint],
    *,
    allocations: dict[Variant, Allocation | None],
    laws: dict[Variant, Law | None],
    parabolas: dict[Variant, list[Parabola]],
    costs: dict[Variant, np.ndarray],
) -> None:
    """Plot the best size over the budget: measured (lowest loss), from parabolas, and from the joint law if there is one.

    `costs` holds, per variant, the polynomial coefficients of log(FLOPs per labelled token) over log N, for the law.
    """
    with _panels(path) as panels:
        for axes, variant in zip(panels, VARIANTS, strict=True):
            here = _of(points, variant)
            if not here:
                _finish(axes, variant, "training FLOPs", "parameters")
                continue
            budgets = sorted({point.budget_flops for point in here})
            measured = [_best_params(_of(here, variant, budget=budget)) for budget in budgets]
            axes.step(budgets, measured, "o-", where="mid", color=NEUTRAL, label="lowest measured loss")
            stars = [(parabola.budget, optimum) for parabola in parabolas[variant] if (optimum := _optimum(parabola)) is not None]
            if stars:
                axes.plot(*zip(*stars, strict=True), "*", color=COLOURS[1], markersize=13, label="parabola's vertex")
            dense = np.geomspace(budgets[0], budgets[-1], 60)
            if (allocation := allocations[variant]) is not None:
                line = allocation.factor * dense**allocation.exponent
                axes.plot(dense, line, color=COLOURS[1], label=f"$N^* \\propto C^{{{allocation.exponent:.2f}}}$")
            if (law := laws[variant]) is not None:
                sizes = np.geomspace(min(p.params for p in here), max(p.params for p in here), 400)
                per_token = np.exp(np.polyval(costs[variant], np.log(sizes)))
                best = [sizes[np.argmin(law.loss(sizes, budget / per_token))] for budget in dense]
                axes.plot(dense, best, "--", color=COLOURS[0], label="joint law")
            axes.set_yscale("log")
            _finish(axes, variant, "training FLOPs", "parameters")
            ticks = sorted({point.params for point in here})
            axes.set_yticks(ticks, [_short(n) for n in ticks])
            axes.set_ylim(ticks[0] / 1.3, ticks[-1] * 1.3)
            axes.yaxis.minorticks_off()


@contextmanager
def _figure(path: Path, size: tuple[float, float]) -> Generator[Axes]:
    with canvas(path, size, vector=True) as figure:
        yield figure.add_subplot()


@contextmanager
def _panels(path: Path) -> Generator[tuple[Axes, Axes]]:
    with canvas(path, (WIDTH, 4.3), vector=True) as figure:
        left, right = figure.subplots(1, 2)
        yield left, right


def _finish(axes: Axes, title: str, x: str, y: str) -> None:
    """Set titles, a logarithmic x axis and a legend; or print `no runs` if the axes are empty."""
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if not axes.has_data():
        axes.text(0.5, 0.5, "no runs", transform=axes.transAxes, ha="center", va="center", color="#5b6770")
        return
    axes.set_xscale("log")
    if axes.get_legend_handles_labels()[0]:
        axes.legend()


def _star(axes: Axes, curve: Parabola, colour: str) -> None:
    if (best := _optimum(curve)) is not None:
        axes.plot([best], curve.loss(np.array([best])), "*", color=colour, markersize=14, markeredgecolor="white")


def _optimum(curve: Parabola) -> float | None:
    try:
        return curve.optimum()
    except NotIdentifiableError:
        return None


def _of(points: Sequence[GridPoint], variant: Variant, *, budget: float | None = None) -> list[GridPoint]:
    return [point for point in points if point.variant == variant and budget in (None, point.budget_flops)]


def _sizes(points: Sequence[GridPoint]) -> list[str]:
    """Names of the sizes, smallest first."""
    return list(dict.fromkeys(point.size for point in sorted(points, key=lambda point: point.params)))


def _pairs(points: Sequence[GridPoint], size: str) -> list[tuple[float, float]]:
    """Pairs (budget, loss of foveated minus loss of baseline) of one size."""
    own = [point for point in points if point.size == size]
    budgets = sorted({point.budget_flops for point in own})
    found = [(budget, *(_of(own, variant, budget=budget) for variant in ("foveated", "baseline"))) for budget in budgets]
    return [(budget, _mean_loss(ours) - _mean_loss(theirs)) for budget, ours, theirs in found if ours and theirs]


def _best_params(points: Sequence[GridPoint]) -> int:
    """Number of parameters of the size with the lowest mean loss over seeds."""
    sizes = {point.params for point in points}
    return min(sizes, key=lambda params: _mean_loss([point for point in points if point.params == params]))


def _mean_loss(points: Sequence[GridPoint]) -> float:
    return sum(point.loss for point in points) / len(points)


def _coloured(items: Sequence[Item]) -> Iterator[tuple[str, Item]]:
    for number, item in enumerate(items):
        yield COLOURS[number % len(COLOURS)], item


def _short(count: float) -> str:
    """Format a number with a unit suffix, e.g. 1.4M."""
    for unit, scale in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g}{unit}"
    return f"{count:.0f}"
