"""A glance's settings: what is refused, what a saved and a released model keep, the recipes for a pod."""

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from fvlm_core.config import ModelSettings, Recipe
from fvlm_core.errors import UserError
from fvlm_core.model.build import build_model, load_model, save_model
from fvlm_core.model.convert import to_original
from fvlm_core.model.inference import read_batch
from fvlm_core.release.hub.configuration_fvlm import FVLMConfig
from fvlm_core.release.hub.modeling_fvlm import FVLMModel
from fvlm_core.release.hub_folder import configuration
from tests.model.build import VOCAB, tiny_model, tiny_settings
from tests.model.build_glance import GLANCE_PX, glance_model, glance_settings, packed

RECIPES = Path(__file__).parents[2] / "deployments" / "recipes"


def test_a_saved_model_comes_back_and_the_original_is_refused(tmp_path):
    model = build_model(glance_settings(levels=2), vocab_size=VOCAB)
    save_model(model, tmp_path / "model")
    again = load_model(tmp_path / "model")
    assert again.settings.glance == model.settings.glance
    assert {name for name in model.state_dict() if name.startswith("encoder.")} == {
        f"encoder.{name}" for name in tiny_model().encoder.state_dict()
    }
    with pytest.raises(UserError, match="encodes every frame in full"):
        to_original(model)


def test_the_released_configuration_makes_the_same_model(tmp_path):
    """Through the JSON file that a released folder holds."""
    model = glance_model(levels=2, zoom=[3, 2]).float()
    recipe = Recipe.from_yaml(RECIPES / "glance_all.yaml").with_changes({"model": model.settings.model_dump(mode="json")})
    configuration(model, recipe).save_pretrained(tmp_path)
    released = FVLMModel(FVLMConfig.from_pretrained(tmp_path)).eval()
    released.model.load_state_dict(model.state_dict())
    batch = packed(model)
    for mode in model.modes:
        assert torch.equal(read_batch(released.model, batch, mode).tokens, read_batch(model, batch, mode).tokens)


def test_a_model_without_a_glance_is_what_it_was():
    """Its identity, which decides what is made again, has no trace of the setting."""
    assert "glance" not in tiny_settings().identity_values()
    assert glance_settings().identity_values()["glance"]["px"] == GLANCE_PX
    assert not hasattr(tiny_model().connector, "scale_embeddings")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"px": 40}, "is not glance.px"),
        ({"zoom": 3, "levels": 2}, "is not glance.px"),
        ({"levels": 0}, "greater than or equal to 1"),
        ({"zoom": [2, 2]}, "zoom has 2 values, levels is 1"),
        ({"zoom": [2, 1], "levels": 2}, "greater than or equal to 2"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, message):
    values = glance_settings().model_dump()
    with pytest.raises(ValidationError, match=message):
        ModelSettings.model_validate(values | {"glance": values["glance"] | changes})
    with pytest.raises(ValidationError, match="needs query 'deep'"):
        ModelSettings.model_validate(values | {"query": "shallow"})


def test_frames_of_another_size_are_refused():
    model = glance_model()
    with pytest.raises(ValueError, match="not a multiple of 28"):
        model.encode(torch.zeros(1, 98, 84, 3, dtype=torch.uint8))


def test_the_recipes_for_a_pod_follow_on_each_other():
    first, second = (Recipe.from_yaml(RECIPES / f"glance_{name}.yaml") for name in ("all", "chosen"))
    assert second.init_from == first.output
    assert first.model.glance is not None
    assert second.model.glance == first.model.glance.model_copy(update={"train_on": "chosen"})
    assert second.optimizer.lr_connector == first.optimizer.lr_connector / 2
    assert (first.data, first.shards, first.model.vision) == (second.data, second.shards, second.model.vision)
