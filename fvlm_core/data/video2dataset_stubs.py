"""Empty stand-ins for modules that `import video2dataset` loads but its download stage never uses: torch, decord, wandb and more.

A `.pth` file (infra/video2dataset_env.sh) imports this at the start of every interpreter in video2dataset's environment, so that its
child processes, which import video2dataset again, find them too.
"""

import sys
from types import ModuleType
from typing import Any

UNUSED = (
    "wandb",
    "video2dataset.dataloader",
    *(f"video2dataset.subsamplers.{name}_subsampler" for name in ("caption", "optical_flow", "cut_detection")),
    *(f"video2dataset.workers.{name}_worker" for name in ("caption", "optical_flow", "whisper", "subset")),
)


class Stub(ModuleType):
    """A module in which every public name exists and is None."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


for module in UNUSED:
    sys.modules.setdefault(module, Stub(module))
