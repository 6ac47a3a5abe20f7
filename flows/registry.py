"""The phases of the pipeline, in the order in which they run. A new phase is its flow's file, its settings, and a line here."""

from prefect.flows import Flow

from flows.ablations import ABLATIONS, ablations
from flows.evaluate import EVALUATE, evaluate
from flows.precompute import PRECOMPUTE, precompute
from flows.release import RELEASE, release
from flows.scaling import SCALING, scaling
from flows.speed import SPEED, speed
from flows.train import TRAIN, train
from tasks.phase import Phase

REGISTRY: list[tuple[Phase, Flow[..., None]]] = [
    (PRECOMPUTE, precompute),
    (SPEED, speed),
    (ABLATIONS, ablations),
    (SCALING, scaling),
    (TRAIN, train),
    (EVALUATE, evaluate),
    (RELEASE, release),
]
PHASES: dict[str, Phase] = {phase.name: phase for phase, _ in REGISTRY}
FLOWS: dict[str, Flow[..., None]] = {phase.name: flow for phase, flow in REGISTRY}
