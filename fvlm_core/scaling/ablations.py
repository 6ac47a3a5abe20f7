"""The ablation table: every run against the baseline, one change each, nothing hidden.

`python -m fvlm_core.scaling.ablations job.yaml` writes the table as CSV and markdown, a plot of the sorted deltas, and names
the winner: the comparable run with the lowest validation loss, or the baseline where none is clearly better. Runs that
turned out worse stay in.
"""

import time

from fvlm_core.cli import run_job
from fvlm_core.errors import UserError
from fvlm_core.manifest import file_entries, write_atomically
from fvlm_core.progress import Progress
from fvlm_core.scaling.jobs import ABLATIONS_PLOT, ABLATIONS_TABLE, ABLATIONS_TEXT, AblationJob, AblationReport, AblationRow, AblationRun
from fvlm_core.scaling.plots import plot_deltas
from fvlm_core.scaling.runs import FinishedRun, differences, same_shards
from fvlm_core.scaling.tables import ablations_csv, ablations_text


def compare(job: AblationJob) -> AblationReport:
    """Compare the runs. Raises UserError for a missing baseline or run, a name given twice, or runs that cannot be compared."""
    started = time.monotonic()
    names = [run.name for run in job.runs]
    if len(set(names)) < len(names) or job.baseline not in names:
        raise UserError(
            f"the baseline {job.baseline!r} must be one of the runs, and every name must appear once: {', '.join(names)}",
            where="runs",
            fix="correct the names",
        )
    progress = Progress(job.output, len(job.runs))
    finished: dict[str, FinishedRun] = {}
    for number, run in enumerate(job.runs):
        finished[run.name] = FinishedRun.read(run.run)
        progress.update(number + 1, note=run.name)
    same_shards(finished)
    rows = [_row(run, finished[run.name], finished[job.baseline]) for run in job.runs]
    baseline = next(row for row in rows if row.name == job.baseline)
    better = [row for row in rows if row.can_win and row.loss < baseline.loss * (1 - job.min_gain)]
    winner = min(better, key=lambda row: row.loss, default=baseline)
    write_atomically(job.output / ABLATIONS_TABLE, ablations_csv(rows).encode())
    write_atomically(job.output / ABLATIONS_TEXT, ablations_text(rows, baseline.name, winner.name).encode())
    plot_deltas(job.output / ABLATIONS_PLOT, rows, baseline)
    return AblationReport(
        name="ablations",
        settings_hash=job.hash(exclude={"output"}),
        inputs={name: run.manifest.digest for name, run in finished.items()},
        counts={"runs": len(rows)},
        files=file_entries(job.output, [ABLATIONS_TABLE]) + file_entries(job.output, [ABLATIONS_TEXT, ABLATIONS_PLOT], identity=False),
        seconds=time.monotonic() - started,
        baseline=baseline.name,
        rows=rows,
        winner=winner.name,
        winner_change=winner.change,
        winner_value=winner.value,
    ).write(job.output)


def _row(run: AblationRun, finished: FinishedRun, baseline: FinishedRun) -> AblationRow:
    manifest = finished.manifest
    changed = differences(finished, baseline)
    return AblationRow(
        name=run.name,
        change=run.change,
        value=run.value,
        loss=manifest.final_loss,
        delta=manifest.final_loss - baseline.manifest.final_loss,
        losses=manifest.losses,
        params=manifest.params,
        flops=manifest.flops,
        samples=manifest.samples_seen,
        frames_per_s=finished.frames_per_s(),
        seconds=manifest.seconds,
        control=run.control,
        other_validation=finished.validated_on != baseline.validated_on,
        also_changed=[path for path in changed if path != run.change and not path.startswith(f"{run.change}.")] if run.change else changed,
        divergences=len(manifest.divergences),
    )


if __name__ == "__main__":
    run_job(AblationJob, compare)
