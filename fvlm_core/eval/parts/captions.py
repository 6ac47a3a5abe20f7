"""Score generated captions with the metrics of the COCO tools, in comparison with one constant caption for all clips."""

from collections.abc import Sequence
from dataclasses import replace

from fvlm_core.config import Positive
from fvlm_core.eval.caption_metrics import bleu_from_sums, caption_stats, meteor, meteor_absence
from fvlm_core.eval.estimates import Estimate, Metric
from fvlm_core.eval.generation import GREEDY, Generation
from fvlm_core.eval.media import NO_MEDIA
from fvlm_core.eval.part import Context, Count, Part, PartResult, require
from fvlm_core.eval.stats import DECIMALS, Bootstrap
from fvlm_core.markdown import escape
from fvlm_core.model.names import Mode
from fvlm_core.settings import Settings
from fvlm_core.tables import Table, number

EXAMPLES = 6
CONSTANT_CANDIDATES = 8
"""Number of references that are tried as the constant caption."""


class CaptionScores(Settings):
    """Caption metrics: BLEU and ROUGE in 0..1, CIDEr-D in 0..10."""

    cider_d: Estimate
    bleu_1: Estimate
    bleu_2: Estimate
    bleu_3: Estimate
    bleu_4: Estimate
    rouge_l: Estimate
    meteor: float | None = None
    """None unless Java and pycocoevalcap are installed; see `absent`."""


class CaptionExample(Settings):
    """The reference caption of one clip, and each mode's caption."""

    key: str
    source: str
    reference: str
    generated: dict[Mode, str]


class CaptionResult(PartResult):
    """Caption scores of every mode on the same clips."""

    title = "Captions"

    modes: dict[Mode, CaptionScores]
    constant_caption: str
    """The best constant caption: among a few references, the one with the highest CIDEr-D when used for every clip."""
    constant: CaptionScores
    """Scores of the constant caption. A model that does not beat them has learned the style of captions, not the content of clips."""
    blind: CaptionScores | None = None
    """Scores of the model without frames."""
    captions: int
    examples: list[CaptionExample]

    def count(self) -> int:
        """Number of captions."""
        return self.captions

    def headline(self) -> list[Metric]:
        """CIDEr-D and BLEU-4."""
        return [
            Metric(
                name=name,
                values={mode: getattr(scores, field) for mode, scores in self.modes.items()},
                baselines={"constant": getattr(self.constant, field)} | ({"no frames": getattr(self.blind, field)} if self.blind else {}),
                hub_type=hub_type,
            )
            for name, field, hub_type in (("CIDEr-D", "cider_d", "cider"), ("BLEU-4", "bleu_4", "bleu"))
        ]

    def tables(self) -> list[Table]:
        """All metrics, and example captions."""
        columns = [*self.modes.values(), self.constant, *([self.blind] if self.blind else [])]
        names = {"cider_d": "CIDEr-D", **{f"bleu_{n}": f"BLEU-{n}" for n in (1, 2, 3, 4)}, "rouge_l": "ROUGE-L", "meteor": "METEOR"}
        rows = [[name, *(number(getattr(scores, field)) for scores in columns)] for field, name in names.items()]
        examples = [[one.reference, *(one.generated.get(mode, "") for mode in self.modes)] for one in self.examples]
        note = f"{self.captions} captions. The constant caption is “{escape(self.constant_caption)}”."
        head = ["metric", *self.modes, "constant caption", *(["no frames (blind)"] if self.blind else [])]
        return [
            Table(title="Captions", head=head, rows=[row for row in rows if any(row[1:])], note=note),
            Table(title="Caption examples", head=["reference", *self.modes], rows=examples),
        ]


class Captions(Part):
    """Captions of clips and images."""

    result = CaptionResult

    samples: Count = 64
    """Number of clips and images to caption; 0 skips captions."""
    max_new_tokens: Positive = 48
    """Maximum length of a generated caption, in tokens."""
    generation: Generation = GREEDY
    """How captions are generated."""

    def measure(self, context: Context) -> CaptionResult:
        """Caption the same clips in every mode."""
        from fvlm_core.eval.questions import without_answer  # needs torch

        bootstrap = context.bootstrap
        glance = context.subject.model.settings.glance
        questions = context.split.captions(self.samples, small_px=glance.px if glance else None)
        require(len(questions), self.samples, "captions")
        samples = [without_answer(question.sample, question_first=False) for question in questions]
        generated: dict[Mode, list[str]] = {
            mode: context.subject.generate(samples, mode, max_new_tokens=self.max_new_tokens, generation=self.generation)
            for mode in context.modes
        }
        references = [[question.answer] for question in questions]
        clips = [question.clip for question in questions]
        scores: dict[Mode, CaptionScores] = {mode: _scores(texts, references, clips, bootstrap) for mode, texts in generated.items()}
        if (reason := meteor_absence()) is None:
            meteors = {mode: round(meteor(texts, references), DECIMALS) for mode, texts in generated.items()}
            scores = {mode: one.model_copy(update={"meteor": meteors[mode]}) for mode, one in scores.items()}
        constant_caption, constant = _constant(references, clips, bootstrap)
        bare = [replace(sample, frames=NO_MEDIA.frames, media=[]) for sample in samples]
        blind = context.subject.generate(bare, "coarse_only", max_new_tokens=self.max_new_tokens, generation=self.generation)
        return CaptionResult(
            modes=scores,
            constant_caption=constant_caption,
            constant=constant,
            blind=_scores(blind, references, clips, bootstrap),
            captions=len(questions),
            examples=[
                CaptionExample(
                    key=question.clip,
                    source=question.sample.source,
                    reference=question.answer,
                    generated={mode: texts[index] for mode, texts in generated.items()},
                )
                for index, question in enumerate(questions[:EXAMPLES])
            ],
            absent={"meteor": reason} if reason else {},
        )


def _constant(references: Sequence[list[str]], clips: Sequence[str], bootstrap: Bootstrap) -> tuple[str, CaptionScores]:
    """The best constant caption and its scores; candidates are spread evenly over the references."""
    step = max(1, len(references) // CONSTANT_CANDIDATES)
    candidates = dict.fromkeys(texts[0] for texts in references[::step][:CONSTANT_CANDIDATES])
    scored = {text: _scores([text] * len(references), references, clips, bootstrap) for text in candidates}
    best = max(scored, key=lambda text: scored[text].cider_d.value)
    return best, scored[best]


def _scores(texts: Sequence[str], references: Sequence[list[str]], clips: Sequence[str], bootstrap: Bootstrap) -> CaptionScores:
    """All metrics except METEOR."""
    stats = caption_stats(texts, references)
    bleu = [bootstrap.estimate(stats.bleu, clips, lambda sums, n=n: bleu_from_sums(sums, n)) for n in (1, 2, 3, 4)]
    return CaptionScores(
        cider_d=bootstrap.mean(stats.cider_d, clips),
        bleu_1=bleu[0],
        bleu_2=bleu[1],
        bleu_3=bleu[2],
        bleu_4=bleu[3],
        rouge_l=bootstrap.mean(stats.rouge_l, clips),
    )
