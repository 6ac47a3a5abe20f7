"""How long training waits for a checkpoint: written while it goes on, beside waiting until it is on the disk.

Weights and AdamW's state as large as SmolLM2-135M's with DINOv2-small (1.9 GB) are saved by the trainer's own code, alone on a CPU. A
step of training is a matrix product of a fixed size; between two saves come as many as take as long as a save that is waited for.
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
"""Of the matrices that stand for training."""


def measure(size: str, rounds: int, folder: Path) -> Iterator[Measurement]:
    """Per save: seconds that training waits, and the peak of memory above what is being saved."""
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
        stall += time.perf_counter() - started  # what is not finished by the next save
        if number:  # the first is the warm-up, and says how much work a save is long
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
        folder={"type": Path, "default": None, "help": "on the disk that is meant; default: a temporary one"},
    )
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        show(measure(options.size, options.rounds, Path(folder)), as_json=options.json)


if __name__ == "__main__":
    main()
