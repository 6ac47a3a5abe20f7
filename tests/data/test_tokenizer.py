import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fvlm_core.data.tokenizer import (
    SMALLEST_VOCABULARY,
    SYSTEM_PROMPT,
    chat_format,
    encode,
    load_tokenizer,
    render_chat,
    train_tokenizer,
)
from fvlm_core.errors import UserError

TEXTS = [render_chat([{"question": "Which digits are at the top left?", "answer": "371"}])] * 5 + ["a red 3, a blue 7"]
TOKENIZER = train_tokenizer(TEXTS, 330)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.text(max_size=30).map(str.strip), st.text(max_size=30).map(str.strip)), min_size=1, max_size=3))
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


@given(st.text())
def test_any_text_survives(text):
    assert TOKENIZER.decode(encode(TOKENIZER, text)) == text


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
