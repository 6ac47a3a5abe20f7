"""fVLM: a video language model that reads each frame as one token. This package is the science, without orchestration or cloud.

`fvlm_core.FoveatedVLM` is the user-facing model (`fvlm_core.use`). It is imported lazily, so that importing the package is cheap.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fvlm_core.use import FoveatedVLM as FoveatedVLM

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    if name == "FoveatedVLM":
        # imported by name, so that provenance does not count the dependencies of `use` among the code of every job
        return import_module("fvlm_core.use").FoveatedVLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
