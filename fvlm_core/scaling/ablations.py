"""The ablation table: every run compared with the baseline, with one change each, including runs that turned out worse or diverged.

`python -m fvlm_core.scaling.ablations job.yaml` writes the table as CSV and markdown, and a plot of the sorted differences. Each run is
classified as better, worse, or not distinguishable from noise (`comparison`). The winner is the comparable run with the largest
improvement, or the baseline if no run is better. The table also has the outcomes of `fvlm_core.scaling.outcomes`, with the same statistics.
"""

import time
from collections import defaultdict
from dataclasses import asdict
from statistics import mean

import numpy as np

from fvlm_core.cli import run_job
from fvlm_core.errors import UserError
from fvlm_core.manifest import file_entries, write_atomically
from fvlm_core.progress import Progress
from fvlm_core.scaling.comparison import Comparison, Difference, compare_losses
from fvlm_core.scaling.jobs import (
    ABLATIONS_PLOT,
    ABLATIONS_TABLE,
    ABLATIONS_TEXT,
    AblationJob,
    AblationReport,
    AblationRow,
    AblationRun,
    Outcome,
    Verdict,
)
from fvlm_core.scaling.plots import plot_deltas
from fvlm_core.scaling.runs import FinishedRun, differences, metrics_rows, same_shards
from fvlm_core.scaling.tables import ablations_csv, ablations_text

SIGNIFICANCE = 0.05
Runs = dict[int, FinishedRun]
"""Finished runs by seed."""


def compare(job: AblationJob) -> AblationReport:
    """Compare the runs. Raises UserError for a missing baseline or run, a duplicate run, or runs that cannot be compared."""
    started = time.monotonic()
    names = [(run.name, run.seed) for run in job.runs]
    if len(set(names)) < len(names) or job.baseline not in {name for name, _ in names}:
        raise UserError(
            f"the baseline {job.baseline!r} must be one of the runs, and every name must appear once with a seed: "
            + ", ".join(dict.fromkeys(name for name, _ in names)),
            where="runs",
            fix="correct the names",
        )
    progress = Progress(job.output, len(job.runs))
    finished: dict[str, Runs] = defaultdict(dict)
    for number, run in enumerate(job.runs):
        finished[run.name][run.seed] = FinishedRun.read(run.run)
        progress.update(number + 1, note=run.name)
    same_shards({f"{name} (seed {seed})" if seed else name: run for name, runs in finished.items() for seed, run in runs.items()})
    if not _healthy(finished[job.baseline]):
        fix = "train it with a lower learning rate: there is nothing to compare with"
        raise UserError(f"the baseline {job.baseline!r} diverged with every seed", where="runs", fix=fix)
    # exclude runs that diverged: their loss is that of the last good checkpoint, and would inflate the noise estimate
    losses = {name: {seed: run.manifest.final_loss for seed, run in _healthy(runs).items()} for name, runs in finished.items()}
    comparison = compare_losses({name: by_seed for name, by_seed in losses.items() if by_seed}, job.baseline)
    first = {run.name: run for run in reversed(job.runs)}
    outcomes, questions = _outcomes(job, finished, progress)
    rows = [
        _row(first[name], runs, finished[job.baseline], comparison, job).model_copy(update=outcomes.get(name, {}))
        for name, runs in finished.items()
    ]
    baseline = next(row for row in rows if row.name == job.baseline)
    better = [row for row in rows if row.can_win and row.verdict == "better" and row.delta < -baseline.loss * job.min_gain]
    winner = min(better, key=lambda row: row.delta, default=baseline)
    report = AblationReport(
        name="ablations",
        settings_hash=job.hash(exclude={"output"}),
        inputs={f"{name}-{seed}": run.manifest.digest for name, runs in finished.items() for seed, run in runs.items()},
        counts={"runs": len(job.runs), "comparisons": len(rows) - 1},
        baseline=baseline.name,
        rows=rows,
        method=comparison.method,
        noise=comparison.noise,
        noise_degrees=comparison.degrees,
        questions=questions,
        winner=winner.name,
        winner_change=winner.change,
        winner_value=winner.value,
    )
    write_atomically(job.output / ABLATIONS_TABLE, ablations_csv(rows).encode())
    write_atomically(job.output / ABLATIONS_TEXT, ablations_text(report).encode())
    plot_deltas(job.output / ABLATIONS_PLOT, rows, baseline)
    files = file_entries(job.output, [ABLATIONS_TABLE]) + file_entries(job.output, [ABLATIONS_TEXT, ABLATIONS_PLOT], identity=False)
    return report.model_copy(update={"files": files, "seconds": time.monotonic() - started}).write(job.output)


def _outcomes(job: AblationJob, finished: dict[str, Runs], progress: Progress) -> tuple[dict[str, dict[str, Outcome]], int]:
    """The outcomes by run name and outcome name, and the number of questions."""
    if job.shards is None:
        return {}, 0
    from fvlm_core.scaling.outcomes import Questions  # needs torch

    questions = Questions(job.shards, job.questions)
    measured: dict[str, dict[str, dict[int, float]]] = {}
    for name, runs in finished.items():
        for seed, run in _healthy(runs).items():
            progress.say(f"questions to {name}, seed {seed}")
            for outcome, value in asdict(questions.outcomes(run.folder)).items():
                if value is not None:
                    measured.setdefault(outcome, {}).setdefault(name, {})[seed] = value
    found: dict[str, dict[str, Outcome]] = defaultdict(dict)
    for outcome, values in measured.items():
        differences = compare_losses(values, job.baseline).differences if job.baseline in values else {}
        for name, by_seed in values.items():
            one = differences.get(name)
            limits = {} if one is None else {"delta": one.delta, "low": one.low, "high": one.high}
            found[name][outcome] = Outcome(value=mean(by_seed.values()), **limits)
    return found, len(questions.asked)


def _row(run: AblationRun, runs: Runs, baseline: Runs, comparison: Comparison, job: AblationJob) -> AblationRow:
    shared = sorted(runs.keys() & baseline.keys()) or [min(runs)]
    one, other = runs[shared[0]], baseline.get(shared[0], next(iter(baseline.values())))
    changed = differences(one, other)
    good, reference_runs = _healthy(runs) or runs, _healthy(baseline)
    manifests = [found.manifest for found in good.values()]
    reference = mean(found.manifest.final_loss for found in reference_runs.values())
    loss = mean(m.final_loss for m in manifests)
    difference = comparison.differences.get(run.name, Difference(loss - reference if run.name != job.baseline else 0.0))
    passes = {name: mean(m.losses[name] for m in manifests) for name in manifests[0].losses}
    ordered = list(passes.values())
    row = AblationRow(
        name=run.name,
        hypothesis=run.hypothesis,
        change=run.change,
        value=run.value,
        seeds=len(runs),
        loss=loss,
        by_seed={seed: found.manifest.final_loss for seed, found in sorted(runs.items())},
        delta=difference.delta,
        low=difference.low,
        high=difference.high,
        p_value=difference.p_value,
        threshold=difference.threshold,
        verdict="baseline",
        delta_equal_flops=_at_equal_flops(good, reference_runs) if run.name != job.baseline else None,
        losses=passes,
        mode_gain=passes["coarse"] - ordered[-1] if "coarse" in passes and len(ordered) > 1 else None,
        drift=ordered[-1] - ordered[-2] if len(ordered) > 1 else None,
        params=manifests[0].params,
        flops=mean(m.flops for m in manifests),
        samples=manifests[0].samples_seen,
        frames_per_s=one.frames_per_s(),
        seconds=mean(m.seconds for m in manifests),
        control=run.control,
        other_validation=one.validated_on != other.validated_on,
        also_changed=[path for path in changed if path != run.change and not path.startswith(f"{run.change}.")] if run.change else changed,
        divergences=sum(len(found.manifest.divergences) for found in runs.values()),
    )
    return row if run.name == job.baseline else row.model_copy(update={"verdict": _verdict(row, reference, job.relevance)})


def _healthy(runs: Runs) -> Runs:
    """The runs that did not diverge."""
    return {seed: run for seed, run in runs.items() if not run.manifest.divergences}


def _verdict(row: AblationRow, reference: float, relevance: float) -> Verdict:
    if row.divergences:
        return "diverged"
    if row.other_validation:
        return "other validation"
    if row.p_value is None:
        return "no verdict"
    if row.p_value >= SIGNIFICANCE or abs(row.delta) < relevance * reference:
        return "no evidence"
    return "better" if row.delta < 0 else "worse"


def _at_equal_flops(runs: Runs, baseline: Runs) -> float | None:
    """Mean loss difference over pairs of equal seeds at the FLOPs of the cheaper run; validation curves are interpolated in log FLOPs.

    None if a curve is missing or does not reach those FLOPs.
    """
    found = []
    for seed in runs.keys() & baseline.keys():
        curves = [
            [(float(row["flops"]), float(row["val_loss"])) for row in metrics_rows(run.folder) if row.get("flops") and row.get("val_loss")]
            for run in (runs[seed], baseline[seed])
        ]
        if not all(curves):
            return None
        spent = min(curve[-1][0] for curve in curves)
        if any(curve[0][0] > spent for curve in curves):
            return None
        ours, theirs = (np.interp(np.log(spent), *np.array([(np.log(flops), loss) for flops, loss in curve]).T) for curve in curves)
        found.append(float(ours - theirs))
    return mean(found) if found else None


if __name__ == "__main__":
    run_job(AblationJob, compare)
