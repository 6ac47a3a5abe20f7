"""`fvlm serve` over HTTP at DINOv2-small + SmolLM2-135M with random weights: eight concurrent clients against sequential ones, and bad
uploads.

Each client has a question of its own. The reference for eight concurrent clients is four times the time of one client alone. The videos
last `--frames` seconds. Eight questions about one video share its encoding and the batched decoding; questions about eight videos share
only the batched decoding.
"""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from statistics import median

import httpx
import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks.bad_uploads import bad_uploads
from benchmarks.chat_server import about, data_url, running
from benchmarks.report import Measurement, arguments, show
from benchmarks.shapes import FRAME_PX, VOCABULARY, model_settings
from fvlm_core.data.clips import encode_mp4
from fvlm_core.data.frames import FrameRule
from fvlm_core.data.tokenizer import SPECIAL_TOKENS, TURN_END, chat_format
from fvlm_core.eval.answerers.foveated import FoveatedAnswerer
from fvlm_core.eval.subject import Subject
from fvlm_core.model.build import build_model
from fvlm_core.serve.app import create_app
from fvlm_core.serve.limits import Limits

CLIENTS = 8
ALONE = 4
"""Eight concurrent clients may take this many times as long as one alone."""
NAME = "benchmark"
TIMEOUT_S = 600


def main() -> None:
    options = arguments(
        __doc__ or "",
        frames={"type": int, "default": 8},
        tokens={"type": int, "default": 64},
        uploads={"type": int, "default": 100},
        rounds={"type": int, "default": 1},
    )
    show(measure(options.frames, options.tokens, options.uploads, options.rounds), as_json=options.json)


def measure(frames: int, tokens: int, uploads: int, rounds: int) -> Iterator[Measurement]:
    """Measure with videos of `frames` frames and answers of `tokens` tokens, then send `uploads` bad uploads."""
    limits = Limits(upload_mb=8, video_s=600, running=CLIENTS, waiting=CLIENTS)
    videos = [data_url(_video(frames, seed)) for seed in range(CLIENTS)]
    with running(create_app(_answerer(), limits)) as address, httpx.Client(base_url=address, timeout=TIMEOUT_S) as client:

        def ask(n: int, tokens: int = tokens, video: int | None = None) -> str:
            messages = about(videos[n if video is None else video], f"{n}: what happens?")
            body = {"model": NAME, "messages": messages, "max_tokens": tokens}
            answer = client.post("/v1/chat/completions", json=body)
            return answer.json()["choices"][0]["message"]["content"] if answer.is_success else f"error {answer.status_code} of client {n}"

        for n in range(CLIENTS):
            ask(n, 1)  # warm up: every video is decoded before timing starts
        alone_s, together_s, one_video_s, equal = [], [], [], CLIENTS
        for _ in range(rounds):
            alone, together = [], []
            for n in range(CLIENTS):
                started = time.perf_counter()
                alone.append(ask(n))
                alone_s.append(time.perf_counter() - started)
            started = time.perf_counter()
            with ThreadPoolExecutor(CLIENTS) as pool:
                together = list(pool.map(ask, range(CLIENTS)))
                together_s.append(time.perf_counter() - started)
                started = time.perf_counter()
                list(pool.map(partial(ask, video=0), range(CLIENTS)))
                one_video_s.append(time.perf_counter() - started)
            same = [one == other and not one.startswith("error ") for one, other in zip(alone, together, strict=True)]
            equal = min(equal, sum(same))
        yield Measurement("serving", "clients_ok", equal, "clients", f"{CLIENTS} clients, answers as alone", equal / CLIENTS)
        for metric, seconds in (("eight_at_once_vs_four_alone", one_video_s), ("eight_videos_at_once_vs_four_alone", together_s)):
            ratio = median(seconds) / (ALONE * median(alone_s))
            yield Measurement("serving", metric, median(seconds), "s", f"{ALONE} times one alone", ratio)

        good = _video(frames, 0)
        kinds = len(list(bad_uploads(good, each=1)))
        refused = 0
        for _, content, kind in islice(bad_uploads(good, each=-(-uploads // kinds), huge_bytes=limits.upload_bytes), uploads):
            body = {"model": NAME, "messages": about(data_url(content), "?", kind=kind), "max_tokens": 1}
            answer = client.post("/v1/chat/completions", json=body)
            refused += answer.is_client_error and bool(answer.json()["error"]["message"])
        refused *= ask(0) == alone[0]  # 0 if the server no longer answers as before
        yield Measurement("serving", "bad_uploads_survived", refused, "uploads", f"{uploads} sent", refused / uploads)


def _answerer() -> FoveatedAnswerer:
    model = build_model(model_settings(), vocab_size=VOCABULARY).eval().requires_grad_(False)
    tokenizer = _tokenizer()
    subject = Subject(model, tokenizer, chat_format(tokenizer), torch.device("cpu"), CLIENTS)
    return FoveatedAnswerer(subject, name=NAME, checkpoint="", rule=FrameRule(FRAME_PX))


def _tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer with SmolLM2's vocabulary size, of bytes, special tokens and words, so that every token shows in an answer."""
    known = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocabulary = {token: number for number, token in enumerate([*known, *(f"Ġword{n}" for n in range(VOCABULARY - len(known)))])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=TURN_END, pad_token=TURN_END)


def _video(frames: int, seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (frames, 14, 14, 3), dtype=np.uint8).repeat(16, 1).repeat(16, 2)
    return encode_mp4(pixels)


if __name__ == "__main__":
    main()
