"""Distribute a model over the ranks: replicated (DistributedDataParallel) or sharded (FSDP2, `fully_shard`).

With sharding, each rank keeps a part of the fp32 weights and of AdamW's state. In each step, weights are gathered once, all micro-batches
run on them, and gradients are reduced once, in fp32. All ranks run the language model's layers first and in the same order, so these are
prefetched while earlier layers compute. Weights are gathered in fp32 and cast when used, as on a single GPU: with bf16 weights, norms and
residual sums would be in bf16 too, and the gradients' error would be 1.5 times as large.

Resharding and reducing layer by layer, within the forward and backward pass, would save more memory. But it requires that all ranks run the
same layers equally often, which is not the case: text-only samples skip the encoder, and the number of queries depends on the batch.
"""

import gc
from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from fvlm_core.config import LossSettings, RunSettings
from fvlm_core.data.batch import PackedBatch
from fvlm_core.model.foveated import FoveatedVLM, PassLosses
from fvlm_core.train.distributed import World

AHEAD_LAYERS = 2
"""Number of language model layers to prefetch while one computes."""


class Parallelism:
    """A model on a single rank; the base class for several ranks."""

    def __init__(self, model: FoveatedVLM, world: World) -> None:
        self.model, self.world = model, world

    def begin(self) -> None:
        """Call before training, and after parameters were frozen or unfrozen."""

    def end(self) -> None:
        """Call after training, before the process group is destroyed."""

    def __call__(self, batch: PackedBatch, loss: LossSettings, *, by_sample: bool = False) -> PassLosses:
        """Run the training forward pass. Only within `step`."""
        return self.model(batch, loss, by_sample=by_sample)

    def step(self) -> AbstractContextManager[None]:
        """Context for the forward and backward passes of an optimizer step. On exit, gradients are averaged over ranks."""
        return self.model.casts.step(adds=True)

    def accumulating(self, accumulate: bool) -> AbstractContextManager[None]:
        """Context for one forward and backward pass within `step`. `accumulate`: it is not the last one."""
        del accumulate
        return nullcontext()

    def evaluation(self) -> AbstractContextManager[None]:
        """Context for calls of `model` without gradients. Ranks may make different numbers of calls."""
        return nullcontext()

    def weights(self) -> dict[str, Tensor]:
        """Return the complete `FoveatedVLM.weights` on every rank. All ranks must call this."""
        return self.model.weights()

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Load a complete state dict into the model."""
        self.model.load_state_dict(state)


class Replicated(Parallelism):
    """Every rank holds the complete model (DistributedDataParallel)."""

    parallel: DistributedDataParallel

    def begin(self) -> None:
        self.parallel = DistributedDataParallel(self.model, forward_sync_buffers=False, gradient_as_bucket_view=True)

    def end(self) -> None:
        # DDP's reducer refers to the process group. If it released the last reference, it would wait for gloo's threads while holding the
        # GIL, which they need to free the tensors of the last collective: the finished run would deadlock.
        del self.parallel
        gc.collect()

    def __call__(self, batch: PackedBatch, loss: LossSettings, *, by_sample: bool = False) -> PassLosses:
        return self.parallel(batch, loss, by_sample=by_sample)

    def accumulating(self, accumulate: bool) -> AbstractContextManager[None]:
        self.model.casts.adds = accumulate  # DDP reduces the gradients that autograd accumulates
        return self.parallel.no_sync() if accumulate else nullcontext()


class Sharded(Parallelism):
    """Every rank holds a shard of every parameter (FSDP2). The model's parameters become DTensors."""

    def __init__(self, model: FoveatedVLM, world: World) -> None:
        super().__init__(model, world)
        mesh = init_device_mesh(world.device.type, (world.size,))
        policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
        self.root = _Root(model)
        model.casts.parts = frozenset()  # a layer's weights may not be gathered before it runs
        for module in (*model.encoder.layers, *model.llm.model.layers, self.root):
            fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
        self.parts = [module for module in self.root.modules() if isinstance(module, FSDPModule)]
        for part in self.parts:
            part.set_reshard_after_backward(False, recurse=False)
        layers: list[FSDPModule] = [layer for layer in model.llm.model.layers if isinstance(layer, FSDPModule)]
        for number, layer in enumerate(layers):
            layer.set_modules_to_forward_prefetch(layers[number + 1 : number + 1 + AHEAD_LAYERS])
        self.first = [part for part in self.parts if part not in layers]
        """Modules gathered before the forward pass: not every rank runs the encoder, and it is small."""

    def __call__(self, batch: PackedBatch, loss: LossSettings, *, by_sample: bool = False) -> PassLosses:
        return self.root(batch, loss, by_sample=by_sample)

    @contextmanager
    def step(self) -> Generator[None]:
        with self._gathered(self.first):
            self._reduce(False)
            yield
            # a backward pass with zero gradients for every parameter, so that all ranks reduce all parts in the same order
            self._reduce(True)
            self.root(None, None).backward()

    def evaluation(self) -> AbstractContextManager[None]:
        """As the base class; gathers the complete weights on every rank."""
        return self._gathered(self.parts)

    @contextmanager
    def _gathered(self, parts: Sequence[FSDPModule]) -> Generator[None]:
        """Gather the weights of some parts. On exit, reshard all parts."""
        for gathering in [part.unshard(async_op=True) for part in parts]:
            if gathering is not None:
                gathering.wait()
        try:
            yield
        finally:
            for part in self.parts:
                part.reshard()

    def weights(self) -> dict[str, Tensor]:
        return self.model.weights(lambda tensor: full_tensor(tensor.detach()))

    def load(self, state: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, tensor in self.model.state_dict().items():
                held = state[name].to(tensor.device)
                tensor.copy_(distribute_tensor(held, tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else held)

    def _reduce(self, enabled: bool) -> None:
        for part in self.parts:
            part.set_requires_gradient_sync(enabled, recurse=False)


class _Root(nn.Module):
    """The model, with an additional forward pass that depends on every parameter and returns zero."""

    def __init__(self, model: FoveatedVLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: PackedBatch | None, loss: LossSettings | None, *, by_sample: bool = False) -> PassLosses | Tensor:
        if batch is None:
            return torch.stack([parameter.sum().float() for parameter in self.parameters() if parameter.requires_grad]).sum() * 0.0
        return self.model(batch, loss, by_sample=by_sample)


def parallelism_for(model: FoveatedVLM, world: World, run: RunSettings) -> Parallelism:
    """Distribute a model, which must be equal on all ranks, as the run settings say."""
    if world.size == 1:
        return Parallelism(model, world)
    return Sharded(model, world) if run.sharding == "fsdp2" else Replicated(model, world)


def full_tensor(tensor: Tensor) -> Tensor:
    """Gather a complete tensor from all ranks' shards. All ranks must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
