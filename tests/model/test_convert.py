"""The converter, against the original's function written out with transformers' own modules."""

import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaForCausalLM

from deployments import cli
from fvlm_core.config import LossSettings
from fvlm_core.data.batch import IGNORE, ChatFormat, pack
from fvlm_core.data.tokenizer import chat_format, load_tokenizer, train_tokenizer
from fvlm_core.errors import UserError
from fvlm_core.model.build import build_model, load_model, save_model
from fvlm_core.model.convert import VISUAL_SCALE, convert_to_original, convert_to_ours, load_original, read_original, to_original
from fvlm_core.model.encoder import PIXEL_MEAN, PIXEL_STD
from fvlm_core.model.foveated import FoveatedVLM
from fvlm_core.model.inference import logits, read_batch
from fvlm_core.model.names import MODES
from tests.model.build import VOCAB, sample, tiny_model, tiny_settings

NO_TEMPLATE = ChatFormat(system=[], user_open=[], user_close=[], assistant_open=[], assistant_close=[2])


def original_state(seed: int = 0) -> dict[str, torch.Tensor]:
    """A checkpoint in the original's layout, with an output projection that is not the identity."""
    state = to_original(tiny_model().float())
    generator = torch.Generator().manual_seed(seed)
    for name in ("encoder.output_proj.weight", "encoder.output_proj.bias", "dino_to_llm.bias", "llm_to_query.bias"):
        state[name] = torch.randn(state[name].shape, generator=generator) * 0.3
    return state


def original_tokens(model, state, frames: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    """The original's visual tokens [T, llm width] of frames [T, H, W, 3] and queries [T, D]: every layer's keys and values are
    projected from the hidden states that transformers gives out."""
    dinov2 = model.encoder.to_dinov2().eval()
    pixels = (frames.permute(0, 3, 1, 2) / 255 - torch.tensor(PIXEL_MEAN).view(3, 1, 1)) / torch.tensor(PIXEL_STD).view(3, 1, 1)
    hidden = dinov2(pixels, output_hidden_states=True).hidden_states
    q = F.linear(queries, state["encoder.query_input_proj.weight"])[:, None]
    for number, x in enumerate(hidden[:-1]):
        prefix = f"encoder.dino.encoder.layer.{number}."
        q = original_layer({name.removeprefix(prefix): p for name, p in state.items() if name.startswith(prefix)}, q, x)
    q = F.layer_norm(q, q.shape[-1:], state["encoder.dino.layernorm.weight"], state["encoder.dino.layernorm.bias"], 1e-6)
    z = F.linear(q[:, 0], state["encoder.output_proj.weight"], state["encoder.output_proj.bias"])
    return VISUAL_SCALE * F.linear(z, state["dino_to_llm.weight"], state["dino_to_llm.bias"])


def original_layer(weights: dict[str, torch.Tensor], q: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Queries [T, 1, D] through one DINOv2 layer whose patches enter as x [T, N, D]."""

    def linear(v: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(v, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(v: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(v, v.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-6)

    def heads(v: torch.Tensor, name: str) -> torch.Tensor:
        return linear(norm(v, "norm1"), f"attention.attention.{name}").unflatten(-1, (2, -1)).transpose(1, 2)

    query, key, value = heads(q, "query"), heads(x, "key"), heads(x, "value")
    attended = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(-1) @ value
    q = q + linear(attended.transpose(1, 2).flatten(2), "attention.output.dense") * weights["layer_scale1.lambda1"]
    return q + linear(F.gelu(linear(norm(q, "norm2"), "mlp.fc1")), "mlp.fc2") * weights["layer_scale2.lambda1"]


@torch.no_grad()
def test_original_weights_have_the_original_function():
    """Coarse pass, queries from its hidden states, fine tokens, logits and loss."""
    state = original_state()
    model = build_model(tiny_settings(fine_iterations=1), vocab_size=VOCAB).eval()
    load_original(model, state)
    one = sample(np.random.default_rng(1), frames=4, question=5)
    batch = pack([one], NO_TEMPLATE)
    frames = torch.from_numpy(one.frames)
    coarse = original_tokens(model, state, frames, state["q_static"].expand(4, -1))
    torch.testing.assert_close(read_batch(model, batch, "coarse_only").tokens[:, 0], coarse, atol=1e-5, rtol=1e-5)
    llm = model.llm.to_transformers()
    llm.set_attn_implementation("eager")
    text = model.embed(batch.input_ids[4:])
    hidden = llm.model(inputs_embeds=torch.cat([coarse, text])[None]).last_hidden_state[0]
    made = F.linear(hidden[:3], state["llm_to_query.weight"], state["llm_to_query.bias"])
    fine = original_tokens(model, state, frames, torch.cat([state["q_init"], made]))
    expected = llm(inputs_embeds=torch.cat([fine, text])[None]).logits[0]
    torch.testing.assert_close(logits(model, batch, "coarse_fine"), expected, atol=1e-4, rtol=1e-4)
    kept = batch.labels != IGNORE
    loss = model(batch, LossSettings(coarse=0.0, fine=[1.0])).objective / batch.n_labels
    torch.testing.assert_close(loss, F.cross_entropy(expected[kept], batch.labels[kept]), atol=1e-5, rtol=1e-5)


def test_there_and_back_is_the_same_function():
    state = original_state()
    first, second = (build_model(tiny_settings(fine_iterations=1), vocab_size=VOCAB).eval() for _ in range(2))
    load_original(first, state)
    back = to_original(first)
    assert set(back) == set(state)
    load_original(second, back)
    batch = pack([sample(np.random.default_rng(2), frames=3, question_first=True)], NO_TEMPLATE)
    torch.testing.assert_close(logits(second, batch, "autoregressive"), logits(first, batch, "autoregressive"), atol=1e-5, rtol=1e-5)


def test_the_original_loads_it_strictly():
    """As `load_state_dict` of the original's modules does: nothing missing, nothing left over, every shape right."""
    model = tiny_model().float()
    original = original_modules(model)
    original.load_state_dict(to_original(model), strict=True)
    assert original.llm.lm_head.weight is original.llm.model.embed_tokens.weight
    assert torch.equal(original.llm.lm_head.weight, model.llm.lm_head.weight)


def original_modules(model: FoveatedVLM) -> nn.Module:
    """The original's modules, with DINOv2's as of transformers 5.17, in the sizes of a model of ours."""
    config = model.encoder.config
    width, mlp, llm_width = config.hidden_size, config.hidden_size * config.mlp_ratio, model.llm.config.hidden_size
    linear, norm = partial(nn.Linear, width, width), partial(nn.LayerNorm, width)

    def parameter(*shape: int) -> nn.Parameter:
        return nn.Parameter(torch.zeros(shape))

    layers = [
        tree(
            norm1=norm(),
            attention=tree(attention=tree(query=linear(), key=linear(), value=linear()), output=tree(dense=linear())),
            layer_scale1=tree(lambda1=parameter(width)),
            norm2=norm(),
            mlp=tree(fc1=nn.Linear(width, mlp), fc2=nn.Linear(mlp, width)),
            layer_scale2=tree(lambda1=parameter(width)),
        )
        for _ in range(config.num_hidden_layers)
    ]
    embeddings = tree(
        cls_token=parameter(1, 1, width),
        mask_token=parameter(1, width),
        patch_embeddings=tree(projection=nn.Conv2d(3, width, config.patch_size, config.patch_size)),
        position_embeddings=parameter(1, 1 + (config.image_size // config.patch_size) ** 2, width),
    )
    dino = tree(embeddings=embeddings, encoder=tree(layer=nn.ModuleList(layers)), layernorm=norm())
    return tree(
        encoder=tree(dino=dino, query_input_proj=linear(bias=False), output_proj=linear()),
        llm=LlamaForCausalLM(model.llm.config),
        dino_to_llm=nn.Linear(width, llm_width),
        llm_to_query=nn.Linear(llm_width, width),
        q_static=parameter(1, width),
        q_init=parameter(1, width),
    )


def tree(**children: nn.Module | nn.Parameter) -> nn.Module:
    module = nn.Module()
    for name, child in children.items():
        setattr(module, name, child)
    return module


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """`model/` of a finished run, and `dinov2/` and `llm/` as the hub has them, without weights."""
    folder = tmp_path_factory.mktemp("finished")
    tokenizer = train_tokenizer(["Which digit?"], 300)
    tokenizer.save_pretrained(folder / "llm")
    model = build_model(tiny_settings(fine_iterations=1), vocab_size=300, seed=4)
    save_model(model, folder / "model", tokenizer=folder / "llm")
    model.encoder.config.save_pretrained(folder / "dinov2")
    model.llm.config.save_pretrained(folder / "llm")
    return folder


def backbones(finished: Path) -> dict[str, str]:
    return {"vision": str(finished / "dinov2"), "llm": str(finished / "llm")}


@pytest.fixture
def fvlm(monkeypatch, capsys):
    """Runs the command in this process: its exit status and what it prints."""

    def run(*arguments: str | Path) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["fvlm", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        return ended.value.code, printed.out + printed.err

    return run


@pytest.mark.filterwarnings("ignore:Cyclopts application invoked")
def test_there_and_back_by_command(finished, fvlm, tmp_path):
    there, back = tmp_path / "new" / "original.safetensors", tmp_path / "other" / "model"
    assert fvlm("convert", "original", finished / "model", there)[0] == 0
    named = [argument for name, place in backbones(finished).items() for argument in (f"--{name}", place)]
    assert fvlm("convert", "ours", there, back, *named, "--frame-px", "42")[0] == 0
    first, second = load_model(finished / "model").eval(), load_model(back).eval()
    assert second.settings.vision.frame_px == 42
    assert sorted(path.name for path in back.iterdir()) == sorted(path.name for path in (finished / "model").iterdir())
    chat = chat_format(load_tokenizer(back))
    batch = pack([sample(np.random.default_rng(3), frames=3, question_first=True)], chat)
    for mode in MODES:
        torch.testing.assert_close(logits(second, batch, mode), logits(first, batch, mode), atol=1e-5, rtol=1e-5)
    status, printed = fvlm("convert", "original", finished / "model", there)
    assert (status, "not overwritten" in printed) == (2, True)


def test_every_form_of_a_checkpoint_is_read(tmp_path):
    state = original_state()
    save_file(state, tmp_path / "one.safetensors")
    trainers = {name.replace("llm.", "llm._orig_mod.", 1): tensor for name, tensor in state.items()}  # compiled
    torch.save({"model_state_dict": trainers, "optimizer_state_dict": {"state": {}}, "step": 7}, tmp_path / "latest.pt")
    (tmp_path / "hub").mkdir()
    (tmp_path / "parts").mkdir()
    save_file(state, tmp_path / "hub" / "model.safetensors")
    save_torch_state_dict(state, tmp_path / "parts", max_shard_size="20KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    for name in ("one.safetensors", "latest.pt", "hub", "parts"):
        read = read_original(tmp_path / name)
        assert set(read) == set(state), name
        assert all(torch.equal(read[key], tensor) for key, tensor in state.items()), name


@pytest.mark.parametrize(
    ("name", "content"),
    [("none.safetensors", None), ("text.safetensors", b"text"), ("text.pt", b"text"), ("empty.pt", b""), ("folder", None)],
)
def test_what_is_no_checkpoint_is_refused(name, content, finished, tmp_path):
    if name == "folder":
        (tmp_path / name).mkdir()
    elif content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match="cannot read the checkpoint"):
        convert_to_ours(tmp_path / name, tmp_path / "out", **backbones(finished), frame_px=42)
    assert not (tmp_path / "out").exists()


def test_nothing_is_written_where_something_does_not_fit(finished, tmp_path):
    checkpoint, out = tmp_path / "original.safetensors", tmp_path / "out" / "model"
    convert_to_original(finished / "model", checkpoint)
    names = backbones(finished)
    torch.save([1, 2], tmp_path / "list.pt")
    for changes, why in (
        ({"vision": names["llm"]}, "a llama, not a dinov2"),
        ({"llm": "nobody/no-such-model"}, "cannot load the configuration"),
        ({"tokenizer": str(tmp_path)}, "cannot load the tokenizer"),
        ({"checkpoint": tmp_path / "list.pt"}, "something other than parameters"),
    ):
        with pytest.raises(UserError, match=why):
            convert_to_ours(**{"checkpoint": checkpoint, "output": out, **names, "frame_px": 42, **changes})
    state = load_file(checkpoint)
    save_file({**state, "dino_to_llm.weight": torch.zeros(3, 3)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="another size"):
        convert_to_ours(tmp_path / "other.safetensors", out, **names, frame_px=42)
    assert not out.parent.exists()
    with pytest.raises(UserError, match=r"ends in \.safetensors"):
        convert_to_original(finished / "model", tmp_path / "name.pt")
    with pytest.raises(UserError, match="settings file not found"):
        convert_to_original(finished, tmp_path / "nothing.safetensors")
    save_model(build_model(tiny_settings(query="pooled"), vocab_size=VOCAB), tmp_path / "pooled")
    with pytest.raises(UserError, match="deep queries, one token per frame"):
        convert_to_original(tmp_path / "pooled", tmp_path / "nothing.safetensors")
    assert not list(tmp_path.glob("*nothing*"))


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match="deep queries, one token per frame"):
        to_original(tiny_model(tokens_per_frame=4))
    state = original_state()
    del state["llm_to_query.bias"]
    with pytest.raises(UserError, match="llm_to_query"):
        load_original(build_model(tiny_settings(), vocab_size=VOCAB), state)
