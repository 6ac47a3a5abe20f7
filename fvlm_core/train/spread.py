"""How a model is spread over the ranks: whole on each (DistributedDataParallel), or in shards (FSDP2, `fully_shard`).

Sharded, a rank keeps its part of the fp32 weights and of AdamW's state. For a step the weights are gathered once, all micro-batches
run on them, and the gradients are reduced once, in fp32. The language model's layers, which every rank runs first in the same order,
are gathered while the ones before them compute. Weights are gathered in fp32 and cast where they are used, as on a single GPU: gathered in
bf16, norms and the sums between layers would be bf16 too, and gradients half as much further off. Giving weights back and reducing layer
by layer within the forward and backward would save more memory, but then all ranks must run the same layers equally often, and here
they do not: text-only samples run no encoder, and how often a layer is queried depends on the batch.
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
"""Layers of the language model that are gathered while one computes."""


class Spread:
    """A model that a single rank holds; what the others have in common."""

    def __init__(self, model: FoveatedVLM, world: World) -> None:
        self.model, self.world = model, world

    def begin(self) -> None:
        """Call before training, and after parameters were frozen or given back their gradients."""

    def end(self) -> None:
        """Call when training has ended, before the process group does."""

    def __call__(self, batch: PackedBatch, loss: LossSettings, *, by_sample: bool = False) -> PassLosses:
        """The training forward, within `step`."""
        return self.model(batch, loss, by_sample=by_sample)

    def step(self) -> AbstractContextManager[None]:
        """Around the forwards and backwards of an optimizer step; on leaving it, gradients are the mean over the ranks."""
        return self.model.casts.step(adds=True)

    def accumulating(self, accumulate: bool) -> AbstractContextManager[None]:
        """Around a forward and backward within `step`: with `accumulate` it is not the last."""
        del accumulate
        return nullcontext()

    def evaluation(self) -> AbstractContextManager[None]:
        """Around calls of `model` without gradients; the ranks may make different numbers of them."""
        return nullcontext()

    def weights(self) -> dict[str, Tensor]:
        """`FoveatedVLM.weights`, whole on every rank. For all ranks to call."""
        return self.model.weights()

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Put a whole state dict into the model."""
        self.model.load_state_dict(state)


class Replicated(Spread):
    """Every rank holds the model whole."""

    parallel: DistributedDataParallel

    def begin(self) -> None:
        self.parallel = DistributedDataParallel(self.model, forward_sync_buffers=False, gradient_as_bucket_view=True)

    def end(self) -> None:
        # Its reducer holds the process group. Were it the last to let go of it, it would wait for gloo's threads and keep the
        # interpreter, which they need to free the tensors of the last exchange: the finished run would hang.
        del self.parallel
        gc.collect()

    def __call__(self, batch: PackedBatch, loss: LossSettings, *, by_sample: bool = False) -> PassLosses:
        return self.parallel(batch, loss, by_sample=by_sample)

    def accumulating(self, accumulate: bool) -> AbstractContextManager[None]:
        self.model.casts.adds = accumulate  # it reduces the gradients that autograd gives it
        return self.parallel.no_sync() if accumulate else nullcontext()


class Sharded(Spread):
    """Every rank holds a part of every parameter; the model's parameters become DTensors."""

    def __init__(self, model: FoveatedVLM, world: World) -> None:
        super().__init__(model, world)
        mesh = init_device_mesh(world.device.type, (world.size,))
        policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
        self.root = _Root(model)
        model.casts.parts = frozenset()  # a layer's weights are there only once it runs
        for module in (*model.encoder.layers, *model.llm.model.layers, self.root):
            fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
        self.parts = [module for module in self.root.modules() if isinstance(module, FSDPModule)]
        for part in self.parts:
            part.set_reshard_after_backward(False, recurse=False)
        layers: list[FSDPModule] = [layer for layer in model.llm.model.layers if isinstance(layer, FSDPModule)]
        for number, layer in enumerate(layers):
            layer.set_modules_to_forward_prefetch(layers[number + 1 : number + 1 + AHEAD_LAYERS])
        self.first = [part for part in self.parts if part not in layers]
        """Gathered before the forward: not every rank runs the encoder, and it is small."""

    def __call__(self, batch: PackedBatch, loss: LossSettings, *, by_sample: bool = False) -> PassLosses:
        return self.root(batch, loss, by_sample=by_sample)

    @contextmanager
    def step(self) -> Generator[None]:
        with self._gathered(self.first):
            self._reduce(False)
            yield
            # A backward of zeros through every parameter: all ranks reduce all parts, in the same order.
            self._reduce(True)
            self.root(None, None).backward()

    def evaluation(self) -> AbstractContextManager[None]:
        """The whole weights on every rank."""
        return self._gathered(self.parts)

    @contextmanager
    def _gathered(self, parts: Sequence[FSDPModule]) -> Generator[None]:
        """With the weights of some parts; on leaving, those of all are given back."""
        for gathering in [part.unshard(async_op=True) for part in parts]:
            if gathering is not None:
                gathering.wait()
        try:
            yield
        finally:
            for part in self.parts:
                part.reshard()

    def weights(self) -> dict[str, Tensor]:
        return self.model.weights(lambda tensor: whole(tensor.detach()))

    def load(self, state: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, tensor in self.model.state_dict().items():
                held = state[name].to(tensor.device)
                tensor.copy_(distribute_tensor(held, tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else held)

    def _reduce(self, enabled: bool) -> None:
        for part in self.parts:
            part.set_requires_gradient_sync(enabled, recurse=False)


class _Root(nn.Module):
    """The model, and a forward through every parameter that adds nothing."""

    def __init__(self, model: FoveatedVLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: PackedBatch | None, loss: LossSettings | None, *, by_sample: bool = False) -> PassLosses | Tensor:
        if batch is None:
            return torch.stack([parameter.sum().float() for parameter in self.parameters() if parameter.requires_grad]).sum() * 0.0
        return self.model(batch, loss, by_sample=by_sample)


def spread(model: FoveatedVLM, world: World, run: RunSettings) -> Spread:
    """Spread a model that is the same on all ranks as the recipe says."""
    if world.size == 1:
        return Spread(model, world)
    return Sharded(model, world) if run.sharding == "fsdp2" else Replicated(model, world)


def whole(tensor: Tensor) -> Tensor:
    """A tensor of all ranks' shards; for all ranks to call."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
