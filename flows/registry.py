"""The phases of the pipeline, in the order in which they run. A new phase is its flow's file, its settings, and a line here."""

from types import ModuleType

from prefect.flows import Flow

from flows import ablations, evaluate, precompute, release, scaling, speed, train
from tasks.phase import Phase

REGISTRY: list[tuple[Phase, ModuleType]] = [
    (precompute.PRECOMPUTE, precompute),
    (speed.SPEED, speed),
    (ablations.ABLATIONS, ablations),
    (scaling.SCALING, scaling),
    (train.TRAIN, train),
    (evaluate.EVALUATE, evaluate),
    (release.RELEASE, release),
]
PHASES: dict[str, Phase] = {phase.name: phase for phase, _ in REGISTRY}
MODULES: dict[str, ModuleType] = {phase.name: module for phase, module in REGISTRY}


def flow_of(name: str) -> Flow[..., None]:
    """The flow of the phase."""
    made: Flow[..., None] = getattr(MODULES[name], name)
    return made
