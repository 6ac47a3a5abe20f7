"""The complete pipeline, phase by phase. Each phase has its own deployment and runs in a suitable work pool."""

from flows.registry import PHASES
from tasks.pipeline_flow import pipeline_flow

pipeline = pipeline_flow(list(PHASES.values()), __name__)
