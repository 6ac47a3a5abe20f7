"""Import everything that a training run needs, in a process that forks runs, so that they start without importing."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # see `__main__`; read when torch is imported

import pyarrow.dataset  # noqa: F401
import torch.distributed.launcher.api  # noqa: F401
from transformers.models.dinov2 import modeling_dinov2  # noqa: F401
from transformers.models.llama import modeling_llama  # noqa: F401

import fvlm_core.train.loop  # noqa: F401
from fvlm_core import cli, provenance  # noqa: F401
from fvlm_core.train import folder, lock  # noqa: F401

provenance.cache_digests("fvlm_core.train")
