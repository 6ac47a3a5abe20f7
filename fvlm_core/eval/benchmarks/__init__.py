"""The registry of benchmarks: a name each, that of a file of this folder (see `benchmark`). Nothing else has to be written to add one."""

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
    """A benchmark by name. Raises UserError naming those that there are."""
    if name not in NAMES:
        raise UserError(f"there is no benchmark {name!r}", where="benchmarks", fix=f"use one of {', '.join(NAMES)}")
    return import_module(f"{__name__}.{name}").BENCHMARK
