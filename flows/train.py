"""Phase 4: the final training in three stages, with the winning configuration and the chosen size."""

from prefect import flow

from fvlm_core.scaling.curves import CURVES, plot_curves
from fvlm_core.scaling.runs import FinishedRun
from tasks import jobs
from tasks.config import PipelineConfig, Stages
from tasks.phase_run import PhaseRun
from tasks.recipes import stage_recipe
from tasks.steps import Made


@flow(name="train", flow_run_name="{config.name} · train")
def train(config: PipelineConfig, volume: str) -> None:
    """Train the stages one after the other, each from the model of the one before.

    Args:
        config: What every phase does.
        volume: Folder that holds all results (an absolute path).
    """
    stages = list(Stages.model_fields)
    with PhaseRun("train", config, volume, steps=len(stages)) as run:
        inputs = jobs.training_inputs(run.upstream["precompute"])
        before: Made | None = None
        rows, finished = [], {}
        for name in stages:
            recipe = stage_recipe(config, name, changes=run.chosen(), start=before is not None)
            before = run.make(jobs.training(recipe, inputs, ranks=config.machine.ranks, start=before))
            finished[name] = FinishedRun.read(run.volume / before.folder)
            result = finished[name].manifest
            rows.append({"stage": name, "steps": result.steps, "samples": result.samples_seen, "loss": result.final_loss, **result.losses})
        curves = run.folder / CURVES
        drawn = plot_curves(finished, curves)
        run.finish(rows, text="Validation losses of each stage's last model, by pass.", pictures=[curves] if drawn else [])
