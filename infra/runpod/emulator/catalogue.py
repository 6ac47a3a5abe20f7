"""The machines that the emulator offers. Names and data centres are RunPod's. Prices are similar to its list prices in 2026, but only for
the emulator: a plan for real money uses the real catalogue."""

from dataclasses import dataclass


@dataclass(frozen=True)
class GpuOffer:
    id: str
    name: str
    memory_gb: int
    usd_per_hour: float
    data_centers: tuple[str, ...]
    max_count: int = 8


@dataclass(frozen=True)
class CpuOffer:
    id: str
    name: str
    group: str
    usd_per_vcpu_hour: float
    ram_gb_per_vcpu: float
    data_centers: tuple[str, ...]
    max_vcpus: int = 32


DATA_CENTERS = {
    "US-KS-2": ("US Kansas 2", "NORTH_AMERICA"),
    "US-GA-2": ("US Georgia 2", "NORTH_AMERICA"),
    "EU-RO-1": ("EU Romania 1", "EUROPE"),
    "EUR-IS-1": ("EU Iceland 1", "EUROPE"),
}
GPUS = (
    GpuOffer("NVIDIA A100 80GB PCIe", "A100 PCIe", 80, 1.64, ("US-KS-2", "EU-RO-1")),
    GpuOffer("NVIDIA A100-SXM4-80GB", "A100 SXM", 80, 1.89, ("US-KS-2", "US-GA-2")),
    GpuOffer("NVIDIA H100 80GB HBM3", "H100 SXM", 80, 2.99, ("US-KS-2", "US-GA-2", "EUR-IS-1")),
    GpuOffer("NVIDIA GeForce RTX 4090", "RTX 4090", 24, 0.69, ("EU-RO-1", "EUR-IS-1")),
)
CPUS = (
    CpuOffer("cpu3c", "Compute-Optimized", "Gen 3", 0.03, 2.0, tuple(DATA_CENTERS)),
    CpuOffer("cpu3g", "General Purpose", "Gen 3", 0.04, 4.0, tuple(DATA_CENTERS)),
    CpuOffer("cpu5c", "Compute-Optimized", "Gen 5", 0.035, 2.0, ("US-KS-2", "EU-RO-1")),
)
DISK_USD_PER_GB_MONTH = 0.10
SMALL_USD_PER_GB_MONTH, LARGE_USD_PER_GB_MONTH, SMALL_GB = 0.07, 0.05, 1000
"""Prices of a network volume: up to the first terabyte, and above it."""
HOURS_PER_MONTH = 730.0


def volume_usd_per_hour(size_gb: int) -> float:
    """Return the price of a network volume."""
    month = SMALL_USD_PER_GB_MONTH * min(size_gb, SMALL_GB) + LARGE_USD_PER_GB_MONTH * max(0, size_gb - SMALL_GB)
    return month / HOURS_PER_MONTH


def disk_usd_per_hour(size_gb: int) -> float:
    """Return the price of a running pod's container disk."""
    return DISK_USD_PER_GB_MONTH * size_gb / HOURS_PER_MONTH
