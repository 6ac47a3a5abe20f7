"""The complete pipeline, phase by phase. Each phase is a deployment of its own and runs on the work pool that suits it."""

from flows.registry import PHASES
from tasks.pipeline_flow import pipeline_flow

pipeline = pipeline_flow(list(PHASES.values()), __name__)
