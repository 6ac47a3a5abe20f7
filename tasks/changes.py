"""Settings of a recipe that follow from others: the loss weights of the fine passes from their number, the micro-batch from the batch."""

from copy import deepcopy
from typing import Any

Values = dict[str, Any]


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
