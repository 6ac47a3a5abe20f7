"""The datasets that can be read: one module each, and one import each here. A profile selects them by format (`precompute.sources`).

An adapter (`adapter.Adapter`) defines how a dataset's published files become rows. What all have in common (defaults, filters, checks, the
record on the volume) is in `normalise` and `record`.
"""

from types import ModuleType

from fvlm_core.data.sources import cauldron as cauldron
from fvlm_core.data.sources import finevideo as finevideo
from fvlm_core.data.sources import finevideo_scenes as finevideo_scenes
from fvlm_core.data.sources import llava_video as llava_video
from fvlm_core.data.sources import openvid as openvid
from fvlm_core.data.sources import rlaif_v as rlaif_v
from fvlm_core.data.sources import sharegpt4video as sharegpt4video
from fvlm_core.data.sources import smol_smoltalk as smol_smoltalk
from fvlm_core.data.sources import smoltalk as smoltalk
from fvlm_core.data.sources import user as user
from fvlm_core.data.sources import vista as vista
from fvlm_core.data.sources import vript as vript
from fvlm_core.data.sources import webvid as webvid
from fvlm_core.data.sources.adapter import Adapter

_MODULES = [value for value in list(globals().values()) if isinstance(value, ModuleType) and hasattr(value, "ADAPTER")]
ADAPTERS: dict[str, Adapter] = {module.ADAPTER.name: module.ADAPTER for module in _MODULES}
"""The adapter of every module imported above, by the name of its format."""
