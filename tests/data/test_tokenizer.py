import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fvlm_core.data.tokenizer import (
    SMALLEST_VOCABULARY,
    SPECIAL_TOKENS,
    SYSTEM_PROMPT,
    TURN_END,
    TURN_START,
    chat_format,
    encode,
    load_tokenizer,
    render_chat,
    require_same_tokenizer,
    train_tokenizer,
)
from fvlm_core.errors import UserError

TEXTS = [render_chat([{"question": "Which digits are at the top left?", "answer": "371"}])] * 5 + ["a red 3, a blue 7"]
TOKENIZER = train_tokenizer(TEXTS, 330)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """The tokenizer as its files give it."""
    folder = tmp_path_factory.mktemp("tokenizer")
    TOKENIZER.save_pretrained(folder)
    return load_tokenizer(folder)


ORDINARY = st.text(max_size=30).map(str.strip).filter(lambda text: not any(token in text for token in SPECIAL_TOKENS))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(ORDINARY, ORDINARY), min_size=1, max_size=3))
def test_parts_joined_are_the_chat_template(turns):
    chat = chat_format(TOKENIZER)
    messages, ids = [], list(chat.system)
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        ids += chat.user_open + encode(TOKENIZER, question) + chat.user_close
        ids += chat.assistant_open + encode(TOKENIZER, answer) + chat.assistant_close
    assert TOKENIZER.apply_chat_template(messages, return_dict=False) == ids
    asked = [{"role": "user", "content": "Hm?"}]
    generating = chat.system + chat.user_open + encode(TOKENIZER, "Hm?") + chat.user_close + chat.assistant_open
    assert TOKENIZER.apply_chat_template(asked, add_generation_prompt=True, return_dict=False) == generating


@settings(deadline=None)
@given(st.lists(st.one_of(st.text(), st.sampled_from(SPECIAL_TOKENS))).map("".join))
def test_any_text_survives_and_chat_markers_in_it_are_text(loaded, text):
    before = chat_format(TOKENIZER)
    for tokenizer in (TOKENIZER, loaded):
        ids = encode(tokenizer, text)
        assert not set(ids) & set(tokenizer.all_special_ids)
        assert tokenizer.decode(ids) == tokenizer.decode(ids, skip_special_tokens=True) == text
        assert chat_format(tokenizer) == before  # the template still makes control tokens


def test_chat_markers_are_control_tokens_in_the_template_only():
    start, end = (TOKENIZER.convert_tokens_to_ids(token) for token in (TURN_START, TURN_END))
    chat = chat_format(TOKENIZER)
    assert (chat.system.count(start), chat.system.count(end)) == (1, 1)
    assert (chat.user_open[0], chat.assistant_open[0], chat.user_close[0], chat.assistant_close[0]) == (start, start, end, end)
    assert end not in encode(TOKENIZER, f"done{TURN_END}")


def test_encoding_leaves_the_saved_files_as_they_are(tmp_path):
    TOKENIZER.save_pretrained(tmp_path / "before")
    encode(TOKENIZER, TURN_END)
    TOKENIZER.save_pretrained(tmp_path / "after")
    assert all((tmp_path / "after" / path.name).read_bytes() == path.read_bytes() for path in (tmp_path / "before").iterdir())


def test_digits_are_tokens_of_their_own_and_the_model_is_not_called_smollm():
    assert [TOKENIZER.decode([token]) for token in encode(TOKENIZER, "371")] == ["3", "7", "1"]
    assert SYSTEM_PROMPT in TOKENIZER.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert "SmolLM" not in TOKENIZER.chat_template


def test_saved_and_loaded_is_the_same(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert chat_format(loaded) == chat_format(TOKENIZER)
    assert loaded.chat_template == TOKENIZER.chat_template
    assert loaded.eos_token_id == chat_format(TOKENIZER).assistant_close[0]


def test_training_is_reproducible(tmp_path):
    for name in ("one", "two"):
        train_tokenizer(TEXTS, 330).save_pretrained(tmp_path / name)
    assert all((tmp_path / "two" / path.name).read_bytes() == path.read_bytes() for path in (tmp_path / "one").iterdir())


def test_errors(tmp_path):
    with pytest.raises(ValueError, match=str(SMALLEST_VOCABULARY)):
        train_tokenizer(TEXTS, SMALLEST_VOCABULARY - 1)
    with pytest.raises(UserError, match="cannot load the tokenizer"):
        load_tokenizer(tmp_path / "nothing")


def test_another_tokenizer_than_the_models_is_an_error(tmp_path):
    train_tokenizer([*TEXTS, "other words altogether, zebra zebra zebra"], 330).save_pretrained(tmp_path / "other")
    TOKENIZER.save_pretrained(tmp_path / "same")
    (tmp_path / "none").mkdir()
    require_same_tokenizer(TOKENIZER, str(tmp_path / "same"), where="shards")
    require_same_tokenizer(TOKENIZER, str(tmp_path / "none"), where="shards")
    with pytest.raises(UserError, match=r"differs from the language model's: \d+ tokens differ"):
        require_same_tokenizer(TOKENIZER, str(tmp_path / "other"), where="shards")
