"""Whether the scaling study's numbers are what they say, by simulation: laws that are known, grids with noise, and what is found.

`coverage_*`: share of the 95 % intervals that hold the truth, of those that are given (a refusal gives none; `refused` is their share).
`regret_*`: by how much, in nats, the chosen size is worse at the final budget than the best of the grid's sizes, by three rules: ours, the
lowest measured loss at the largest budget, and the power law through the parabolas' vertices. `wrong_*`: how often another size was better
by more than 0.001 nats. The grids are 5 sizes x 4 budgets, the 12 cells of the shipped profiles, and 3 sizes x 4 budgets.

    python -m benchmarks.scaling_coverage --draws 300
"""

from collections.abc import Iterator

import numpy as np

from benchmarks.report import Measurement, arguments, show
from fvlm_core.scaling.choice import rank
from fvlm_core.scaling.fits import Grid, Law, NotIdentifiableError, fit_allocation, fit_law, fit_law_huber
from fvlm_core.scaling.intervals import allowed_squares
from fvlm_core.scaling.varpro import Held, Name

NAME = "scaling_coverage"
CHINCHILLA = Law(E=1.69, A=406.4, alpha=0.34, B=410.7, beta=0.28)
"""Hoffmann et al. 2022, approach 3."""
STEEP = Law(E=1.2, A=9e3, alpha=0.5, B=4e3, beta=0.4)
LAWS = {"chinchilla": CHINCHILLA, "steep": STEEP}
NUMBERS: tuple[Name, ...] = ("alpha", "beta", "E", "ratio")
BUDGETS = np.geomspace(1e18, 2.7e19, 4)
TARGET_FACTOR = 17.0
"""The final budget over the grid's largest."""
RELEVANT_NATS = 1e-3


def cells(kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Sizes and budgets of a grid's runs."""
    sizes = np.geomspace(3e7, 1e9, {"full": 5, "profile": 4, "three": 3}[kind])
    chosen = [(size, budget) for size in range(len(sizes)) for budget in range(4)]
    if kind == "profile":  # without the largest sizes at the smallest budgets and the smallest at the largest; seeds in two corners
        chosen = [cell for cell in chosen if cell not in {(3, 0), (3, 1), (2, 0), (0, 3)}] + [(0, 0), (0, 0), (3, 3), (3, 3)]
    return sizes[[size for size, _ in chosen]], BUDGETS[[budget for _, budget in chosen]]


def draw(law: Law, kind: str, noise: float, rng: np.random.Generator) -> Grid:
    """A grid of runs of C = 6 N D with a relative noise."""
    params, budget = cells(kind)
    tokens = budget / (6 * params)
    return Grid(params, tokens, law.loss(params, tokens) * np.exp(rng.normal(0, noise, len(params))), budget)


def coverage(law: Law, kind: str, noise: float, draws: int, seed: int = 0) -> tuple[dict[str, float], float]:
    """Share of the intervals that hold the truth, by number; share of the grids that were refused.

    An interval holds a value exactly where the best law with the value held is as good as is allowed, which takes one search, not two ends.
    """
    rng = np.random.default_rng(seed)
    hits: dict[str, list[bool]] = {name: [] for name in NUMBERS}
    refused = 0
    for _ in range(draws):
        grid = draw(law, kind, noise, rng)
        try:
            projection = fit_law(grid).projection
        except NotIdentifiableError:
            refused += 1
            continue
        assert projection is not None
        best = projection.best
        allowed = allowed_squares(best.squares, len(grid), Law.DEGREES)
        for name in NUMBERS:
            hits[name].append(projection.minimum((best.alpha, best.beta), Held(name, getattr(law, name))).squares <= allowed)
    return {name: float(np.mean(found)) for name, found in hits.items() if found}, refused / draws


def regrets(law: Law, kind: str, noise: float, draws: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Nats lost at the final budget by each rule, a number per grid."""
    rng = np.random.default_rng(seed)
    target = TARGET_FACTOR * BUDGETS[-1]
    sizes = np.unique(cells(kind)[0])
    truth = law.loss(sizes, target / (6 * sizes))
    lost: dict[str, list[float]] = {"ours": [], "measured": [], "parabola": []}
    for _ in range(draws):
        grid = draw(law, kind, noise, rng)
        measured = _measured(grid, sizes)
        try:
            ours = int(np.argmin(rank(grid, sizes, target / (6 * sizes)).losses))
        except NotIdentifiableError:
            ours = measured
        try:
            allocation = fit_allocation(grid)
            parabola = int(np.argmin(np.abs(np.log(sizes / (allocation.factor * target**allocation.exponent)))))
        except NotIdentifiableError:
            parabola = measured
        for name, picked in (("ours", ours), ("measured", measured), ("parabola", parabola)):
            lost[name].append(float(truth[picked] - truth.min()))
    return {name: np.array(values) for name, values in lost.items()}


def _measured(grid: Grid, sizes: np.ndarray) -> int:
    """The size with the lowest loss at the largest budget that has it."""
    here = grid.budget == BUDGETS[-1]
    losses = [grid.loss[here & (grid.params == size)].mean() if (here & (grid.params == size)).any() else np.inf for size in sizes]
    return int(np.argmin(losses))


def measure(draws: int) -> Iterator[Measurement]:
    """All of it; every case has draws of its own."""
    seed = 0
    for title, law in LAWS.items():
        for kind in ("full", "profile"):
            for noise in (0.002, 0.01):
                seed += 1
                found, refused = coverage(law, kind, noise, draws, seed)
                where = f"{title}, {kind}, noise {noise:.1%}"
                for name, share in found.items():
                    yield Measurement(NAME, f"coverage_{name}", share, "share", where)
                yield Measurement(NAME, "refused", refused, "share", where)
    for title, law in LAWS.items():
        for kind in ("full", "profile", "three"):
            for name, lost in regrets(law, kind, 0.003, draws // 3).items():
                where = f"{title}, {kind}, noise 0.3 %, final budget x{TARGET_FACTOR:.0f}"
                yield Measurement(NAME, f"regret_{name}", float(lost.mean()), "nats", where)
                yield Measurement(NAME, f"wrong_{name}", float((lost > RELEVANT_NATS).mean()), "share", where)
    exponents = _exponents(draws)
    for name, values in exponents.items():
        where = f"chinchilla, full, noise 0.3 %, truth {CHINCHILLA.ratio:.3f}"
        yield Measurement(NAME, f"exponent_bias_{name}", float(values.mean() - CHINCHILLA.ratio), "", where)


def _exponents(draws: int) -> dict[str, np.ndarray]:
    """The best size's exponent by the parabolas, by our law and by the Huber fit."""
    rng = np.random.default_rng(1)
    found: dict[str, list[float]] = {"parabola": [], "law": [], "huber": []}
    for _ in range(draws // 3):
        grid = draw(CHINCHILLA, "full", 0.003, rng)
        try:
            values = {"parabola": fit_allocation(grid).exponent, "law": fit_law(grid).ratio, "huber": fit_law_huber(grid).ratio}
        except NotIdentifiableError:
            continue
        for name, value in values.items():
            found[name].append(value)
    return {name: np.array(values) for name, values in found.items()}


if __name__ == "__main__":
    options = arguments(__doc__ or "", draws={"type": int, "default": 300, "help": "grids per case"})
    show(measure(options.draws), as_json=options.json)
