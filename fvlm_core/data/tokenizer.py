"""The tokenizer and the chat format.

A tiny model gets a byte-level BPE trained on its own text, with SmolLM2's special tokens and each digit as a separate token; a real
model loads SmolLM2's tokenizer. Both use our chat template: SmolLM2's, with our own system prompt.
"""

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fvlm_core.data.batch import ChatFormat
from fvlm_core.data.jobs import SMALLEST_VOCABULARY
from fvlm_core.errors import UserError

SYSTEM_PROMPT = "You answer questions about videos and images."
END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
TOKENIZER_FILE = "tokenizer.json"
SPECIAL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END)

CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\n" + SYSTEM_PROMPT + "<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer of at most `vocab_size` tokens. Deterministic.

    Raises ValueError if `vocab_size` is less than the number of bytes and special tokens.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(f"vocab_size must be at least {SMALLEST_VOCABULARY}, not {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=TURN_START,
        eos_token=TURN_END,
        pad_token=TURN_END,
        unk_token=END_OF_TEXT,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer by folder or hub name, with our chat template.

    Raises UserError if it cannot be loaded or lacks SmolLM2's chat tokens.
    """
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(str(name))
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot load the tokenizer: {error}", where=str(name), fix="give a folder with a tokenizer, or a hub name that can be reached"
        ) from error
    missing = [token for token in (TURN_START, TURN_END) if token not in tokenizer.get_vocab()]
    if missing:
        raise UserError(f"the tokenizer has no {' and '.join(missing)}", where=str(name), fix="use a SmolLM2-Instruct tokenizer")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def require_same_tokenizer(tokenizer: PreTrainedTokenizerBase, checkpoint: str, *, where: str) -> None:
    """Raise UserError if the checkpoint (folder or hub name) has its own tokenizer, with other token ids than `tokenizer`.

    A folder without a tokenizer passes.
    """
    if Path(checkpoint).is_dir() and not (Path(checkpoint) / TOKENIZER_FILE).is_file():
        return
    theirs = load_tokenizer(checkpoint).get_vocab()
    ours = tokenizer.get_vocab()
    if different := [token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)]:
        example = min(different)
        raise UserError(
            f"the shards' tokenizer differs from the language model's: {len(different)} tokens differ, e.g. {example!r}, which is "
            f"{ours.get(example, 'missing')} in the shards and {theirs.get(example, 'missing')} in the model",
            where=f"{where} and {checkpoint}",
            fix="make the shards with precompute.shards.tokenizer set to the checkpoint, or train on a checkpoint of the shards' tokenizer",
        )


def chat_format(tokenizer: PreTrainedTokenizerBase) -> ChatFormat:
    """Return the token ids of the chat template's fixed parts. Control tokens are made nowhere else.

    Concatenated with the ids of texts that are stripped and free of chat markers, they equal the output of `apply_chat_template`.
    """
    markup = partial(tokenizer.encode, add_special_tokens=False, split_special_tokens=False)
    return ChatFormat(
        system=markup(f"{TURN_START}system\n{SYSTEM_PROMPT}{TURN_END}\n"),
        user_open=markup(f"{TURN_START}user\n"),
        user_close=markup(f"{TURN_END}\n"),
        assistant_open=markup(f"{TURN_START}assistant\n"),
        assistant_close=markup(f"{TURN_END}\n"),
    )


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the token ids of a text. No special tokens are added, and chat markers in the text never become control tokens."""
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


def render_chat(turns: Iterable[dict[str, str]]) -> str:
    """Render `{"question", "answer"}` turns as the text that the model sees. Used to train a tokenizer."""
    parts = [f"{TURN_START}system\n{SYSTEM_PROMPT}{TURN_END}\n"]
    for turn in turns:
        parts.append(f"{TURN_START}user\n{turn['question']}{TURN_END}\n{TURN_START}assistant\n{turn['answer']}{TURN_END}\n")
    return "".join(parts)
