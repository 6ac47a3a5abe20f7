"""fVLM: a video language model that reads each frame as one token. The science, without orchestration or cloud.

`FoveatedVLM` here is the model as a user has it (`fvlm_core.use`); it is imported when it is asked for, so that importing the package costs
nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fvlm_core.use import FoveatedVLM as FoveatedVLM

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    if name == "FoveatedVLM":
        return import_module("fvlm_core.use").FoveatedVLM  # by name: a job that imports the package is not made of what this needs
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
