"""The phases of the pipeline, in the order in which they run. A new phase needs a flow file, settings, and a line here."""

from importlib import import_module
from types import ModuleType

from prefect.flows import Flow

from tasks.phase import Phase

ORDER = (
    "precompute",
    "speed",
    "ablations",
    "scaling",
    "train",
    "evaluate",
    "release",
)
"""Names of the phases. `flows/NAME.py` defines the phase, under its name in capitals, and creates its flow, under its name."""
MODULES: dict[str, ModuleType] = {name: import_module(f"flows.{name}") for name in ORDER}
PHASES: dict[str, Phase] = {name: getattr(module, name.upper()) for name, module in MODULES.items()}


def flow_of(name: str) -> Flow[..., None]:
    """Return the flow of a phase."""
    made: Flow[..., None] = getattr(MODULES[name], name)
    return made
