"""The device that a setting or an option asks for; one that this machine lacks is an error before anything is loaded onto it."""

import torch

from fvlm_core.errors import UserError


def device_of(name: str | torch.device, *, where: str = "device", local: int = 0) -> torch.device:
    """`auto` is a GPU where there is one; `cuda` that of number `local` on this machine.

    Raises UserError for a device that torch does not know, or a GPU that is not there.
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
    """Whether this machine's CPU has instructions for it (AVX-512 BF16); others convert first, which takes longer than fp32."""
    return bool(torch.cpu.get_capabilities().get("avx512_bf16"))
