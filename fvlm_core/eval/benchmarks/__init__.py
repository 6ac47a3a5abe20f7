"""The registry of benchmarks. To add one, add a file to this folder (see `benchmark`) and its name to `NAMES`."""

from functools import cache
from importlib import import_module

from fvlm_core.errors import UserError
from fvlm_core.eval.benchmarks.benchmark import Benchmark

NAMES = (
    "videomme",
    "mlvu",
    "mvbench",
    "longvideobench",
    "tempcompass",
    "mmmu",
    "mathvista",
    "docvqa",
    "scienceqa",
    "pope",
    "textvqa",
    "validation",
    "gaze",
    "own",
)


@cache
def benchmark(name: str) -> Benchmark:
    """The benchmark with the given name. Raises UserError that lists the known names if there is none."""
    if name not in NAMES:
        raise UserError(f"there is no benchmark {name!r}", where="benchmarks", fix=f"use one of {', '.join(NAMES)}")
    return import_module(f"{__name__}.{name}").BENCHMARK
