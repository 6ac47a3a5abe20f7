"""The lmms-eval plugin: `lmms-eval --model fvlm --model_args pretrained=FOLDER_OR_HUB_NAME,mode=autoregressive --tasks ...`.

The entry point group `lmms_eval.models` names this module, so lmms-eval finds it if both are installed (`infra/lmms_env.sh`).

Nearly all of lmms-eval's multiple-choice tasks let the model generate text and parse a letter from it, so a correct answer without a
letter counts as wrong. By default (`answer=letter`), a prompt that lists options is therefore answered with the letter of the highest
likelihood, as in `fvlm eval`. `answer=text` answers with the letter of the option whose text is likeliest (scorer `mean`), with the options
removed from the prompt; `answer=generate` always generates. Tasks of type `multiple_choice` cannot be run: lmms-eval 0.7.3 converts
likelihoods to text before it uses them.
"""

import io
import os
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from lmms_eval.api.model import lmms  # installed in a separate environment
from lmms_eval.models.registry_v2 import ModelManifest
from PIL.Image import Image
from tqdm import tqdm

from fvlm_core.data.frames import ClipError
from fvlm_core.errors import UserError
from fvlm_core.eval.answerers.answerer import ORDERS, Ask, Opened, Order
from fvlm_core.eval.benchmarks.benchmark import LETTERS, OPTION_LINE, inline_options, video
from fvlm_core.eval.generation import GREEDY, Generation, Method
from fvlm_core.eval.items import UnreadableItemError
from fvlm_core.eval.jobs import Original
from fvlm_core.eval.media import NO_MEDIA, Images, Source
from fvlm_core.eval.ranks import Ranks
from fvlm_core.eval.records import ConditionOutput, ItemRecord, option_scores, rounded
from fvlm_core.eval.stills import as_shown
from fvlm_core.serve.load import open_model

Answer = Literal["letter", "text", "generate"]
CONDITION = "asked"
MANIFEST = ModelManifest(model_id="fvlm", simple_class_path="fvlm_core.serve.lmms_plugin.FVLM")


class FVLM(lmms):
    """Any model that `fvlm eval` accepts, in one mode and order."""

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        mode: str = "autoregressive",
        order: Order | None = None,
        answer: Answer = "letter",
        vision: str | None = None,
        llm: str | None = None,
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        **unknown: Any,
    ) -> None:
        """Take the values of `--model_args`. lmms-eval always passes batch sizes; they are ignored, because questions are asked one by one.

        Raises UserError for an unknown checkpoint, mode, order, answer method or argument.
        """
        super().__init__()
        if unknown:
            raise _refused(f"unknown arguments: {', '.join(unknown)}", "leave them out")
        for name, value, known in (("order", order, ORDERS), ("answer", answer, get_args(Answer))):
            if value is not None and value not in known:
                raise _refused(f"{name} is {value!r}", f"choose of {', '.join(known)}")
        chosen = device or (f"cuda:{Ranks.of(os.environ).local}" if torch.cuda.is_available() else "cpu")
        self.device = torch.device(chosen)
        """lmms-eval's ranks exchange their numbers of documents on this device."""
        self.answerer = open_model(pretrained, self.device, original=Original(vision=vision, llm=llm))
        (self.condition,) = self.answerer.conditions([order or self.answerer.native_order], [mode], controls=False)
        self.answer = answer
        self._opened: tuple[str, Opened] | None = None

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Answer requests of (context, generation settings, function from a document to its visuals, document, task, split).

        Raises UserError for media that cannot be decoded: lmms-eval would count a missing answer as wrong.
        """
        said: list[str] = []
        for request in tqdm(requests, desc="fvlm", disable=self.rank != 0):
            context, settings, visuals_of, document, task, split = request.args
            opened = self._open(visuals_of(self.task_dict[task][split][document]) or [], f"{task}/{split}/{document}")
            choice = None if self.answer == "generate" else self._choice(opened, context)
            said.append(self._generate(opened, context, settings) if choice is None else choice)
        return said

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Raise UserError: lmms-eval 0.7.3 cannot use likelihoods."""
        raise UserError(
            "lmms-eval 0.7.3 turns likelihoods into text before it uses them",
            where="a task of the kind multiple_choice",
            fix="use the task's generating form, or `fvlm eval`",
        )

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        """Raise UserError: questions are asked one at a time."""
        raise UserError("questions in several rounds are not supported", where="the task", fix="leave the task out")

    def _open(self, visuals: list[Any], name: str) -> Opened:
        """Decode and encode media; consecutive requests with the same media reuse them."""
        source, key = _source(visuals, name)
        if self._opened is None or self._opened[0] != key:
            try:
                media = self.answerer.load_media(source)
            except ClipError as error:
                fix = "replace the file; lmms-eval would count it as answered wrongly"
                raise UserError(f"the media of a question cannot be decoded: {error}", where=f"{name}: {key}", fix=fix) from error
            self._opened = (key, self.answerer.open(media, name))
        return self._opened[1]

    def _choice(self, opened: Opened, context: str) -> str | None:
        """The letter of the likeliest option in a prompt; None if it lists no options, or labels them in another way."""
        try:
            question, options = inline_options(context)
        except UnreadableItemError:
            return None
        if [match[1] for line in context.splitlines() if (match := OPTION_LINE.match(line))] != list(LETTERS[: len(options)]):
            return None
        if self.answer == "letter":
            ask = Ask(context, tuple(LETTERS[: len(options)]), first_token=True)
            said = ConditionOutput(letters=[row[0] for row in rounded(opened.replies([ask], self.condition)[0])])
        else:
            said = ConditionOutput(options=rounded(opened.replies([Ask(question, tuple(options))], self.condition)[0]))
        record = ItemRecord(id="", clip="", groups={}, said={CONDITION: said})
        scores = option_scores(record, CONDITION, "letter" if self.answer == "letter" else "mean")
        assert scores is not None
        return LETTERS[int(scores.argmax())]

    def _generate(self, opened: Opened, context: str, settings: dict[str, Any]) -> str:
        """Generate with the task's settings, up to its first stop text."""
        ask = Ask(context, max_new_tokens=int(settings.get("max_new_tokens", 32)), generation=self._generation(settings))
        text = opened.replies([ask], self.condition)[0].said
        until = settings.get("until") or []
        for stop in [until] if isinstance(until, str) else until:
            text = text.split(stop)[0] if stop else text
        return text.strip()

    def _generation(self, settings: dict[str, Any]) -> Generation:
        """Translate lmms-eval's settings, which are those of transformers. Raises UserError if the model lacks the method."""
        beams, drawn = int(settings.get("num_beams") or 1), bool(settings.get("do_sample")) and (settings.get("temperature") or 0) > 0
        method: Method = "beams" if beams > 1 else "sample" if drawn else "greedy"
        if method not in self.answerer.methods:
            raise UserError(
                f"the model does not generate by {method}", where="the task's generation_kwargs", fix="--gen_kwargs do_sample=False"
            )
        if method == "beams":
            return Generation(method=method, beams=beams)
        return Generation(method=method, temperature=settings["temperature"], top_p=settings.get("top_p") or 1.0) if drawn else GREEDY


def _source(visuals: list[Any], name: str) -> tuple[Source, str]:
    """A task's media (the path of a video, or pictures), and a key that identifies them. Raises UserError for other media."""
    if not visuals:
        return NO_MEDIA, ""
    if all(isinstance(one, Image) for one in visuals):
        pictures = Images(tuple(_png(one) for one in visuals))
        return pictures, pictures.key
    if len(visuals) == 1 and isinstance(visuals[0], str | Path):
        return video(Path(visuals[0])), str(visuals[0])
    kinds = ", ".join(dict.fromkeys(type(one).__name__ for one in visuals))
    raise UserError(f"the task shows {len(visuals)} of {kinds}", where=name, fix="one video's path or PIL images can be shown")


def _png(image: Image) -> bytes:
    stream = io.BytesIO()
    as_shown(image).save(stream, "PNG")
    return stream.getvalue()


def _refused(what: str, fix: str) -> UserError:
    return UserError(what, where="--model_args of the model fvlm", fix=fix)
