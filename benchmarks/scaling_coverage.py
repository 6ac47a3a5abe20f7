"""Validation of the scaling fits by simulation: known laws, noisy grids, and what the fits recover.

* `coverage_*`: the share of 95 % intervals that contain the true value. A refused fit gives no interval; `refused` is the share of those.
* `regret_*`: nats by which the chosen size is worse at the final budget than the best size of the grid. Three rules are compared: ours, the
  lowest measured loss at the largest budget, and the power law through the vertices of the parabolas.
* `wrong_*`: the share of draws in which another size was better by more than 0.001 nats.

The grids are 5 sizes x 4 budgets, the 12 cells of the shipped profiles, and 3 sizes x 4 budgets.

    python -m benchmarks.scaling_coverage --draws 300
"""

from collections.abc import Iterator

import numpy as np

from benchmarks.report import Measurement, arguments, show
from fvlm_core.scaling.choice import rank
from fvlm_core.scaling.fits import Grid, Law, NotIdentifiableError, fit_allocation, fit_law, fit_law_huber
from fvlm_core.scaling.intervals import allowed_squares
from fvlm_core.scaling.varpro import FixedParameter, Name

NAME = "scaling_coverage"
CHINCHILLA = Law(E=1.69, A=406.4, alpha=0.34, B=410.7, beta=0.28)
"""Hoffmann et al. 2022, approach 3."""
STEEP = Law(E=1.2, A=9e3, alpha=0.5, B=4e3, beta=0.4)
LAWS = {"chinchilla": CHINCHILLA, "steep": STEEP}
NUMBERS: tuple[Name, ...] = ("alpha", "beta", "E", "ratio")
BUDGETS = np.geomspace(1e18, 2.7e19, 4)
TARGET_FACTOR = 17.0
"""The final budget, as a multiple of the grid's largest."""
RELEVANT_NATS = 1e-3


def cells(kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the sizes and budgets of a grid's runs."""
    sizes = np.geomspace(3e7, 1e9, {"full": 5, "profile": 4, "three": 3}[kind])
    chosen = [(size, budget) for size in range(len(sizes)) for budget in range(4)]
    if kind == "profile":  # no large sizes at small budgets, no smallest size at the largest budget; more seeds in two corners
        chosen = [cell for cell in chosen if cell not in {(3, 0), (3, 1), (2, 0), (0, 3)}] + [(0, 0), (0, 0), (3, 3), (3, 3)]
    return sizes[[size for size, _ in chosen]], BUDGETS[[budget for _, budget in chosen]]


def draw(law: Law, kind: str, noise: float, rng: np.random.Generator) -> Grid:
    """Draw a grid of runs with C = 6 N D and relative noise."""
    params, budget = cells(kind)
    tokens = budget / (6 * params)
    return Grid(params, tokens, law.loss(params, tokens) * np.exp(rng.normal(0, noise, len(params))), budget)


def coverage(law: Law, kind: str, noise: float, draws: int, seed: int = 0) -> tuple[dict[str, float], float]:
    """Return the coverage of the intervals by parameter, and the share of grids that were refused.

    A profile interval contains a value exactly if the best fit with that value fixed stays within the allowed sum of squares. Testing that
    takes one search, instead of one for each end of the interval.
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
            hits[name].append(projection.minimum((best.alpha, best.beta), FixedParameter(name, getattr(law, name))).squares <= allowed)
    return {name: float(np.mean(found)) for name, found in hits.items() if found}, refused / draws


def regrets(law: Law, kind: str, noise: float, draws: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Return the regret of each rule at the final budget in nats, one value per grid."""
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
    """Return the index of the size with the lowest measured loss at the largest budget."""
    here = grid.budget == BUDGETS[-1]
    losses = [grid.loss[here & (grid.params == size)].mean() if (here & (grid.params == size)).any() else np.inf for size in sizes]
    return int(np.argmin(losses))


def measure(draws: int) -> Iterator[Measurement]:
    """Run all simulations."""
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
    """Return the exponent of the best size, by the parabolas, by our law and by the Huber fit."""
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
