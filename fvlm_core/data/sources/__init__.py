"""The datasets that can be read: a file each, and a line each here. A profile names them by their format (`precompute.sources`).

An adapter (`adapter.Adapter`) says how a dataset's published files become rows; what is common to all (defaults, filters, checks, the
record on the volume) is in `normalise` and `record`.
"""

from types import ModuleType

from fvlm_core.data.sources import openvid as openvid
from fvlm_core.data.sources import smoltalk as smoltalk
from fvlm_core.data.sources import table as table
from fvlm_core.data.sources import webvid as webvid
from fvlm_core.data.sources.adapter import Adapter

_MODULES = [value for value in list(globals().values()) if isinstance(value, ModuleType) and hasattr(value, "ADAPTER")]
ADAPTERS: dict[str, Adapter] = {module.ADAPTER.name: module.ADAPTER for module in _MODULES}
"""Every module that is imported above, by its format's name."""
