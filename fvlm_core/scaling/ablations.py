"""The ablation table: every run against the baseline, one change each, nothing hidden.

`python -m fvlm_core.scaling.ablations job.yaml` writes the table as CSV and markdown, a plot of the sorted deltas, and names
the winner: the comparable run with the lowest validation loss, or the baseline where none is clearly better. Runs that
turned out worse stay in.
"""

import csv
import io
import json
import time

from pydantic import JsonValue, TypeAdapter

from fvlm_core.cli import run_job
from fvlm_core.config import SourceShares
from fvlm_core.errors import UserError
from fvlm_core.manifest import file_entries, write_atomically
from fvlm_core.progress import Progress
from fvlm_core.scaling.jobs import ABLATIONS_PLOT, ABLATIONS_TABLE, ABLATIONS_TEXT, AblationJob, AblationReport, AblationRow, AblationRun
from fvlm_core.scaling.plots import plot_deltas
from fvlm_core.scaling.runs import FinishedRun, differences, same_shards


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
    write_atomically(job.output / ABLATIONS_TABLE, table_csv(rows).encode())
    write_atomically(job.output / ABLATIONS_TEXT, table_markdown(rows, baseline.name, winner.name).encode())
    plot_deltas(job.output / ABLATIONS_PLOT, rows, baseline)
    return AblationReport(
        name="ablations",
        settings_hash=job.hash(exclude={"output"}),
        inputs={name: run.manifest.digest for name, run in finished.items()},
        counts={"runs": len(rows)},
        files=file_entries(job.output, [ABLATIONS_TABLE, ABLATIONS_PLOT]) + file_entries(job.output, [ABLATIONS_TEXT], identity=False),
        seconds=time.monotonic() - started,
        baseline=baseline.name,
        rows=rows,
        winner=winner.name,
        winner_change=winner.change,
        winner_value=winner.value,
    ).write(job.output)


def table_csv(rows: list[AblationRow]) -> str:
    """The table without timings: equal runs give equal bytes."""
    passes = list(dict.fromkeys(name for row in rows for name in row.losses))
    columns = ["name", "change", "value", "loss", "delta", *(f"loss_{name}" for name in passes)]
    columns += ["params", "flops", "samples", "control", "other_validation", "also_changed", "divergences"]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        values = row.model_dump(include=set(columns)) | {f"loss_{name}": loss for name, loss in row.losses.items()}
        writer.writerow(values | {"value": show_value(row.value), "also_changed": " ".join(row.also_changed)})
    return text.getvalue()


def table_markdown(rows: list[AblationRow], baseline: str, winner: str) -> str:
    """The table for reading, best run first."""
    passes = list(dict.fromkeys(name for row in rows for name in row.losses))
    head = ["run", "change", "val loss", "delta", *passes, "frames/s", "params", "FLOPs"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in sorted(rows, key=lambda row: row.loss):
        marks = ("*" if row.control else "") + ("†" if row.other_validation else "")
        cells = [
            f"**{row.name}**" if row.name == winner else row.name,
            change_text(row, baseline),
            f"{row.loss:.4f}",
            "" if row.name == baseline else f"{row.delta:+.4f}{marks}",
            *(f"{row.losses[name]:.4f}" if name in row.losses else "" for name in passes),
            "" if row.frames_per_s is None else f"{row.frames_per_s:.1f}",
            f"{row.params:,}",
            f"{row.flops:.2e}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    notes = ["", f"Winner: **{winner}**. Losses are in nats per labelled token; one run and one seed per change."]
    if any(row.control for row in rows):
        notes.append("\\* a control: compared, never adopted.")
    if any(row.other_validation for row in rows):
        notes.append("† the change alters the validation set too, so its delta is not a like-for-like comparison and cannot win.")
    return "\n".join([*lines, *notes, ""])


def change_text(row: AblationRow, baseline: str) -> str:
    """E.g. `optimizer.lr_llm = 0.0`."""
    return "baseline" if row.name == baseline else f"{row.change} = {show_value(row.value)}"


def show_value(value: JsonValue) -> str:
    """A setting's value as a person would write it; a mixture as its shares."""
    if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
        shares = TypeAdapter(SourceShares).validate_python(value)
        return ", ".join(f"{part.source} {part.share:.0%}" for part in shares)
    return value if isinstance(value, str) else "" if value is None else json.dumps(value)


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
