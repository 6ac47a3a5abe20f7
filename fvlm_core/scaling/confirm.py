"""Confirm the winner of the ablations: train it and the baseline again with new seeds.

The best of many runs looks better than it is on the seeds that selected it (winner's curse), so a change is adopted only if new seeds
confirm the gain. `python -m fvlm_core.scaling.confirm job.yaml` trains the runs one after the other, each resumable. If the baseline won,
nothing is trained.
"""

import json
import time
from statistics import mean

from scipy.stats import t

from fvlm_core.cli import run_job
from fvlm_core.manifest import file_entries, write_atomically
from fvlm_core.progress import Progress
from fvlm_core.scaling.intervals import CONFIDENCE
from fvlm_core.scaling.jobs import AblationReport, Confirmation, ConfirmJob
from fvlm_core.train.__main__ import train
from fvlm_core.train.jobs import RunManifest

RUNS, LOSSES_FILE = "runs", "losses.json"
"""In the job's output folder: the folder of the runs, and the file of their losses by name and seed."""


def confirm(job: ConfirmJob) -> Confirmation:
    """Train the runs that are not finished yet, and compare winner and baseline."""
    started = time.monotonic()
    report = AblationReport.read(job.report)
    winner, progress = report.winner, Progress(job.output, max(1, 2 * len(job.seeds)))
    losses: dict[str, dict[int, float | None]] = {}
    if winner != report.baseline:
        for number, seed in enumerate(job.seeds):
            for place, name in enumerate((report.baseline, winner)):
                progress.update(2 * number + place, note=f"{name}, seed {seed}")
                losses.setdefault(name, {})[seed] = _loss(job, name, seed)
    won, base = losses.get(winner, {}), losses.get(report.baseline, {})
    pairs = [(ours, theirs) for ours, theirs in zip(won.values(), base.values(), strict=True) if ours is not None and theirs is not None]
    values = {} if not pairs or None in won.values() else _verdict(pairs, report, job.min_gain)
    write_atomically(job.output / LOSSES_FILE, json.dumps(losses, sort_keys=True).encode())
    progress.update(progress.total, note="done")
    return Confirmation(
        name="confirmation",
        settings_hash=job.hash(exclude={"output", "report"}),
        inputs={"report": report.digest},
        counts={"runs": len(won) + len(base)},
        files=file_entries(job.output, [LOSSES_FILE]),
        winner=winner,
        losses=losses,
        seconds=time.monotonic() - started,
        **values,
    ).write(job.output)


def _loss(job: ConfirmJob, name: str, seed: int) -> float | None:
    """Train one run and return its final loss; None if it diverged."""
    recipe = job.recipes[name]
    changes = {"name": f"confirm-{name}-seed{seed}", "output": str(job.output / RUNS / f"{name}-seed{seed}"), "run.seed": seed}
    manifest: RunManifest = train(recipe.with_changes(changes))
    return None if manifest.divergences else manifest.final_loss


def _verdict(pairs: list[tuple[float, float]], report: AblationReport, min_gain: float) -> dict:
    """The mean difference and its interval. The noise estimate is the comparison's, which is based on more runs."""
    delta, noise = mean(ours - theirs for ours, theirs in pairs), report.noise.value
    if noise is None or not report.noise_degrees:
        return {"delta": delta, "confirmed": False}
    half = float(t.ppf(1 - (1 - CONFIDENCE) / 2, report.noise_degrees)) * noise * (2 / len(pairs)) ** 0.5
    enough = delta < -min_gain * mean(theirs for _, theirs in pairs)
    return {"delta": delta, "low": delta - half, "high": delta + half, "confirmed": delta + half < 0 and enough}


if __name__ == "__main__":
    run_job(ConfirmJob, confirm)
