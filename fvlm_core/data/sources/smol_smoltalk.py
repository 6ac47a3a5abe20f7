"""smol-smoltalk: the subset of SmolTalk for models of 135M and 360M parameters, in the same format."""

from dataclasses import replace

from fvlm_core.data.sources import smoltalk
from fvlm_core.data.sources.adapter import Published

ADAPTER = replace(
    smoltalk.ADAPTER,
    name="smol_smoltalk",
    title="smol-smoltalk",
    homepage="https://huggingface.co/datasets/HuggingFaceTB/smol-smoltalk",
    published=Published(samples=460_341, gigabytes=0.9, hours=None, source="the dataset card: rows and size of the training split"),
)
