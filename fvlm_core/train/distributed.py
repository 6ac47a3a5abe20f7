"""The ranks of a run and their collectives. A single rank needs no process group; several use gloo on CPU and NCCL on GPUs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from fvlm_core.errors import UserError


@dataclass(frozen=True)
class World:
    """This process's rank among `size`, and its device."""

    rank: int
    size: int
    device: torch.device

    @classmethod
    def initialize(cls, environment: Mapping[str, str], device: str) -> "World":
        """Join the process group that torchrun describes in `environment`, or run as a single rank without one.

        Raises UserError if there is no GPU for this rank.
        """
        rank, size, local = (int(environment.get(key, alone)) for key, alone in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda" and local >= torch.cuda.device_count():
            raise UserError(
                f"rank {rank} has no GPU of its own: this machine has {torch.cuda.device_count()}",
                where="run.device",
                fix="start fewer processes, or set run.device to cpu",
            )
        place = torch.device(device, local) if device == "cuda" else torch.device(device)
        if device == "cuda":
            torch.cuda.set_device(place)
        if size > 1:
            # host tensors are reduced with gloo on GPUs too: with NCCL, the host would wait for all work queued on its device
            dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", device_id=place if device == "cuda" else None)
        return cls(rank, size, place)

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sum values over all ranks, in double precision."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def broadcast(self, value: Any) -> Any:
        """Broadcast rank 0's value to every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def union(self, values: set[int]) -> set[int]:
        """Return the union of all ranks' sets."""
        if self.size == 1:
            return values
        sets: list[Any] = [None] * self.size
        dist.all_gather_object(sets, values)
        return set().union(*sets)

    def new_group(self) -> dist.ProcessGroup | None:
        """Create a separate gloo group of all ranks, for a thread whose collectives must not interleave with those of training."""
        group = dist.new_group(backend="gloo") if self.size > 1 else None
        assert not isinstance(group, int)  # an int is returned only outside of the group
        return group

    def wait(self) -> None:
        """Wait for all ranks (barrier)."""
        if self.size > 1:
            dist.barrier()

    def destroy(self) -> None:
        """Destroy the process group. No C++ object may still hold a reference to it (see `Parallelism.end`)."""
        if self.size > 1:
            dist.destroy_process_group()
