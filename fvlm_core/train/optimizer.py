"""AdamW with parameter groups by role and weight decay, and its state as plain tensors for checkpoints.

A role with learning rate 0 is frozen: its parameters require no gradient and have no optimizer state. A role without parameters and a
parameter without a role are errors, so that no parameter silently gets another role's learning rate.
"""

from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW

from fvlm_core.config import OptimizerSettings
from fvlm_core.errors import UserError
from fvlm_core.model.foveated import FoveatedVLM
from fvlm_core.model.names import ROLES
from fvlm_core.train.parallelism import full_tensor


def build_optimizer(model: FoveatedVLM, settings: OptimizerSettings, *, frozen: Collection[str] = ()) -> AdamW:
    """Build AdamW for `model`. Disables `requires_grad` of parameters with a frozen role or a name in `frozen`, and enables it for others.

    Each group has its `role` and its parameters' names (`param_names`). Raises UserError for a role without parameters, or if there is
    nothing to train.
    """
    peaks = settings.peaks
    members: dict[str, list[tuple[str, nn.Parameter]]] = {role: [] for role in ROLES}
    for name, parameter in model.named_parameters():
        members[model.role(name)].append((name, parameter))
        parameter.requires_grad_(peaks[model.role(name)] > 0 and name not in frozen)
    for role, parameters in members.items():
        if not parameters:
            raise UserError(
                f"the model has no parameters of the role {role!r}",
                where=f"optimizer.lr_{role}",
                fix="give a model that has all three roles",
            )
    groups = []
    for role, parameters in members.items():
        for decayed in (True, False):
            chosen = [(name, p) for name, p in parameters if p.requires_grad and model.no_decay(name) != decayed]
            if chosen:
                groups.append({"params": chosen, "role": role, "lr": peaks[role], "weight_decay": settings.weight_decay * decayed})
    if not groups:
        raise UserError("nothing to train: every learning rate is 0", where="optimizer", fix="give one role a learning rate above 0")
    return AdamW(groups, betas=(settings.beta1, settings.beta2), fused=True)


def set_learning_rates(optimizer: AdamW, rates: dict[str, float]) -> None:
    """Set the learning rate of every group to that of its role."""
    for group in optimizer.param_groups:
        group["lr"] = rates[group["role"]]


def gradient_norms(optimizer: AdamW) -> dict[str, Tensor]:
    """Return the 2-norm of the gradient of each trained role, as scalars on the device."""
    gradients: dict[str, list[Tensor]] = {}
    for group in optimizer.param_groups:
        gradients.setdefault(group["role"], []).extend(p.grad for p in group["params"] if p.grad is not None)
    return {role: full_tensor(nn.utils.get_total_norm(grads)) for role, grads in gradients.items()}


def clip_gradients(optimizer: AdamW, clip_norm: float, norm: Tensor, *, in_step: bool | None = None) -> None:
    """Scale all gradients so that their total `norm` is at most `clip_norm`.

    `in_step`: let the fused AdamW kernel scale the gradients in the next `optimizer.step()`, which saves a pass over them. Default: on a
    GPU, unless ranks hold shards.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if in_step is None:
        in_step = norm.is_cuda and not any(isinstance(parameter, DTensor) for parameter in parameters)
    if in_step:
        # the attribute of `torch.amp.GradScaler`, by which the fused kernel divides gradients; 1e-6 as in `clip_grads_with_norm_`
        optimizer.grad_scale = ((norm.float() + 1e-6) / clip_norm).clamp(min=1.0)  # ty: ignore[missing-attribute]
    else:
        nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)


def optimizer_tensors(optimizer: AdamW) -> dict[str, dict[str, Tensor]]:
    """Return the optimizer's state tensors by parameter name. Missing state is initialised with zeros, as AdamW does.

    These are the optimizer's own tensors, so that a checkpoint can be loaded into them.
    """
    tensors = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            state = optimizer.state[parameter]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
            tensors[name] = {key: state[key] for key in ("step", "exp_avg", "exp_avg_sq")}
    return tensors
