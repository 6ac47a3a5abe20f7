"""transformers' own generation on the released model: the same answers as its Llama gives to the same embeddings."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import LlamaForCausalLM, MaxTimeCriteria, StoppingCriteriaList, TextStreamer, pipeline

from fvlm_core.config import Recipe
from fvlm_core.data.jobs import ShardManifest
from fvlm_core.model.build import load_model
from fvlm_core.model.inference import read_batch
from fvlm_core.release.hub.cache import FVLMCache
from fvlm_core.release.hub.modeling_fvlm import FVLMModel
from fvlm_core.release.hub.padded import packed_batch
from fvlm_core.release.hub.processing_fvlm import FVLMProcessor
from fvlm_core.release.hub_folder import write_hub_folder
from tests.release.build import run, shards

MODES = {"coarse": "coarse_only", "fine": "coarse_fine", "autoregressive": "autoregressive"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A released folder with its weights in several files."""
    root = tmp_path_factory.mktemp("hub")
    shards(root / "shards")
    made = run(root / "run", root / "shards")
    model = load_model(made / "model")
    write_hub_folder(
        root / "hub", model, made / "model", Recipe.from_yaml(made / "recipe.yaml"), ShardManifest.read(root / "shards"), max_shard="100KB"
    )
    assert len(list((root / "hub").glob("*.safetensors"))) > 1
    return root / "hub"


@pytest.fixture(scope="module")
def processor(folder) -> FVLMProcessor:
    return FVLMProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def model(folder) -> FVLMModel:
    """In float64 with sizeable weights, so that answers are varied and no two tokens are nearly equal."""
    model = FVLMModel.from_pretrained(folder).double().eval()
    rng = np.random.default_rng(1)
    for parameter in model.parameters():
        parameter.data += parameter.new_tensor(rng.normal(0, 0.05, tuple(parameter.shape)))
    return model


@pytest.fixture(scope="module")
def inputs(processor) -> dict[str, Tensor]:
    """Two questions about videos of different lengths, and one without a video."""
    videos = [np.random.default_rng(n).integers(0, 256, (n, 42, 42, 3), dtype=np.uint8) for n in (3, 2)]
    chats = [
        [{"role": "user", "content": [{"type": "text", "text": "Which digits?"}, {"type": "video", "video": videos[0]}]}],
        [{"role": "user", "content": [{"type": "video", "video": videos[1]}, {"type": "text", "text": "Describe the video."}]}],
        [{"role": "user", "content": "What is 2 plus 3?"}],
    ]
    return processor.apply_chat_template(chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")


def alone(inputs: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    return {name: values if name == "frames" else values[row : row + 1] for name, values in inputs.items()}


def embeddings(model: FVLMModel, inputs: dict[str, Tensor], mode: str) -> tuple[Tensor, Tensor]:
    """The prompt as transformers' Llama can take it: embeddings [B, S, D] with the mode's visual tokens in place, and the mask."""
    batch = packed_batch(**inputs, tokens_per_frame=1)
    rows = model.get_input_embeddings()(inputs["input_ids"])
    rows[inputs["frame_ids"] >= 0] = read_batch(model.model, batch, MODES[mode]).tokens.flatten(0, 1)
    return rows.detach(), inputs["attention_mask"]


@pytest.fixture(scope="module")
def llama(model) -> LlamaForCausalLM:
    return model.model.llm.to_transformers().eval()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"num_beams": 3, "do_sample": False},
        {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.3, "do_sample": False},
        {"do_sample": True, "temperature": 0.8, "top_p": 0.9},
        {"do_sample": True, "num_return_sequences": 2, "top_k": 20},
        {"do_sample": False, "use_cache": False},
        {"do_sample": False, "max_new_tokens": 80},
    ],
    ids=["greedy", "beams", "several-beams", "sampled", "several-samples", "uncached", "past-the-room"],
)
def test_generation_is_that_of_transformers_llama(model, llama, inputs, mode, options):
    """Nothing but the prompt's visual tokens is ours: greedy, beams and sampling (with the same seed) give what Llama gives."""
    options = {"max_new_tokens": 6, **options}
    prompt, mask = embeddings(model, inputs, mode)
    torch.manual_seed(3)
    wanted = llama.generate(inputs_embeds=prompt, attention_mask=mask, eos_token_id=2, pad_token_id=2, **options)
    torch.manual_seed(3)
    given = model.generate(**inputs, mode=mode, **options)
    assert given[:, inputs["input_ids"].shape[1] :].tolist() == wanted.tolist()
    assert len({tuple(row) for row in wanted.tolist()}) > 1
    assert len(wanted.unique()) > 4
    assert torch.equal(given[:: len(given) // 3, : inputs["input_ids"].shape[1]], inputs["input_ids"])


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_answers_as_its_rows_alone(model, inputs, mode):
    together = model.generate(**inputs, mode=mode, max_new_tokens=6)[:, inputs["input_ids"].shape[1] :]
    for row, answer in enumerate(together):
        one = model.generate(**alone(inputs, row), mode=mode, max_new_tokens=6)[0, inputs["input_ids"].shape[1] :]
        assert answer[: len(one)].tolist() == one.tolist()


def test_logits_of_a_batch_are_those_of_its_rows_and_of_its_steps(model, inputs):
    with torch.no_grad():
        full = model(**inputs).logits
        assert full.shape == (3, inputs["input_ids"].shape[1], model.config.text_config.vocab_size)
        assert (full[~inputs["attention_mask"].bool()] == 0).all()
        torch.testing.assert_close(model(**inputs, logits_to_keep=2).logits, full[:, -2:])
        for row in range(3):
            kept = inputs["attention_mask"][row].bool()
            torch.testing.assert_close(model(**alone(inputs, row)).logits[0, kept], full[row, kept])
        cache = FVLMCache(room=1)
        more = torch.tensor([[5, 6, 7], [8, 9, 10], [11, 12, 13]])
        model(**inputs, past_key_values=cache)
        steps = [model(more[:, :2], past_key_values=cache).logits, model(more[:, 2:], past_key_values=cache).logits]
        longer = {"input_ids": torch.cat([inputs["input_ids"], more], 1)}
        longer["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(more)], 1)
        torch.testing.assert_close(torch.cat(steps, 1), model(**(dict(inputs) | longer)).logits[:, -3:])
        assert cache.get_seq_length() == longer["input_ids"].shape[1]


def test_streams_and_stops(model, processor, inputs, capsys):
    one = alone(inputs, 0)
    tokens = model.generate(**one, max_new_tokens=6, streamer=TextStreamer(processor.tokenizer, skip_prompt=True))
    answer = processor.decode(tokens[0, one["input_ids"].shape[1] :])
    assert capsys.readouterr().out.strip() == answer.strip()
    stopped = model.generate(**one, max_new_tokens=50, stopping_criteria=StoppingCriteriaList([MaxTimeCriteria(0.0)]))
    assert stopped.shape[1] == one["input_ids"].shape[1] + 1


def test_modes_have_short_and_long_names(model, inputs):
    with torch.no_grad():
        assert torch.equal(model(**inputs, mode="coarse").logits, model(**inputs, mode="coarse_only").logits)
        assert torch.equal(model(**inputs, mode="fine").logits, model(**inputs).logits)
        assert not torch.equal(model(**inputs, mode="coarse").logits, model(**inputs).logits)
    with pytest.raises(ValueError, match="no mode 'sharp'"):
        model(**inputs, mode="sharp")


def test_the_pipeline_of_transformers_answers(folder, tmp_path):
    """From the folder's own code."""
    asks = pipeline("image-text-to-text", model=str(folder), trust_remote_code=True)
    picture = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 42, 3), dtype=np.uint8)).save(picture)
    messages = [{"role": "user", "content": [{"type": "image", "url": str(picture)}, {"type": "text", "text": "Which digits?"}]}]
    (answer,) = asks(messages, max_new_tokens=5, return_full_text=False)
    local = FVLMModel.from_pretrained(folder)
    processor = FVLMProcessor.from_pretrained(folder)
    inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    tokens = local.generate(**inputs, max_new_tokens=5)[0, inputs["input_ids"].shape[1] :]
    assert answer["generated_text"] == processor.decode(tokens, skip_special_tokens=True)
    both = asks([messages, messages], max_new_tokens=5, return_full_text=False, batch_size=1)
    assert [one["generated_text"] for (one,) in both] == [answer["generated_text"]] * 2
    with pytest.raises(ValueError, match="a pipeline: batch_size=1"):
        asks([messages, messages], max_new_tokens=5, return_full_text=False, batch_size=2)


def test_a_cache_is_gone_on_from_with_text_only(model, inputs):
    asked = dict(inputs)
    columns = asked["input_ids"].shape[1]
    made = model.generate(**asked, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    seen = made.past_key_values.get_seq_length()
    cache, more = made.past_key_values, torch.full((len(asked["input_ids"]), 4), 300)
    ids = torch.cat([made.sequences, more], 1)
    mask = torch.cat([asked["attention_mask"], torch.ones(len(ids), ids.shape[1] - columns, dtype=torch.long)], 1)
    shown = torch.full_like(ids, -1)
    shown[:, -2] = 0
    with pytest.raises(ValueError, match="with text only"):
        model.generate(input_ids=ids, attention_mask=mask, frame_ids=shown, frames=asked["frames"], past_key_values=cache, max_new_tokens=2)
    with pytest.raises(ValueError, match="equally long"):
        model.generate(input_ids=ids, attention_mask=mask.index_fill(1, torch.tensor([ids.shape[1] - 1]), 0), past_key_values=cache)
    with pytest.raises(ValueError, match="no loss"):
        model(input_ids=ids[:, seen:], labels=ids[:, seen:], past_key_values=cache)
    model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, max_new_tokens=2)


@pytest.mark.parametrize("options", [{"dtype": torch.bfloat16}, {"device_map": "auto"}, {"dtype": "auto"}], ids=str)
def test_loaded_in_other_ways(folder, processor, options):
    """In bf16 the logits are near; spread over devices (here one) they are the same."""
    video = np.random.default_rng(0).integers(0, 256, (3, 42, 42, 3), dtype=np.uint8)
    inputs = processor(text="Which digits?", videos=video)
    model, plain = FVLMModel.from_pretrained(folder, **options).eval(), FVLMModel.from_pretrained(folder).eval()
    with torch.no_grad():
        for mode in MODES:
            found, wanted = model(**inputs, mode=mode).logits, plain(**inputs, mode=mode).logits
            if options.get("dtype") == torch.bfloat16:
                assert found.dtype == torch.bfloat16
                assert 0 < (found.float() - wanted).norm() / wanted.norm() < 0.05
            else:
                assert torch.equal(found, wanted)
    assert model.generate(**inputs, max_new_tokens=4).shape[0] == 1
