"""Resolve the device named in a setting or an option; a missing device is reported before anything is loaded onto it."""

import torch

from fvlm_core.errors import UserError


def device_of(name: str | torch.device, *, where: str = "device", local: int = 0) -> torch.device:
    """Resolve a device name: `auto` is a GPU if available, else the CPU; `cuda` without a number is GPU `local` of this machine.

    Raises UserError for a device that torch does not know, or a GPU that does not exist.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"there is no device {name!r}", where=where, fix="use auto, cpu or cuda") from error
    if found.type != "cuda":
        return found
    number = local if found.index is None else found.index
    if number >= (count := torch.cuda.device_count()):
        raise UserError(f"there is no GPU {number}: torch sees {count} here", where=where, fix="use auto or cpu")
    return torch.device("cuda", number)


def multiplies_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 natively (AVX-512 BF16); on other CPUs the conversions make it slower than fp32."""
    return bool(torch.cpu.get_capabilities().get("avx512_bf16"))
