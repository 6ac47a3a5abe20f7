"""Phase 1 provisional."""

from prefect import flow

from tasks.config import PipelineConfig
from tasks.phase_run import PhaseRun
from tasks.steps import Step


@flow(name="speed", flow_run_name="{config.name} · speed")
def speed(config: PipelineConfig, volume: str) -> None:
    """Provisional."""
    with PhaseRun("speed", config, volume, steps=1) as run:
        run.make(
            Step(
                name="speed-report",
                module="tests.jobs.count",
                settings={"value": 3, "reads": ["input:shards"]},
                inputs={"shards": run.input("precompute", "shards")},
            )
        )
        run.finish([{"a": 1, "b": 0.33333333}], text="hello")
