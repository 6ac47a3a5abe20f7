"""Tables that describe a plan: a run's sources, its epochs, and the balance of load across ranks. Reads only the index."""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from fvlm_core.data.mixture import BLOCK_SAMPLES
from fvlm_core.data.plan import Plan
from fvlm_core.tables import Table


@dataclass(frozen=True)
class Load:
    """How full the micro-batches of some steps are."""

    micro_batches: list[int]
    """Micro-batches of each rank, per step."""
    frames: np.ndarray
    """Frames in each micro-batch."""
    tokens: np.ndarray
    """Tokens in each micro-batch."""
    spread: np.ndarray
    """Per step: the cost of the most expensive rank divided by that of the cheapest, minus 1. A rank's cost is the sum of its frames and
    tokens, each as a share of the micro-batch budget."""


def load(plan: Plan, steps: range) -> Load:
    """Return the load of all ranks in these steps."""
    budget = plan.run.micro_batch
    counts, sums, spread = [], [], []
    for step in steps:
        ranks = plan.micro_batches(step)
        counts.append(len(ranks[0]))
        costs = np.array([[plan.mixed.costs(slots).sum(0) for slots in micro_batches] for micro_batches in ranks])
        sums.append(costs.reshape(-1, 2))
        by_rank = (costs / (budget.frames, budget.tokens)).sum((1, 2))
        spread.append(by_rank.max() / by_rank.min() - 1)
    frames, tokens = np.concatenate(sums).T
    return Load(counts, frames, tokens, np.array(spread))


def plan_tables(plan: Plan, *, steps: int, looked_at: int, shown: int) -> list[Table]:
    """Return three tables: the sources over `steps` steps, the load of the first `looked_at` steps, and the micro-batches of the first
    `shown` steps."""
    return [_sources(plan, steps), _load(plan, min(steps, looked_at)), _steps(plan, min(steps, shown))]


def _sources(plan: Plan, steps: int) -> Table:
    mixed, epochs = plan.mixed, plan.epochs(steps)
    shares = np.array(mixed.mixture.counts) / BLOCK_SAMPLES
    tokens = np.array([mixed.tokens[rows].mean() for rows in mixed.rows])
    frames = np.array([mixed.shards.n_frames[rows].mean() for rows in mixed.rows])
    samples = steps * plan.run.batch_samples
    rows = [
        [
            name,
            f"{shares[place]:.1%}",
            f"{shares[place] * tokens[place] / (shares @ tokens):.1%}",
            f"{shares[place] * frames[place] / max(shares @ frames, 1e-9):.1%}",
            f"{mixed.mixture.sizes[place]:,}",
            f"{round(samples * shares[place]):,}",
            f"{epochs[name]:.2f}",
        ]
        for place, name in enumerate(mixed.mixture.names)
    ]
    order = f"The question comes before the video in {mixed.data.question_first:.0%} of the samples with a video."
    return Table(
        title=f"{samples:,} samples in {steps:,} steps of {plan.run.batch_samples}",
        head=["source", "of samples", "of tokens", "of frames", "rows", "read", "epochs"],
        rows=rows,
        note=f"Shares are of {mixed.data.shares_of}, exact in every {BLOCK_SAMPLES} samples. {order}",
    )


def _load(plan: Plan, steps: int) -> Table:
    found, budget = load(plan, range(steps)), plan.run.micro_batch
    above = int(((found.frames > budget.frames) | (found.tokens > budget.tokens)).sum())
    rows = [
        ["micro-batches a rank and step", *_range(found.micro_batches, "")],
        [f"frames, of {budget.frames}", *_range(found.frames, "")],
        [f"tokens, of {budget.tokens}", *_range(found.tokens, "")],
        ["cost of the most expensive rank above the cheapest", *_range(found.spread * 100, "%")],
    ]
    return Table(
        title=f"Load of {plan.world_size} rank(s) in the first {steps} steps",
        head=["", "least", "mean", "most"],
        rows=rows,
        note=f"{above} micro-batches hold a single sample that exceeds a budget." if above else "",
    )


def _range(values: np.ndarray | list[int], unit: str) -> list[str]:
    return [f"{value:.4g}{unit}" for value in (np.min(values), np.mean(values), np.max(values))]


def _steps(plan: Plan, steps: int) -> Table:
    names, rows = plan.mixed.mixture.names, []
    for step in range(steps):
        for rank, micro_batches in enumerate(plan.micro_batches(step)):
            for number, slots in enumerate(micro_batches):
                frames, tokens = plan.mixed.costs(slots).sum(0)
                counts = Counter(names[slot.source] for slot in slots)
                held = ", ".join(f"{counts[name]} {name}" for name in names if counts[name])
                rows.append([f"{step + 1}", f"{rank}", f"{number + 1}", f"{frames:,}", f"{tokens:,}", held])
    return Table(title="The first steps", head=["step", "rank", "micro-batch", "frames", "tokens", "samples"], rows=rows)
