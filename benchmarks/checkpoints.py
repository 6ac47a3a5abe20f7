"""How long training waits for a checkpoint: asynchronous saves against synchronous ones.

The trainer's own code saves weights and AdamW state of the size of DINOv2-small + SmolLM2-135M (1.9 GB), in one process on a CPU. A
training step is simulated by a matrix product of fixed size. Between two saves there is 1.5 times as much work as a synchronous save takes.
"""

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import torch

from benchmarks.report import Measurement, arguments, peak_memory_gb, show
from fvlm_core.train.checkpoint import Checkpoints
from fvlm_core.train.distributed import World

PARAMETERS = {"135M": 157_000_000, "small": 5_000_000}
TENSORS = 40
WIDTH = 1024
"""Side of the matrices that simulate training."""


def measure(size: str, rounds: int, folder: Path) -> Iterator[Measurement]:
    """Yield the seconds that training waits per save, the slowdown of steps during a save, and the peak memory."""
    tensors = {
        part: {str(n): torch.zeros(PARAMETERS[size] // TENSORS) for n in range(TENSORS)} for part in ("weights", "exp_avg", "exp_avg_sq")
    }
    checkpoints = Checkpoints(folder, World(0, 1, torch.device("cpu")), "benchmark")
    left, right = torch.ones(WIDTH, WIDTH), torch.ones(WIDTH, WIDTH)
    waits: dict[str, list[float]] = {"waited for": [], "under way": []}
    trained: dict[str, list[float]] = {name: [] for name in waits}
    work = 1
    for number in range(2 * rounds + 1):
        name = "under way" if number % 2 else "waited for"
        started = time.perf_counter()
        checkpoints.save(number, tensors, healthy_until=number, score=None, state={})
        if name == "waited for":
            checkpoints.wait()
        stall = time.perf_counter() - started
        started = time.perf_counter()
        for _ in range(work):
            torch.mm(left, right)
        seconds = time.perf_counter() - started
        started = time.perf_counter()
        checkpoints.wait()
        stall += time.perf_counter() - started  # a save that is still running delays the next one
        if number:  # the first save is the warm-up, and sets the amount of work between saves
            waits[name].append(stall)
            trained[name].append(seconds)
        else:
            work = max(1, int(1.5 * stall / seconds))
    before, now = median(waits["waited for"]), median(waits["under way"])
    slower = median(trained["under way"]) / median(trained["waited for"])
    yield Measurement("checkpoints", "stall_s", now, "s", f"waiting until it is on the disk: {before:.3f} s", now / before)
    yield Measurement("checkpoints", "steps_beside_a_save", slower, "x", "the same steps without one", slower)

    def save() -> None:
        checkpoints.save(1, tensors, healthy_until=1, score=None, state={})
        checkpoints.wait()

    held = sum(tensor.nbytes for part in tensors.values() for tensor in part.values()) / 1e9
    peak = peak_memory_gb(save)
    yield Measurement("checkpoints", "peak_memory_gb", peak, "GB", f"what is saved: {held:.2f} GB", peak / held)


def main() -> None:
    options = arguments(
        __doc__ or "",
        size={"choices": sorted(PARAMETERS), "default": "135M"},
        rounds={"type": int, "default": 3},
        folder={"type": Path, "default": None, "help": "folder on the disk to measure; default: a temporary folder"},
    )
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        show(measure(options.size, options.rounds, Path(folder)), as_json=options.json)


if __name__ == "__main__":
    main()
