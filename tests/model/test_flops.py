"""FLOPs from the configuration against those that torch counts in a real step."""

import numpy as np
import pytest

from fvlm_core.config import LossSettings
from fvlm_core.data.batch import IGNORE, pack
from fvlm_core.model.flop_counter import count_flops
from fvlm_core.model.flops import ModelDims, SampleShape, sample_flops, samples_for
from tests.model.build import CHAT, FRAME_PX, VARIANTS, mixed, tiny_model


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("coarse", [0.0, 1.0])
def test_configuration_says_what_a_step_costs(variant, coarse):
    model = tiny_model(**variant).float().train()
    loss = LossSettings(coarse=coarse or float(variant["query"] == "pooled"), fine=[coarse, 1.0][: model.settings.fine_iterations])
    samples, k = mixed(np.random.default_rng(1)), model.settings.tokens_per_frame
    batch = pack(samples, CHAT, tokens_per_frame=k)
    dims = ModelDims.from_configs(model.encoder.config.to_dict(), model.llm.config.to_dict(), FRAME_PX)
    labels = [int((part != IGNORE).sum()) for part in batch.labels.split(batch.lengths)]
    shapes = [
        SampleShape(len(sample.frames), shown, length - k * shown, n_labels, prefix)
        for sample, shown, length, n_labels, prefix in zip(
            samples, batch.shown_counts, batch.label_prefix, labels, batch.query_prefix, strict=True
        )
    ]
    forward = count_flops(lambda: model(batch, loss))
    for frozen in ((), ("vision",), ("llm",), ("vision", "llm")):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(model.role(name) not in frozen)
        costs = [sample_flops(model.settings, dims, shape, loss, frozen=frozen) for shape in shapes]
        assert sum(cost.forward for cost in costs) == pytest.approx(forward, rel=0.005)
        assert sum(cost.train for cost in costs) == pytest.approx(count_flops(lambda: model(batch, loss).objective.backward()), rel=0.02), (
            frozen
        )


def test_samples_for_a_budget():
    assert samples_for(1e12, 1e9) == 1000
    assert samples_for(1.0, 1e9) == 1
