"""Phase 2: runs that differ from the base recipe in one setting each, and the one that wins."""

from prefect import flow

from fvlm_core.scaling.jobs import AblationReport
from tasks import jobs
from tasks.config import PipelineConfig
from tasks.phase_run import PhaseRun
from tasks.recipes import ablation_recipe, base_recipe


@flow(name="ablations", flow_run_name="{config.name} · ablations")
def ablations(config: PipelineConfig, volume: str) -> None:
    """Train the base recipe and every ablation for the same samples, compare them on the same validation set, pick the winner.

    Args:
        config: What every phase does.
        volume: Folder that holds all results (an absolute path).
    """
    with PhaseRun("ablations", config, volume, steps=len(config.ablations) + 2) as run:
        inputs = jobs.training_inputs(run.upstream["precompute"])
        ranks = config.machine.shared_ranks
        baseline = jobs.training(base_recipe(config, "ablation-baseline", "ablations", run.chosen()), inputs, ranks=ranks)
        steps = {one.name: jobs.training(ablation_recipe(config, one, run.chosen()), inputs, ranks=ranks) for one in config.ablations}
        made = run.make_all([baseline, *steps.values()])
        runs = {name: made[step.name] for name, step in steps.items()}
        compared = run.make(jobs.ablation_report(config.ablations, made[baseline.name], runs, config.ablation_min_gain))
        report = AblationReport.read(run.volume / compared.folder)
        change = f"`{report.winner_change}` = `{report.winner_value}`" if report.winner_change else "the base recipe as it is"
        run.finish(
            [row.model_dump(mode="json", include={"name", "change", "value", "loss", "delta", "control"}) for row in report.rows],
            text=f"Every run differs from the baseline in one setting. Winner: **{report.winner}** ({change}).",
            chosen={report.winner_change: report.winner_value} if report.winner_change else {},
            pictures=jobs.pictures(run.volume, compared),
        )
