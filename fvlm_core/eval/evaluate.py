"""The whole evaluation of one run: every number into `results.json`, tables and pictures from it, the manifest last."""

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from fvlm_core.config import Recipe
from fvlm_core.data.shard_set import ShardSet
from fvlm_core.errors import UserError
from fvlm_core.eval import latency, places
from fvlm_core.eval.captions import bleu_from_sums, caption_stats, meteor, meteor_absence
from fvlm_core.eval.choices import choice_results
from fvlm_core.eval.items import ClipQuestion, without_answer
from fvlm_core.eval.jobs import EvalJob
from fvlm_core.eval.pictures import HeatRow, draw
from fvlm_core.eval.results import FILE_NAME as RESULTS_FILE
from fvlm_core.eval.results import (
    GAZE_PICTURE,
    LATENCY_FILE,
    TABLES_FILE,
    CaptionExample,
    CaptionScores,
    Estimate,
    EvalReport,
    Headline,
    HeatMap,
    Latency,
    ModeResults,
    PairedTest,
    Results,
)
from fvlm_core.eval.stats import DECIMALS, Bootstrap
from fvlm_core.eval.subject import Subject
from fvlm_core.eval.tables import printable, tables
from fvlm_core.eval.validation import ValidationSplit
from fvlm_core.manifest import AnyManifest, file_entries, sha256_file, write_atomically
from fvlm_core.model.build import WEIGHTS_FILE, load_model
from fvlm_core.model.names import MODES, Mode
from fvlm_core.progress import Progress
from fvlm_core.train.jobs import MODEL_FOLDER, RECIPE_FILE

ENTROPY_CLIPS = 64
"""Videos over which attention entropy is averaged."""
CAPTION_EXAMPLES = 6
GAZE_QUESTIONS = 3
"""Questions about one clip in the composite picture."""
HEATMAP_FOLDER = "heatmaps"
PARTS = ("losses", "captions", "multiple choice", "question order", "gaze", "latency")
"""What progress is told about."""


def evaluate(job: EvalJob) -> EvalReport:
    """Run a job. Raises UserError where the run, the shards or the modes do not fit."""
    started = time.monotonic()
    inputs = {"run": AnyManifest.read(job.run).digest, "shards": AnyManifest.read(job.shards).digest}
    recipe = Recipe.from_yaml(job.run / RECIPE_FILE)
    subject = load_subject(job)
    split = ValidationSplit(ShardSet(job.shards), image_repeats=recipe.data.image_repeats, seed=job.seed)
    progress = Progress(job.output, len(PARTS))
    results, counts = measure(job, recipe.name, inputs["shards"], subject, split, progress)
    results.write(job.output)
    progress.update(PARTS.index("latency"), note="latency")
    timed = split.clips(job.latency_clips)
    timing = latency.measure(subject, timed, list(results.modes)) if timed else None
    if timing:
        write_atomically(job.output / LATENCY_FILE, timing.model_dump_json(indent=2).encode())
    (job.output / TABLES_FILE).write_text(tables(results, timing))
    pictures = [heatmap.file for heatmap in results.heatmaps] + [GAZE_PICTURE] * bool(results.heatmaps)
    report = EvalReport(
        name="evaluate",
        settings_hash=job.hash(exclude={"output", "run", "shards"}),
        inputs=inputs,
        counts=counts,
        files=[
            *file_entries(job.output, [RESULTS_FILE, *pictures]),
            *file_entries(job.output, [LATENCY_FILE, TABLES_FILE] if timing else [TABLES_FILE], identity=False),
        ],
        headline=headline(results, timing),
        seconds=time.monotonic() - started,
    ).write(job.output)
    progress.update(len(PARTS), note="done")
    return report


def measure(
    job: EvalJob, run_name: str, shards_digest: str, subject: Subject, split: ValidationSplit, progress: Progress
) -> tuple[Results, dict[str, int]]:
    """Everything but latency, with pictures written on the way; returns the results and how much was measured."""
    modes: list[Mode] = [mode for mode in MODES if mode in (job.modes or subject.model.modes)]
    bootstrap = Bootstrap(job.resamples, job.seed)
    absent: dict[str, str] = {}

    def begin(part: str) -> None:
        progress.update(PARTS.index(part), note=part)

    begin("losses")
    losses, sources, clips = _losses(subject, split, job, modes)

    begin("captions")
    captioned = split.captions(job.caption_samples)
    captions, examples = _captions(subject, captioned, modes, job.max_new_tokens, bootstrap) if captioned else ({}, [])
    if not captioned:
        absent["captions"] = _why_absent(job.caption_samples, "captions")
    elif reason := meteor_absence():
        absent["meteor"] = reason

    begin("multiple choice")
    items = split.items(job.mcq_samples)
    baselines, scores, tests = choice_results(subject, items, modes, bootstrap) if items else (None, {}, [])
    if not items:
        absent["multiple_choice"] = _why_absent(job.mcq_samples, "multiple-choice questions")

    begin("question order")
    asked = split.places(job.order_samples)
    order = places.order_results(subject, asked, modes, bootstrap) if asked else []
    if not asked:
        absent["question_order"] = _why_absent(job.order_samples, "questions about places in videos")

    begin("gaze")
    watched = split.clips(ENTROPY_CLIPS) if subject.gazes else []
    entropy = {mode: _entropy(subject, watched, mode, bootstrap) for mode in modes} if watched else {}
    looking: list[Mode] = [mode for mode in modes if mode != "coarse_only"]
    heatmaps: list[HeatMap] = []
    if watched and looking and job.heatmaps:
        heatmaps = _heatmaps(subject, split.clips(job.heatmaps), looking, job.output)
        composite = split.places_of_one_clip(GAZE_QUESTIONS) or split.clips(GAZE_QUESTIONS)
        _composite(subject, composite, looking[-1], job.output / GAZE_PICTURE)
    else:
        absent["heatmaps"] = _why_absent(job.heatmaps, "videos, or no mode evaluated looks")

    results = Results(
        run=run_name,
        checkpoint=sha256_file(job.run / MODEL_FOLDER / WEIGHTS_FILE),
        shards=shards_digest,
        seed=job.seed,
        resamples=job.resamples,
        frame_px=subject.model.settings.vision.frame_px,
        tokens_per_frame=subject.model.settings.tokens_per_frame,
        modes={
            mode: ModeResults(
                loss=bootstrap.weighted_mean(losses[mode], clips),
                loss_by_source=_by_source(losses[mode], sources, clips, bootstrap),
                captions=captions.get(mode),
                multiple_choice=scores.get(mode),
                attention_entropy=entropy.get(mode),
            )
            for mode in modes
        },
        train_inference_gap=_loss_difference("autoregressive", "coarse_fine", losses, clips, bootstrap),
        foveation_gain=_loss_difference("coarse_only", "coarse_fine", losses, clips, bootstrap),
        multiple_choice=baselines,
        paired_tests=tests,
        question_order=order,
        gaze_chance=round(places.GAZE_CHANCE, DECIMALS) if order and subject.gazes else None,
        caption_examples=examples,
        heatmaps=heatmaps,
        absent=absent,
    )
    counts = {
        "modes": len(modes),
        "loss_samples": len(clips),
        "captions": len(captioned),
        "multiple_choice_questions": len(items),
        "order_questions": len(asked),
        "heatmaps": len(heatmaps),
    }
    return results, counts


def load_subject(job: EvalJob) -> Subject:
    """The run's model, with the tokenizer of the shards. Raises UserError where model, modes and shards do not fit together."""
    if job.threads:
        torch.set_num_threads(job.threads)
    shards = ShardSet(job.shards)
    model = load_model(job.run / MODEL_FOLDER).eval()
    if unknown := [mode for mode in job.modes or [] if mode not in model.modes]:
        raise UserError(
            f"the model (query {model.settings.query!r}) has no mode {', '.join(unknown)}",
            where="modes",
            fix=f"leave modes empty, or choose of: {', '.join(model.modes)}",
        )
    if model.settings.vision.frame_px != shards.manifest.frame_px:
        raise UserError(
            f"the model sees frames of {model.settings.vision.frame_px} px, the shards hold {shards.manifest.frame_px} px",
            where=f"{job.run} and {job.shards}",
            fix="evaluate on the shards the run was trained on",
        )
    cuda = job.device == "cuda" or (job.device == "auto" and torch.cuda.is_available())
    device = torch.device("cuda" if cuda else "cpu")
    return Subject(model.to(device), shards.tokenizer, shards.chat, device, job.batch_samples)


def headline(results: Results, timing: Latency | None) -> dict[Mode, Headline]:
    """The result table's lines."""
    return {
        mode: Headline(
            loss=result.loss.value,
            cider_d=result.captions.cider_d.value if result.captions else None,
            bleu_4=result.captions.bleu_4.value if result.captions else None,
            multiple_choice_accuracy=result.multiple_choice.accuracy.value if result.multiple_choice else None,
            latency_ms=timing.modes[mode].median_ms if timing else None,
        )
        for mode, result in results.modes.items()
    }


def _why_absent(wanted: int, what: str) -> str:
    return f"the validation split has no {what}" if wanted else "switched off"


def _losses(
    subject: Subject, split: ValidationSplit, job: EvalJob, modes: Sequence[Mode]
) -> tuple[dict[Mode, np.ndarray], list[str], list[str]]:
    """Per mode (sum, tokens) [N, 2] of the same samples, with each sample's source and clip."""
    parts: dict[Mode, list[np.ndarray]] = {mode: [] for mode in modes}
    sources: list[str] = []
    clips: list[str] = []
    tokens_per_frame = subject.model.settings.tokens_per_frame
    for batch in split.loss_batches(job.loss_samples, tokens_per_frame=tokens_per_frame, batch_samples=job.batch_samples):
        for mode, sums in subject.losses(batch.to(subject.device), modes).items():
            parts[mode].append(sums)
        sources.extend(batch.sources)
        clips.extend(batch.keys)
    return {mode: np.concatenate(sums) for mode, sums in parts.items()}, sources, clips


def _by_source(losses: np.ndarray, sources: list[str], clips: list[str], bootstrap: Bootstrap) -> dict[str, Estimate]:
    of_source, of_clip = np.array(sources), np.array(clips)
    return {
        source: bootstrap.weighted_mean(losses[of_source == source], of_clip[of_source == source].tolist())
        for source in sorted(set(sources))
    }


def _loss_difference(a: Mode, b: Mode, losses: dict[Mode, np.ndarray], clips: list[str], bootstrap: Bootstrap) -> PairedTest | None:
    """Loss in mode a minus loss in mode b, per labelled token."""
    if a not in losses or b not in losses:
        return None
    rows = np.stack([losses[a][:, 0] - losses[b][:, 0], losses[a][:, 1]], 1)
    return PairedTest(a=a, b=b, metric="loss", difference=bootstrap.weighted_mean(rows, clips))


def _captions(
    subject: Subject, questions: list[ClipQuestion], modes: Sequence[Mode], max_new_tokens: int, bootstrap: Bootstrap
) -> tuple[dict[Mode, CaptionScores], list[CaptionExample]]:
    samples = [without_answer(question.sample, question_first=False) for question in questions]
    generated: dict[Mode, list[str]] = {mode: subject.generate(samples, mode, max_new_tokens=max_new_tokens) for mode in modes}
    references = [[question.answer] for question in questions]
    clips = [question.clip for question in questions]
    examples = [
        CaptionExample(
            key=question.clip,
            source=question.sample.source,
            reference=question.answer,
            generated={mode: texts[index] for mode, texts in generated.items()},
        )
        for index, question in enumerate(questions[:CAPTION_EXAMPLES])
    ]
    return {mode: _caption_scores(texts, references, clips, bootstrap) for mode, texts in generated.items()}, examples


def _caption_scores(texts: list[str], references: list[list[str]], clips: list[str], bootstrap: Bootstrap) -> CaptionScores:
    stats = caption_stats(texts, references)

    def bleu(n: int) -> Estimate:
        return bootstrap.estimate(stats.bleu, clips, lambda sums: bleu_from_sums(sums, n))

    score = meteor(texts, references)
    return CaptionScores(
        cider_d=bootstrap.mean(stats.cider_d, clips),
        bleu_1=bleu(1),
        bleu_2=bleu(2),
        bleu_3=bleu(3),
        bleu_4=bleu(4),
        rouge_l=bootstrap.mean(stats.rouge_l, clips),
        meteor=None if score is None else round(score, DECIMALS),
    )


def _entropy(subject: Subject, questions: list[ClipQuestion], mode: Mode, bootstrap: Bootstrap) -> Estimate:
    """Entropy of the attention over a frame's patches, as a share of the uniform's, over all shown frames."""
    rows = []
    for attention in subject.gaze([question.sample for question in questions], mode):
        flat = attention.reshape(len(attention), -1)
        entropy = -np.sum(flat * np.log(np.maximum(flat, np.finfo(float).tiny)), 1)
        rows.append([entropy.sum() / np.log(max(2, flat.shape[1])), len(flat)])
    return bootstrap.weighted_mean(np.array(rows), [question.clip for question in questions])


def _heatmaps(subject: Subject, questions: list[ClipQuestion], modes: Sequence[Mode], output: Path) -> list[HeatMap]:
    maps = {mode: subject.gaze([question.sample for question in questions], mode) for mode in modes}
    made = []
    for index, question in enumerate(questions):
        file = f"{HEATMAP_FOLDER}/{question.clip}.png"
        (output / file).parent.mkdir(parents=True, exist_ok=True)
        draw(output / file, [_heat_row(mode.replace("_", " "), question, maps[mode][index]) for mode in modes], _title(question))
        made.append(
            HeatMap(file=file, key=question.clip, source=question.sample.source, question=question.question, answer=question.answer)
        )
    return made


def _composite(subject: Subject, questions: list[ClipQuestion], mode: Mode, path: Path) -> None:
    """One clip under several questions (or several clips, where no clip has more than one): the frames, then where the model looks."""
    samples = [question.sample for question in questions]
    maps = subject.gaze(samples, mode)
    answers = subject.generate(
        [without_answer(sample, question_first=sample.question_first) for sample in samples],
        mode,
        max_new_tokens=max(len(sample.turns[-1].answer_ids) for sample in samples) + 1,
    )
    rows: list[HeatRow] = []
    if len({question.clip for question in questions}) == 1:
        rows.append(HeatRow("the clip", _shown(questions[0]), None))
    rows.extend(
        _heat_row(f"{question.question} Says {printable(answer) or 'nothing'}, right is {question.answer}.", question, attention)
        for question, answer, attention in zip(questions, answers, maps, strict=True)
    )
    draw(path, rows, f"Where the model looks in each frame ({mode.replace('_', ' ')})")


def _heat_row(label: str, question: ClipQuestion, attention: np.ndarray) -> HeatRow:
    return HeatRow(label, _shown(question), attention, question.cells)


def _shown(question: ClipQuestion) -> np.ndarray:
    return question.sample.frames[[index for indexes in question.sample.media for index in indexes]]


def _title(question: ClipQuestion) -> str:
    return f"{question.question}  ({question.answer})"
