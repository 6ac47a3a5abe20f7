"""Changes of settings by dotted path: how ablations, chosen speed settings and a chosen size reach a recipe.

Two settings follow from others and are fitted after a change: the loss weights of the fine passes from their number, and the
micro-batch from the batch.
"""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

Values = dict[str, Any]


def laid_over(values: Values, changes: Mapping[str, Any]) -> Values:
    """A copy of `values` with dotted paths replaced. Raises KeyError for a path that is not there."""
    values = deepcopy(values)
    for path, value in changes.items():
        *parents, last = path.split(".")
        node = values
        for key in parents:
            if not isinstance(node, dict) or key not in node:
                raise KeyError(path)
            node = node[key]
        if not isinstance(node, dict) or last not in node:
            raise KeyError(path)
        node[last] = deepcopy(value)
    return values


def fitted(values: Values) -> Values:
    """The values with the settings that follow from others set to what they must be.

    Pooled frames have no queries and so no fine passes; there is one fine weight per fine pass (the last one repeats); the
    micro-batch is the largest divisor of the batch that is not above what was asked for.
    """
    values = deepcopy(values)
    model, loss, run = values["model"], values["loss"], values["run"]
    if model["query"] == "pooled":
        model["fine_iterations"] = 0
    weights, passes = loss["fine"], model["fine_iterations"]
    loss["fine"] = [*weights, *[weights[-1] if weights else 1.0] * (passes - len(weights))][:passes]
    if not passes and loss["coarse"] <= 0:
        loss["coarse"] = 1.0
    batch = run["batch_samples"]
    run["micro_batch_samples"] = max(size for size in range(1, batch + 1) if batch % size == 0 and size <= run["micro_batch_samples"])
    return values


def paths(values: Values, prefix: str = "") -> list[str]:
    """The dotted paths of all settings in `values`, lists whole."""
    found = []
    for name, value in values.items():
        found += paths(value, f"{prefix}{name}.") if isinstance(value, dict) else [f"{prefix}{name}"]
    return found
