"""Gaze before encode: opening all equals all open, parents do not disturb each other, inference reads what training does."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fvlm_core.data.batch import pack
from fvlm_core.eval.subject import Subject
from fvlm_core.model.attention import PackedLayout
from fvlm_core.model.encoder import Encoder
from fvlm_core.model.foveated import FoveatedVLM
from fvlm_core.model.glance import (
    children_of,
    encode_glance,
    open_patches,
    positions_at,
    read_with_glance,
)
from fvlm_core.model.inference import gaze, read_batch
from fvlm_core.serve.batched_decoding import read
from fvlm_core.serve.look import MARGIN_PX, PANEL_PX, TITLE_PX, pictures
from fvlm_core.serve.session import Gaze
from fvlm_core.serve.stream import FrameStream
from tests.model.build import CHAT, sample
from tests.model.build_glance import ALL, DEEPEST, ZOOMS, everything, frames_of, glance_model, large, packed

# an independent reference: transformers' Dinov2Model for its weights, attention written out, one patch's children at a time


def reference_tokens(model: FoveatedVLM, frame: torch.Tensor, queries: torch.Tensor, *, opened: bool) -> torch.Tensor:
    """Tokens [Q, llm width] of one frame uint8 [H, W, 3] read with queries [Q, D], everything open or nothing; one level."""
    glance, dino = model.settings.glance, model.encoder.to_dinov2().double()
    assert glance is not None
    size, mean, std = 14, model.encoder.pixel_mean, model.encoder.pixel_std
    zoom = glance.shrink
    small = F.avg_pool2d(frame.double().permute(2, 0, 1)[None], zoom)
    with torch.no_grad():
        outputs = dino((small - mean) / std, output_hidden_states=True)
    glance_states = [state[0] for state in outputs.hidden_states[:-1]]  # entering each layer
    side, children = small.shape[-1] // size, {}
    table = dino.embeddings.position_embeddings[0, 1:].view(side * zoom, side * zoom, -1)
    for parent in range(side**2 if opened else 0):
        row, column = divmod(parent, side)
        states = []
        for i in range(zoom):
            for j in range(zoom):
                y, x = row * zoom + i, column * zoom + j
                pixels = frame[y * size : (y + 1) * size, x * size : (x + 1) * size].double().permute(2, 0, 1)[None]
                embedded = dino.embeddings.patch_embeddings((pixels - mean) / std)[0, 0]
                states.append(embedded + table[y, x] + model.connector.scale_embeddings[0])
        x, layers = torch.stack(states), []
        for number, layer in enumerate(dino_layers(dino)):
            layers.append(x)
            x = one_layer(layer, x, torch.cat([glance_states[number], x]), None, 1.0)
        children[parent] = layers
    q, seen = queries @ model.connector.query_input_proj.weight.T, glance_states
    bias = None
    if opened:
        probe = q
        for number, layer in enumerate(dino_layers(dino)):
            probe, weights = one_layer(layer, probe, seen[number], None, 1.0), attention(layer, probe, seen[number], None, 1.0)
        p = weights.mean(0)[:, 1:]
        p = p / p.sum(-1, keepdim=True)
        bias = torch.cat([torch.zeros(len(q), side**2 + 1), (p + 1e-6).log().repeat_interleave(zoom**2, 1)], 1).double()
        seen = [torch.cat([seen[number], *(children[parent][number] for parent in range(side**2))]) for number in range(len(seen))]
    for number, layer in enumerate(dino_layers(dino)):
        q = one_layer(layer, q, seen[number], bias, 1.0)
    return dino.layernorm(q) @ model.connector.visual_proj.weight.T + model.connector.visual_proj.bias


def dino_layers(dino):
    """In transformers before and after 5.18."""
    return dino.encoder.layer if hasattr(dino, "encoder") else dino.layers


def parts_of(layer):
    """The query, key, value and output projections of a transformers layer of either release."""
    inner = getattr(layer.attention, "attention", layer.attention)
    names = ("q_proj", "k_proj", "v_proj") if hasattr(inner, "q_proj") else ("query", "key", "value")
    out = layer.attention.o_proj if hasattr(layer.attention, "o_proj") else layer.attention.output.dense
    return *(getattr(inner, name) for name in names), out


def attention(layer, q, seen, bias, temperature):
    """Weights [heads, Q, N]."""
    to_q, to_k, *_ = parts_of(layer)
    split = lambda x: x.view(len(x), 2, -1).transpose(0, 1)  # noqa: E731
    logits = split(to_q(layer.norm1(q))) @ split(to_k(layer.norm1(seen))).transpose(1, 2) / (16**0.5 * temperature)
    return (logits if bias is None else logits + bias).softmax(-1)


def one_layer(layer, q, seen, bias, temperature):
    """q [Q, D] after it has attended to tokens [N, D]."""
    *_, to_v, out = parts_of(layer)
    values = to_v(layer.norm1(seen)).view(len(seen), 2, -1).transpose(0, 1)
    attended = (attention(layer, q, seen, bias, temperature) @ values).transpose(0, 1).flatten(1)
    q = q + layer.layer_scale1(out(attended))
    return q + layer.layer_scale2(layer.mlp(layer.norm2(q)))


@pytest.mark.parametrize("k", [1, 4])
@torch.no_grad()
def test_fine_with_everything_open_equals_plain_pytorch(k):
    """Encoder, choice and read against the reference; the language model is the project's own, tested elsewhere."""
    model = glance_model(open=ALL, k=k)
    batch = packed(model)
    shown = [batch.frames[n] for n in batch.shown_frames.tolist()]
    coarse = read_batch(model, batch, "coarse_only")
    expected = torch.stack([reference_tokens(model, frame, model.connector.q_static, opened=False) for frame in shown])
    torch.testing.assert_close(coarse.tokens, expected, rtol=1e-5, atol=1e-6)
    queries = model.queries(coarse.hidden, batch)
    expected = torch.stack([reference_tokens(model, frame, q, opened=True) for frame, q in zip(shown, queries, strict=True)])
    torch.testing.assert_close(read_batch(model, batch, "coarse_fine").tokens, expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_autoregressive_equals_frame_by_frame():
    """Every frame's query is recomputed from all tokens before it, its frame read by the reference; a stream says the same."""
    model = glance_model(open=ALL)
    clip = large([sample(np.random.default_rng(2), frames=4, question_first=True, answer=0)], model)[0]
    batch = pack([clip], CHAT)
    found = read_batch(model, batch, "autoregressive")
    embeddings = model.embed(batch.input_ids)
    for number in range(4):
        hidden = model.run_llm(embeddings, batch.position_ids, PackedLayout(batch.lengths))
        query = model.queries(hidden, batch)[number]
        token = reference_tokens(model, batch.frames[number], query, opened=True)
        embeddings[batch.visual_positions[number]] = token
        torch.testing.assert_close(found.tokens[number], token, rtol=1e-5, atol=1e-6)
    stream = FrameStream(model, CHAT, task_ids=clip.turns[0].question_ids, reserve=32)
    for frame in clip.frames:
        stream.push(frame)
    torch.testing.assert_close(torch.stack(stream.tokens), found.tokens)


@pytest.mark.parametrize("shape", DEEPEST, ids=str)
@pytest.mark.parametrize("n_queries", [1, 3])
@torch.no_grad()
def test_opening_all_equals_all_open(shape, n_queries):
    model = glance_model(**shape, open=1000)
    full = everything(model, frames_of(model, 2))
    queries = torch.randn(2, n_queries, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    chosen, scales = model.settings.glance, model.connector.scale_embeddings
    assert chosen is not None
    expected = read_with_glance(model.encoder, full, queries, chosen, scales, weights=True)
    found = read_with_glance(model.encoder, encode_glance(model.encoder, full.frames, chosen), queries, chosen, scales, weights=True)
    torch.testing.assert_close(found.read, expected.read, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.weights, expected.weights, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.weights.sum(-1), torch.ones(2, 2, n_queries))
    assert found.opened.shape == (2, n_queries, ALL)


@pytest.mark.parametrize("shape", DEEPEST, ids=str)
@pytest.mark.parametrize("n_queries", [1, 3])
@pytest.mark.parametrize("k", [1, 2, ALL])
def test_inference_walks_to_what_training_reads(shape, n_queries, k):
    """Patches and query together and in place, against one after the other with gradients; of some queries, at another temperature."""
    model = glance_model(**shape, open=k)
    chosen, scales = model.settings.glance, model.connector.scale_embeddings
    assert chosen is not None
    features = encode_glance(model.encoder, frames_of(model, 2), chosen)
    queries = torch.randn(2, n_queries, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    expected = read_with_glance(model.encoder, features, queries, chosen, scales, 0.7, weights=True, teach=True)
    with torch.no_grad():
        found = read_with_glance(model.encoder, features, queries, chosen, scales, 0.7, weights=True, teach=True)
    assert expected.read.requires_grad
    assert torch.equal(found.opened, expected.opened)
    torch.testing.assert_close(found.read, expected.read, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.weights, expected.weights, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.selection_loss, expected.selection_loss, rtol=1e-9, atol=1e-9)


@settings(max_examples=15, deadline=None)
@given(k=st.integers(1, ALL), seed=st.integers(0, 99), shape=st.sampled_from(DEEPEST[:2]))
@torch.no_grad()
def test_a_parents_keys_and_values_do_not_depend_on_what_else_is_open(k, seed, shape):
    model = glance_model(**shape)
    full = everything(model, frames_of(model, 2))
    chosen = torch.stack([torch.randperm(ALL, generator=torch.Generator().manual_seed(seed + row))[:k] for row in range(2)])
    places = torch.arange(ALL).expand(2, -1)
    assert model.settings.glance is not None
    children = children_of(model.encoder, full, model.settings.glance, model.connector.scale_embeddings, 0, chosen, places, places)
    opened = open_patches(model.encoder, full, children)
    per_parent = shape["zoom"] ** 2
    index = (chosen[..., None] * per_parent + torch.arange(per_parent)).flatten(1)
    (every,) = full.all_patches
    assert torch.equal(opened.places, every.places.gather(1, index))
    assert torch.equal(opened.roots, opened.parents)
    for some, all_ in zip(opened.keys + opened.values, list(every.keys) + list(every.values), strict=True):
        torch.testing.assert_close(some, all_.gather(2, index[:, None, :, None].expand_as(some)), rtol=1e-10, atol=1e-11)


@settings(max_examples=12, deadline=None)
@given(zooms=ZOOMS, k=st.integers(1, 3), seed=st.integers(0, 99))
@torch.no_grad()
def test_with_a_zoom_per_level_patches_are_those_of_the_frame_at_their_levels_size(zooms, k, seed):
    """What is opened, level by level, against the complete frame at that level's size, cut up by the encoder's convolution."""
    model = glance_model(zoom=zooms, levels=len(zooms))
    encoder, chosen, scales = model.encoder, model.settings.glance, model.connector.scale_embeddings
    assert chosen is not None
    features = encode_glance(encoder, frames_of(model, 1), chosen)
    places = roots = torch.arange(ALL)[None]
    generator = torch.Generator().manual_seed(seed)
    for level in range(len(zooms)):
        picked = torch.randperm(places.shape[1], generator=generator)[None, :k]
        found = children_of(encoder, features, chosen, scales, level, picked, places, roots)
        pixels = features.frames.double().permute(0, 3, 1, 2)
        pixels = F.avg_pool2d(pixels, int(np.prod(zooms[level + 1 :])))
        side = pixels.shape[-1] // encoder.patch_px
        embedded = encoder.patches((pixels - encoder.pixel_mean) / encoder.pixel_std).flatten(2)[0].T
        expected = embedded + encoder.positions((side, side))[0, 1:] + scales[level]
        torch.testing.assert_close(found.x[0], expected[found.places[0]], rtol=1e-5, atol=1e-5)
        above = side // zooms[level]
        for parent, place in zip(picked[0].repeat_interleave(zooms[level] ** 2).tolist(), found.places[0].tolist(), strict=True):
            row, column = divmod(place, side)
            assert int(places[0, parent]) == row // zooms[level] * above + column // zooms[level]
        assert torch.equal(found.roots[0], (found.places[0] // side // (side // 3)) * 3 + found.places[0] % side // (side // 3))
        assert len(set(found.places[0].tolist())) == k * zooms[level] ** 2
        places, roots = found.places, found.roots


@settings(max_examples=10, deadline=None)
@given(zooms=ZOOMS, k=st.integers(1, 3))
def test_with_a_zoom_per_level_inference_walks_to_what_training_reads(zooms, k):
    model = glance_model(zoom=zooms, levels=len(zooms), open=k)
    chosen, scales = model.settings.glance, model.connector.scale_embeddings
    assert chosen is not None
    features = encode_glance(model.encoder, frames_of(model, 2), chosen)
    queries = torch.randn(2, 1, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    expected = read_with_glance(model.encoder, features, queries, chosen, scales, weights=True, teach=True)
    with torch.no_grad():
        found = read_with_glance(model.encoder, features, queries, chosen, scales, weights=True, teach=True)
    assert torch.equal(found.opened, expected.opened)
    torch.testing.assert_close(found.read, expected.read, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.selection_loss, expected.selection_loss, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_a_list_of_equal_zooms_is_that_zoom():
    one, several = glance_model(zoom=2, levels=2), glance_model(zoom=[2, 2], levels=2)
    batch = packed(one)
    assert torch.equal(read_batch(one, batch, "coarse_fine").tokens, read_batch(several, batch, "coarse_fine").tokens)


def test_the_finest_patches_are_the_frames_own_pixels():
    """With two levels, the patches of the last one cover the frame, and the first one's are their means."""
    model = glance_model(zoom=2, levels=2)
    frames = frames_of(model, 1)
    _, finest = everything(model, frames).all_patches
    assert sorted(finest.places[0].tolist()) == list(range(144))
    encoder, at = model.encoder, 17
    place = int(finest.places[0, at])
    alone = frames.unflatten(1, (12, 14)).unflatten(3, (12, 14)).transpose(2, 3)[0, place // 12, place % 12]
    x = encoder.patches((alone.double().permute(2, 0, 1)[None] - encoder.pixel_mean) / encoder.pixel_std)[0, :, 0, 0]
    x = x + encoder.position_embeddings[0, 1 + place] + model.connector.scale_embeddings[1]
    key, *_ = encoder.layers[0].keys_values(x[None, None])
    torch.testing.assert_close(finest.keys[0][0, :, at], key[0, :, 0])


@pytest.mark.parametrize("grid", [(2, 2), (3, 5), (6, 6), (13, 13)])
def test_positions_at_patches_are_those_of_the_grid(grid):
    encoder: Encoder = glance_model().encoder.float()
    down, right = (part.flatten() for part in torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij"))
    torch.testing.assert_close(positions_at(encoder, grid, down, right), encoder.positions(grid)[0, 1:], rtol=1e-4, atol=1e-5)


def test_gaze_is_over_the_glance_with_what_was_opened_below():
    model = glance_model(k=4)
    maps = gaze(model, packed(model), "autoregressive")
    assert maps.shape[1:] == (4, 3, 3)
    torch.testing.assert_close(maps.sum((-1, -2)), torch.ones(maps.shape[:2]), check_dtype=False)


def test_serving_shows_the_gaze():
    """What `fvlm look` draws: a map a frame, over the glance."""
    model = glance_model(zoom=3)
    subject = Subject(model, None, CHAT, torch.device("cpu"), batch_samples=4)
    clips = large([sample(np.random.default_rng(3), frames=n, answer=0) for n in (2, 3)], model)
    found = read(subject, clips, "autoregressive", gaze=True, room=1)
    maps = found.gaze
    assert [part.shape for part in maps] == [(2, 3, 3), (3, 3, 3)]
    assert np.concatenate(maps).sum((1, 2)) == pytest.approx(np.ones(5))
    assert found.opened is not None
    assert [part.shape for part in found.opened] == [(2, 2), (3, 2)]
    assert read(subject, clips, "coarse_only", gaze=True, room=1).opened is None


def test_the_clip_of_where_it_looks_frames_what_was_opened():
    frames, even = np.zeros((1, 42, 42, 3), np.uint8), np.full((1, 3, 3), 1 / 9)
    plain, framed = (
        np.asarray(next(pictures(Gaze(frames, even, even, np.ones(1), opened), ""))).astype(int) for opened in (None, np.array([[1, 5]]))
    )
    rows, columns = np.nonzero(np.abs(framed - plain).sum(-1))
    patch, left = PANEL_PX // 3, 3 * MARGIN_PX + 2 * PANEL_PX
    drawn = set(zip(((rows - TITLE_PX) // patch).tolist(), ((columns - left) // patch).tolist(), strict=True))
    assert drawn == {(0, 1), (1, 2)}
