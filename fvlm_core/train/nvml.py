"""GPU readings from NVIDIA's management library, to tell slow code from a GPU at a low clock."""

from typing import Any

import torch


def gpu_readings(device: torch.device) -> dict[str, Any]:
    """Return current power, clock and temperature as fields of `SpeedRow`; empty on CPU or if the driver does not provide them."""
    if device.type != "cuda":
        return {}
    import pynvml  # of nvidia-ml-py; only needed with a GPU

    try:
        return {
            "power_w": torch.cuda.power_draw(device) / 1000,
            "sm_clock_mhz": torch.cuda.clock_rate(device),
            "temperature_c": torch.cuda.temperature(device),
        }
    except (RuntimeError, pynvml.NVMLError):  # not supported by the driver, or not permitted
        return {}
