"""What NVIDIA's management library says of a GPU while a variant is measured: a slow step at a low clock is not the code's."""

from typing import Any

import torch


def gpu_readings(device: torch.device) -> dict[str, Any]:
    """Power, clock and temperature now, as `SpeedRow` has them; empty for a CPU, and where the driver says nothing. By nvidia-ml-py."""
    if device.type != "cuda":
        return {}
    import pynvml  # only a GPU's machine needs it

    try:
        return {
            "power_w": torch.cuda.power_draw(device) / 1000,
            "sm_clock_mhz": torch.cuda.clock_rate(device),
            "temperature_c": torch.cuda.temperature(device),
        }
    except (RuntimeError, pynvml.NVMLError):  # a driver without it, or a machine that forbids it
        return {}
