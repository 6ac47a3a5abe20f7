"""The scaling study: `python -m fvlm_core.scaling.grid job.yaml` fits laws to the finished runs of a grid, plots them and chooses a size.

The grid is sizes x budgets x variants. The fits are in `study`, the schema of `fits.json` in `results`.
"""

import hashlib
import time
from typing import Any

from fvlm_core.cli import run_job
from fvlm_core.errors import UserError
from fvlm_core.manifest import file_entries, write_atomically
from fvlm_core.progress import Progress
from fvlm_core.scaling.choice import choose
from fvlm_core.scaling.jobs import (
    FITS_FILE,
    PLOTS,
    POINTS_FILE,
    SCALING_TEXT,
    VARIANTS,
    VECTOR_PLOTS,
    GridJob,
    GridPoint,
    GridRun,
    ScalingReport,
    Variant,
    Weights,
)
from fvlm_core.scaling.plots import plot_grid
from fvlm_core.scaling.results import Fits
from fvlm_core.scaling.runs import FinishedRun, same_shards
from fvlm_core.scaling.study import Study, crossover_of, token_ratio_of
from fvlm_core.scaling.tables import points_csv, scaling_text

SIGNIFICANT_DIGITS = 9
"""Significant digits of fitted numbers in files: fewer than a double has, so that files do not depend on the order of summation."""


def study(job: GridJob) -> ScalingReport:
    """Fit, plot and choose. Raises UserError for missing or duplicate runs, or runs that cannot be compared."""
    started = time.monotonic()
    finished = _read(job)
    diverged = [name for name, run in finished.items() if run.manifest.divergences]
    points = [_point(run, finished[_name(run)]) for run in job.runs if _name(run) not in diverged]
    table = points_csv(points).encode()
    write_atomically(job.output / POINTS_FILE, table)
    studies: dict[Variant, Study] = {
        variant: Study(own, weights=job.weights) for variant in VARIANTS if (own := [point for point in points if point.variant == variant])
    }
    if "foveated" not in studies:
        raise UserError("no foveated run to choose a size from", where="runs", fix="give at least one run of the variant foveated")
    foveated = studies["foveated"]
    choice = choose(list(foveated.points), foveated.grid, target_flops=job.target_flops, weights=job.weights)
    fits = Fits(
        points_sha256=hashlib.sha256(table).hexdigest(),
        weights=job.weights,
        variants={variant: one.fits for variant, one in studies.items()},
        crossover_flops=crossover_of(studies),
        token_ratio_at_equal_loss=token_ratio_of(studies),
        chosen=choice.size,
        chosen_reason=choice.reason,
        runner_up=choice.runner_up,
        margin_nats=choice.margin,
        wins_share=choice.share,
        notes=[*_notes(points, job.weights), *(f"left out, because it diverged: {name}" for name in diverged)],
    )
    fits = Fits.model_validate(_rounded(fits.model_dump(mode="json")))
    write_atomically(job.output / FITS_FILE, fits.model_dump_json(indent=2).encode())
    write_atomically(job.output / SCALING_TEXT, scaling_text(points, fits).encode())
    plot_grid(job.output, points, studies, fits.crossover_flops.value)
    renderings = [SCALING_TEXT, *PLOTS, *VECTOR_PLOTS]
    return ScalingReport(
        name="scaling",
        settings_hash=job.hash(exclude={"output"}),
        inputs={name: run.manifest.digest for name, run in finished.items()},
        counts={"runs": len(points)},
        files=file_entries(job.output, [POINTS_FILE, FITS_FILE]) + file_entries(job.output, renderings, identity=False),
        seconds=time.monotonic() - started,
        points=points,
        exponents={
            f"{variant}.{name}": part[key]
            for variant, one in fits.variants.items()
            for name, part, key in (
                ("alpha", one.law, "alpha"),
                ("beta", one.law, "beta"),
                ("data_beta", one.data, "beta"),
                ("allocation", one.law, "ratio"),
            )
        },
        crossover_flops=fits.crossover_flops,
        chosen=fits.chosen,
        chosen_reason=fits.chosen_reason,
        runner_up=fits.runner_up,
        margin_nats=fits.margin_nats,
        wins_share=fits.wins_share,
    ).write(job.output)


def _read(job: GridJob) -> dict[str, FinishedRun]:
    names = [_name(run) for run in job.runs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"given twice: {', '.join(twice)}", where="runs", fix="give every size, budget, variant and seed once")
    progress = Progress(job.output, len(job.runs))
    finished: dict[str, FinishedRun] = {}
    for number, (name, run) in enumerate(zip(names, job.runs, strict=True)):
        finished[name] = FinishedRun.read(run.run)
        progress.update(number + 1, note=name)
    same_shards(finished)
    return finished


def _name(run: GridRun) -> str:
    seed = f" seed {run.seed}" if run.seed else ""
    return f"{run.size} {run.budget_flops:.4e} {run.variant}{seed}"


def _notes(points: list[GridPoint], weights: Weights) -> list[str]:
    cells = {(point.size, point.budget_flops, point.variant) for point in points}
    repeated = len(points) - len(cells)
    seeds = f"{repeated} of them another seed of a cell" if repeated else "one seed per cell"
    return [
        f"{len(points)} runs, {seeds}; every run ended with its learning rate decayed",
        f"fits by {weights} errors; intervals of 95 % by profiles of the sum of squares",
        "N counts all parameters, D labelled tokens, FLOPs include the vision encoder",
    ]


def _point(run: GridRun, finished: FinishedRun) -> GridPoint:
    manifest = finished.manifest
    return GridPoint(
        run_id=_name(run),
        size=run.size,
        variant=run.variant,
        params=manifest.params,
        budget_flops=run.budget_flops,
        flops=manifest.flops,
        samples=manifest.samples_seen,
        frames=manifest.frames_seen,
        tokens_per_frame=finished.recipe.model.tokens_per_frame,
        tokens=manifest.label_tokens_seen,
        loss=manifest.final_loss,
        seed=run.seed,
    )


def _rounded(value: Any) -> Any:
    """Round all floats in nested values to `SIGNIFICANT_DIGITS`."""
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_rounded(part) for part in value]
    return float(f"{value:.{SIGNIFICANT_DIGITS}g}") if isinstance(value, float) else value


if __name__ == "__main__":
    run_job(GridJob, study)
