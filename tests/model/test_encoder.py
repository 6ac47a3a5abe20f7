"""The encoder against transformers' own Dinov2Model."""

import pytest
import torch
from transformers import Dinov2Config, Dinov2Model

from fvlm_core.model.encoder import PATCHES_IN_CACHE, PIXEL_MEAN, PIXEL_STD, Encoder


@pytest.fixture(params=[(42, 42, 5), (56, 42, PATCHES_IN_CACHE // 8 + 3), (70, 42, 5)], ids=lambda p: f"frames{p[0]}x{p[2]}-table{p[1]}")
def pair(request):
    """A Dinov2Model with random weights, our encoder of it, and frames [F, H, W, 3] (of sizes the table is resampled for,
    and more than are encoded at a time)."""
    frame_px, image_px, n_frames = request.param
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=image_px, patch_size=14, mlp_ratio=3)
    dinov2 = Dinov2Model(config).eval()
    for parameter in dinov2.parameters():
        parameter.data += torch.randn_like(parameter) * 0.1
    return dinov2, Encoder.from_dinov2(dinov2).eval(), torch.randint(0, 256, (n_frames, frame_px, frame_px, 3), dtype=torch.uint8)


def pixels(frames: torch.Tensor) -> torch.Tensor:
    mean, std = torch.tensor(PIXEL_MEAN).view(3, 1, 1), torch.tensor(PIXEL_STD).view(3, 1, 1)
    return (frames.permute(0, 3, 1, 2) / 255 - mean) / std


def test_patches_equal_transformers(pair):
    dinov2, encoder, frames = pair
    with torch.no_grad():
        expected = dinov2(pixels(frames)).last_hidden_state
        ours = encoder.encode(frames, patches=True).patches
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_query_that_is_a_patch_reads_that_patch(pair):
    """A query with a patch's own input goes the patch's way: the K and V kept are the ones patches attend to."""
    dinov2, encoder, frames = pair
    with torch.no_grad():
        outputs = dinov2(pixels(frames), output_hidden_states=True)
        features = encoder.encode(frames)
        read, _ = encoder.query(features, outputs.hidden_states[0])
    assert features.patches is None
    torch.testing.assert_close(read, outputs.last_hidden_state, atol=1e-5, rtol=1e-5)


def test_weights_go_back_to_transformers(pair):
    dinov2, encoder, _ = pair
    back = encoder.to_dinov2().state_dict()
    for name, tensor in dinov2.state_dict().items():
        if name != "embeddings.mask_token":
            assert torch.equal(back[name], tensor), name


def test_names_of_transformers_before_5_18_load(pair):
    dinov2, encoder, _ = pair
    old = {
        name.replace("attention.q_proj", "attention.attention.query")
        .replace("attention.k_proj", "attention.attention.key")
        .replace("attention.v_proj", "attention.attention.value")
        .replace("attention.o_proj", "attention.output.dense"): tensor
        for name, tensor in dinov2.state_dict().items()
    }

    class Old:
        config = dinov2.config
        state_dict = staticmethod(lambda: old)

    for name, tensor in Encoder.from_dinov2(Old()).state_dict().items():
        assert torch.equal(tensor, encoder.state_dict()[name]), name


def test_attention_weights_make_what_is_read(pair):
    """The weights shown in heat maps are those that the last layer used."""
    _, encoder, frames = pair
    with torch.no_grad():
        features = encoder.encode(frames)
        _, entering = encoder.query(features, torch.randn(len(frames), 2, 48))
        weights = encoder.attention(features, entering)
        last = encoder.layers[-1]
        attended = (weights @ features.values[-1]).transpose(1, 2).flatten(2)
        by_hand = last._output(entering, attended.unflatten(2, (4, 12)).transpose(1, 2))
        by_layer = last.query(entering, features.keys[-1], features.values[-1], 1.0)
    torch.testing.assert_close(weights.sum(-1), torch.ones(len(frames), 4, 2))
    torch.testing.assert_close(by_hand, by_layer, atol=1e-5, rtol=1e-5)


def test_frames_that_do_not_fit_the_patches_are_refused():
    encoder = Encoder(Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14))
    with pytest.raises(ValueError, match="40x42 px are not a multiple of the patch size 14"):
        encoder.encode(torch.zeros(1, 40, 42, 3, dtype=torch.uint8))
