"""The ranks of a run: who they are, and what they exchange. One needs no process group; several use gloo on CPU, NCCL on GPUs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from fvlm_core.errors import UserError


@dataclass(frozen=True)
class World:
    """One rank among `size`."""

    rank: int
    size: int
    device: torch.device

    @classmethod
    def join(cls, environment: Mapping[str, str], device: str) -> "World":
        """Join the ranks that torchrun describes in `environment`; alone where it describes none.

        Raises UserError for a GPU that is not there.
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
            # numbers of the host are exchanged by gloo on GPUs too: NCCL would make the host wait for all that its device still has to do
            dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", device_id=place if device == "cuda" else None)
        return cls(rank, size, place)

    def sum(self, values: Sequence[float]) -> list[float]:
        """The values added up over the ranks, in double precision."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def share(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def union(self, values: set[int]) -> set[int]:
        """What any rank has in its set."""
        if self.size == 1:
            return values
        sets: list[Any] = [None] * self.size
        dist.all_gather_object(sets, values)
        return set().union(*sets)

    def apart(self) -> dist.ProcessGroup | None:
        """The same ranks as a group of its own, over gloo: for a thread, whose exchanges must not mix with those of training."""
        group = dist.new_group(backend="gloo") if self.size > 1 else None
        assert not isinstance(group, int)  # which a process outside of the group would get
        return group

    def wait(self) -> None:
        """Until every rank is here."""
        if self.size > 1:
            dist.barrier()

    def leave(self) -> None:
        """End the process group. Nothing in C++ may hold it any more (`Spread.end`)."""
        if self.size > 1:
            dist.destroy_process_group()
