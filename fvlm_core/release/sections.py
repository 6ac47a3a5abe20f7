"""The report's content, from the evidence: what was found, how it was made, what it does not show."""

from pathlib import Path

import yaml

from fvlm_core.eval.references import REFERENCES
from fvlm_core.eval.results import MODES, Estimate, Mode, OrderCell
from fvlm_core.eval.tables import number
from fvlm_core.release.evidence import STAGES, Evidence
from fvlm_core.release.report import Block, Code, Items, Picture, Report, Section, Table, Text, Tile, Tone
from fvlm_core.scaling.ablations import change_text
from fvlm_core.scaling.grid import fit_rows, show, show_interval
from fvlm_core.train.jobs import MODEL_FOLDER

TOY_PARAMS = 20_000_000
"""Below the size of any pretrained backbone we use: a demonstration of the pipeline."""
FULL_FRAME_PX = 224
BAD_CLIPS_SHOWN = 10
SCALING_CAPTIONS = {
    "iso_flop": "Loss over model size, a curve per FLOP budget; stars are the best sizes.",
    "crossover": "Foveated against the baseline with pooled tokens, per budget.",
    "token_efficiency": "Loss against the visual tokens that the language model read in training.",
    "data_scaling": "Loss over labelled tokens, a curve per size.",
    "allocation": "Best size over the training budget.",
}


def build(evidence: Evidence, figures: dict[str, str]) -> Report:
    """The whole report. `figures`: pictures by name, relative to the report."""
    verdict, tone, note = _verdict(evidence)
    job, manifest = evidence.job, evidence.run.manifest
    profile = f"profile {job.profile}, " if job.profile else ""
    sections = [
        Section(title="Evaluation", blocks=_evaluation(evidence)),
        Section(title="Question order", blocks=_order(evidence)),
        Section(title="Where it looks", blocks=_gaze(evidence, figures)),
        Section(title="Training curves", blocks=_curves(evidence, figures)),
        Section(title="Ablations", blocks=_ablations(evidence, figures)),
        Section(title="Scaling", blocks=_scaling(evidence, figures)),
        Section(title="Speed", blocks=_speed(evidence, figures)),
        Section(title="Data", blocks=_data(evidence)),
        Section(title="Time and cost", blocks=_cost(evidence)),
        Section(title="Limitations and negative results", blocks=[Items(items=limitations(evidence))]),
        Section(title="Published models", blocks=_published()),
        Section(title="Provenance", blocks=_provenance(evidence)),
        Section(title="Reproduce", blocks=_reproduce(evidence)),
    ]
    return Report(
        name=job.name,
        subtitle=f"Report of a release: {profile}{manifest.params:,} parameters, "
        f"{evidence.results.tokens_per_frame} visual token{'s' if evidence.results.tokens_per_frame > 1 else ''} per frame",
        verdict=verdict,
        tone=tone,
        verdict_note=note,
        tiles=_tiles(evidence),
        sections=sections,
    )


def limitations(evidence: Evidence) -> list[str]:
    """What this release does not show, and what did not work."""
    results, model = evidence.results, evidence.recipe.model
    items = []
    if evidence.run.manifest.params < TOY_PARAMS:
        items.append(
            "A toy-sized model: it shows that the pipeline and the mechanism work, not what the architecture reaches at full size."
        )
    random = [name for name, part in (("vision encoder", model.vision), ("language model", model.llm)) if part.checkpoint is None]
    if random:
        items.append(f"The {' and the '.join(random)} started from random weights, not from a pretrained checkpoint.")
    if results.frame_px < FULL_FRAME_PX:
        items.append(f"Frames are {results.frame_px} px wide; real runs use {FULL_FRAME_PX} px.")
    sources = sorted(next(iter(results.modes.values())).loss_by_source)
    items.append(f"Evaluated on held-out samples of the training sources ({', '.join(sources)}), not on public benchmarks.")
    items.append("One training run with one seed: intervals are over validation clips, not over runs.")
    gap = results.train_inference_gap
    if gap is not None and gap.difference.low > 0:
        items.append(f"Autoregressive inference is worse than coarse→fine by {number(gap.difference, 4)} nats per token.")
    if evidence.ablations is not None:
        worse = [row for row in evidence.ablations.rows if row.delta > 0 and row.name != evidence.ablations.baseline]
        if worse:
            listed = ", ".join(f"{row.name} ({row.delta:+.4f})" for row in sorted(worse, key=lambda row: row.delta))
            items.append(f"Ablations that did not help, in validation loss: {listed}.")
    divergences = sum(len(stage.manifest.divergences) for stage in evidence.stages.values())
    if divergences:
        items.append(f"Training diverged {divergences} time(s) and went back to an earlier checkpoint.")
    items += [f"Not measured: {what} ({why})." for what, why in results.absent.items()]
    return items + evidence.job.limitations


def _verdict(evidence: Evidence) -> tuple[str, Tone, str]:
    gain, gap = evidence.results.foveation_gain, evidence.results.train_inference_gap
    if gain is None:
        return "This model pools its frames and does not look anywhere.", "neutral", "There is no finer pass to compare with."
    difference = gain.difference
    by = f"{abs(difference.value):.3f} nats per token"
    interval = f"95 % interval {difference.low:+.4f} to {difference.high:+.4f} over {difference.n} clips and texts"
    tone: Tone = "neutral"
    verdict = "No difference between looking and not looking can be shown."
    if difference.low > 0:
        verdict, tone = f"Looking helps: coarse→fine is better than coarse-only by {by}.", "good"
    elif difference.high < 0:
        verdict, tone = f"Looking hurts: coarse→fine is worse than coarse-only by {by}.", "bad"
    note = f"Loss of coarse-only minus coarse→fine: {interval}."
    if gap is not None:
        noise = " (within noise)" if gap.difference.low <= 0 <= gap.difference.high else ""
        value = round(gap.difference.value, 4) + 0.0  # no minus before zero
        note += f" Autoregressive inference minus coarse→fine: {value:+.4f}{noise}."
    return verdict, tone, note


def _tiles(evidence: Evidence) -> list[Tile]:
    results, mode = evidence.results, evidence.best_mode
    best = results.modes[mode]
    tiles = [Tile(label=f"loss, {_words(mode)}", value=f"{best.loss.value:.3f}", note="nats per token")]
    if best.captions is not None:
        tiles.append(
            Tile(label="captions, CIDEr-D", value=f"{best.captions.cider_d.value:.2f}", note=f"BLEU-4 {best.captions.bleu_4.value:.3f}")
        )
    if best.multiple_choice is not None and results.multiple_choice is not None:
        accuracy = f"{best.multiple_choice.accuracy.value:.1%}"
        tiles.append(Tile(label="multiple choice", value=accuracy, note=f"chance {results.multiple_choice.chance:.1%}"))
    asked = {(cell.order, cell.mode): cell for cell in results.question_order}
    first, coarse = asked.get(("question_first", mode)), asked.get(("question_first", "coarse_only"))
    if first is not None and coarse is not None and mode != "coarse_only":
        note = f"coarse-only {coarse.accuracy.value:.1%}"
        tiles.append(Tile(label="question first, accuracy", value=f"{first.accuracy.value:.1%}", note=note))
    if first is not None and first.gaze_hit_rate is not None and results.gaze_chance:
        tiles.append(Tile(label="gaze on target", value=f"{first.gaze_hit_rate.value:.1%}", note=f"chance {results.gaze_chance:.1%}"))
    if evidence.latency is not None and mode in evidence.latency.modes:
        clips = f"{evidence.latency.frames} frames, {evidence.latency.device}"
        tiles.append(Tile(label="time to first token", value=f"{evidence.latency.modes[mode].median_ms:.0f} ms", note=clips))
    return tiles


def _evaluation(evidence: Evidence) -> list[Block]:
    results, latency = evidence.results, evidence.latency
    head = ["mode", "loss (nats/token)", "CIDEr-D", "BLEU-4", "multiple choice", "attention entropy", "ms per clip"]
    rows = []
    for mode, one in results.modes.items():
        captions, choices = one.captions, one.multiple_choice
        rows.append(
            [
                _words(mode),
                number(one.loss),
                number(captions.cider_d if captions else None),
                number(captions.bleu_4 if captions else None),
                number(choices.accuracy if choices else None),
                number(one.attention_entropy),
                f"{latency.modes[mode].median_ms:.1f}" if latency and mode in latency.modes else "",
            ]
        )
    entropy = "Attention entropy is a share of the uniform's: 1 is looking everywhere."
    blocks: list[Block] = [Table(head=head, rows=rows, note=f"In brackets: 95 % bootstrap interval over clips. {entropy}")]
    names = sorted({source for one in results.modes.values() for source in one.loss_by_source})
    by_source = [[name, *(number(one.loss_by_source.get(name)) for one in results.modes.values())] for name in names]
    blocks.append(Table(head=["loss by source", *map(_words, results.modes)], rows=by_source))
    if (base := results.multiple_choice) is not None:
        choice_rows = [
            [_words(mode), number(scores.accuracy), number(scores.shuffled_frames)]
            for mode, one in results.modes.items()
            if (scores := one.multiple_choice)
        ]
        choice_rows += [["without frames (blind)", number(base.blind), ""], ["most frequent position", f"{base.majority:.3f}", ""]]
        choice_rows += [["chance", f"{base.chance:.3f}", ""]]
        note = f"{base.questions} questions about {base.clips} clips, by mean log-likelihood per token of each option's text."
        blocks.append(Table(head=["multiple choice", "accuracy", "frames shuffled"], rows=choice_rows, note=note))
    tests = [test for test in (results.foveation_gain, results.train_inference_gap) if test] + results.paired_tests
    if tests:
        test_rows = [
            [
                f"{test.metric.replace('_', ' ')}: {_words(test.a)} − {_words(test.b)}",
                number(test.difference, 4),
                "" if test.p_value is None else f"{test.p_value:.3g}",
            ]
            for test in tests
        ]
        blocks.append(Table(head=["paired difference", "value", "McNemar p"], rows=test_rows))
    if results.caption_examples:
        modes: list[Mode] = [mode for mode in results.modes if any(mode in example.generated for example in results.caption_examples)]
        examples = [[example.reference, *(example.generated.get(mode, "") for mode in modes)] for example in results.caption_examples]
        blocks.append(Table(head=["reference caption", *map(_words, modes)], rows=examples))
    return blocks


def _order(evidence: Evidence) -> list[Block]:
    cells = {(cell.order, cell.mode): cell for cell in evidence.results.question_order}
    if not cells:
        return [Text(text=f"Missing: {evidence.results.absent.get('question_order', 'the question orders were not evaluated')}.")]
    modes: list[Mode] = [mode for mode in MODES if any(key[1] == mode for key in cells)]
    rows = []
    for order in ("question_first", "question_after"):
        for what, pick in (("later frames", _later), ("first frame", _first), ("all frames", _all)):
            values = [number(pick(cells[order, mode])) if (order, mode) in cells else "" for mode in modes]
            if any(values):
                rows.append([f"{order.replace('_', ' ')}, {what}", *values])
    hits = []
    for order in ("question_first", "question_after"):
        values = [number(cells[order, mode].gaze_hit_rate) if (order, mode) in cells else "" for mode in modes]
        if any(values):
            hits.append([order.replace("_", " "), *values])
    note = "Accuracy on questions about a place in each frame. A coarse pass reads every frame alike, so only a fine one can use the "
    note += "question; with the question after the frames no mode knows where to look."
    blocks: list[Block] = [Table(head=["accuracy", *map(_words, modes)], rows=rows, note=note)]
    if hits:
        chance = evidence.results.gaze_chance
        said = f"Share of later frames whose attention peak is on the asked place{f'; by chance {chance:.3f}' if chance else ''}."
        blocks.append(Table(head=["gaze on target", *map(_words, modes)], rows=hits, note=said))
    return blocks


def _gaze(evidence: Evidence, figures: dict[str, str]) -> list[Block]:
    pictures: list[Block] = [
        Picture(file=figures[f"gaze-{index}"], caption=f"{one.question} — {one.answer} ({one.source}, {one.key})", chart=False)
        for index, one in enumerate(evidence.results.heatmaps)
        if f"gaze-{index}" in figures
    ]
    return pictures or [Text(text=f"Missing: {evidence.results.absent.get('heatmaps', 'no heat maps were drawn')}.")]


def _curves(evidence: Evidence, figures: dict[str, str]) -> list[Block]:
    blocks: list[Block] = [Picture(file=figures["curves"], caption="Training, stage after stage.")] if "curves" in figures else []
    runs = evidence.stages or {"run": evidence.run}
    rows = [
        [
            name,
            f"{run.manifest.steps:,}",
            f"{run.manifest.samples_seen:,}",
            f"{run.manifest.frames_seen:,}",
            f"{run.manifest.flops:.2e}",
            f"{run.manifest.final_loss:.4f}",
            f"{run.manifest.best_loss:.4f} at {run.manifest.best_step:,}",
            ", ".join(map(str, run.manifest.resumed_from)) or "no",
        ]
        for name, run in runs.items()
    ]
    blocks.append(Table(head=["stage", "steps", "samples", "frames", "FLOPs", "final loss", "best loss", "resumed at step"], rows=rows))
    if missing := [name for name in STAGES if name not in evidence.stages]:
        blocks.append(Text(text=f"Missing: {', '.join(missing)}."))
    return blocks


def _ablations(evidence: Evidence, figures: dict[str, str]) -> list[Block]:
    report = evidence.ablations
    if report is None:
        return [Text(text="Missing: no ablations were run.")]
    ordered = sorted(report.rows, key=lambda row: row.loss)
    rows = [
        [
            row.name + ("*" if row.control else "") + ("†" if row.other_validation else ""),
            change_text(row, report.baseline),
            f"{row.loss:.4f}",
            "" if row.name == report.baseline else f"{row.delta:+.4f}",
            "" if row.frames_per_s is None else f"{row.frames_per_s:.1f}",
            f"{row.params:,}",
            f"{row.flops:.2e}",
        ]
        for row in ordered
    ]
    note = "One change each, one seed. * control, never adopted. † changes the validation set too, so cannot win."
    marked = [number for number, row in enumerate(ordered) if row.name == report.winner]
    head = ["run", "change", "validation loss", "difference", "frames/s", "parameters", "FLOPs"]
    blocks: list[Block] = [Text(text=f"Winner: **{report.winner}**.")]
    blocks += [Picture(file=figures["ablations"], caption="Difference to the baseline.")] if "ablations" in figures else []
    return [*blocks, Table(head=head, rows=rows, marked=marked, note=note)]


def _scaling(evidence: Evidence, figures: dict[str, str]) -> list[Block]:
    report, fits = evidence.scaling, evidence.fits
    if report is None or fits is None:
        return [Text(text="Missing: no scaling grid was run.")]
    budgets = sorted({point.budget_flops for point in report.points})
    losses = {(point.variant, point.size, point.budget_flops): point.loss for point in report.points}
    rows = [
        [f"{variant} {size}", f"{params:,}", *(f"{losses[variant, size, c]:.4f}" if (variant, size, c) in losses else "" for c in budgets)]
        for variant, size, params in dict.fromkeys((point.variant, point.size, point.params) for point in report.points)
    ]
    found = [(name, quantity) for name, quantity in fit_rows(fits) if quantity.value is not None]
    reasons: dict[str, list[str]] = {}
    for name, quantity in fit_rows(fits):
        if quantity.value is None:
            reasons.setdefault(quantity.reason, []).append(name)
    refused = [f"{'; '.join(names)}: **{reason}**" for reason, names in reasons.items()]
    blocks: list[Block] = [Text(text=f"Chosen size: **{report.chosen}**, by the {report.chosen_reason}.")]
    blocks.append(Table(head=["loss", "parameters", *(f"{budget:.1e} FLOPs" for budget in budgets)], rows=rows))
    blocks += [Picture(file=figures[name], caption=caption) for name, caption in SCALING_CAPTIONS.items() if name in figures]
    if found:
        blocks.append(Table(head=["fit", "value", "95 % interval"], rows=[[name, show(q), show_interval(q)] for name, q in found]))
    if refused:
        blocks.append(Text(text="What these runs do not determine:"))
        blocks.append(Items(items=refused))
    return blocks


def _speed(evidence: Evidence, figures: dict[str, str]) -> list[Block]:
    report = evidence.speed
    if report is None:
        return [Text(text="Missing: no speed work was done.")]
    rows = [
        [
            row.variant,
            row.failure or f"{row.samples_per_s or 0:.1f}",
            f"{row.frames_per_s:.1f}" if row.frames_per_s else "",
            f"{row.share_of_matmul:.1%}" if row.share_of_matmul else "",
            f"{row.mfu:.1%}" if row.mfu else "",
            f"{row.gpu_busy:.1%}" if row.gpu_busy else "",
            f"{row.peak_memory_gb:.2f}" if row.peak_memory_gb else "",
        ]
        for row in report.rows
    ]
    head = ["variant", "samples/s", "frames/s", "share of matmul", "MFU", "GPU busy", "peak GB"]
    kept = [index for index, column in enumerate(head) if index < 2 or any(row[index] for row in rows)]
    chosen = ", ".join(f"`{path}` = {value}" for path, value in report.chosen.items())
    before = f"{report.naive_samples_per_s:.1f} to {report.tuned_samples_per_s:.1f} samples/s"
    blocks: list[Block] = [
        Text(text=f"**{report.speedup:.1f} times** faster than a plain loop ({before}) on {report.device}. Chosen: {chosen}.")
    ]
    blocks += [Picture(file=figures["speed"], caption="Throughput of the variants.")] if "speed" in figures else []
    table = Table(
        head=[head[index] for index in kept],
        rows=[[row[index] for index in kept] for row in rows],
        marked=[len(rows) - 1],
        note="The naive variant is first, the tuned one last.",
    )
    return [*blocks, table]


def _data(evidence: Evidence) -> list[Block]:
    shards = evidence.shards
    rows = [
        [one.name, one.kind, one.split, f"{one.samples:,}", f"{one.conversations:,}", f"{one.frames:,}", f"{one.tokens:,}"]
        for one in sorted(shards.sources, key=lambda one: (one.split, one.name))
    ]
    note = f"Frames of {shards.frame_px} px at {shards.fps:g} per second; a vocabulary of {shards.vocab_size:,} tokens."
    head = ["source", "kind", "split", "samples", "conversations", "frames", "text tokens"]
    blocks: list[Block] = [Table(head=head, rows=rows, note=note)]
    mixture = ", ".join(f"{part.source} {part.share:.0%}" for part in evidence.recipe.data.mixture)
    blocks.append(Text(text=f"Mixture of the last stage: {mixture}."))
    if shards.bad:
        shown = [f"`{clip.url}`: {clip.reason}" for clip in shards.bad[:BAD_CLIPS_SHOWN]]
        left = len(shards.bad) - len(shown)
        blocks += [Text(text=f"{len(shards.bad)} clips were left out:"), Items(items=shown + ([f"and {left} more"] if left else []))]
    return blocks


def _cost(evidence: Evidence) -> list[Block]:
    price = evidence.job.usd_per_hour
    phases: list[tuple[str, float, str]] = []
    before = sum(manifest.seconds for manifest in evidence.precompute) + evidence.shards.seconds
    phases.append(("precompute", before, f"{len(evidence.precompute) + 1} steps"))
    if evidence.speed is not None:
        phases.append(("speed", evidence.speed.seconds, f"{len(evidence.speed.rows)} variants"))
    if evidence.ablations is not None:
        rows = evidence.ablations.rows
        phases.append(("ablations", evidence.ablations.seconds + sum(row.seconds for row in rows), f"{len(rows)} runs"))
    if evidence.scaling is not None:
        grid = evidence.scaling
        phases.append(("scaling grid", grid.seconds + grid.run_seconds, f"{len(grid.points)} runs"))
    for name, stage in (evidence.stages or {"training": evidence.run}).items():
        phases.append((name, stage.manifest.seconds, f"{stage.manifest.steps:,} steps"))
    phases.append(("evaluation", evidence.evaluation.seconds, f"{len(evidence.results.modes)} modes"))
    phases.append(("all", sum(seconds for _, seconds, _ in phases), ""))
    head = ["phase", "machine time", "of"] + (["USD"] if price is not None else [])
    rows = [
        [name, duration(seconds), of] + ([f"{seconds / 3600 * price:.2f}"] if price is not None else []) for name, seconds, of in phases
    ]
    note = "Time of the jobs themselves, one after another; queues and start-up are not in it."
    if price is not None:
        note += f" At {price:.2f} USD per hour."
    blocks: list[Block] = [Table(head=head, rows=rows, marked=[len(rows) - 1], note=note)]
    if missing := [name for name in evidence.missing if name not in STAGES]:
        blocks.append(Text(text=f"Missing, so not counted: {', '.join(missing)}."))
    return blocks


def _provenance(evidence: Evidence) -> list[Block]:
    manifest, latency = evidence.run.manifest, evidence.latency
    rows = [
        ["run", f"{evidence.results.run}, finished {manifest.created_at}"],
        ["weights (sha256)", evidence.results.checkpoint],
        ["shards (digest)", evidence.results.shards],
        ["evaluation", f"{evidence.evaluation.digest}, seed {evidence.results.seed}, {evidence.results.resamples} resamples"],
        ["machine of the evaluation", f"{latency.device}, {latency.threads} thread(s)" if latency else "not recorded"],
        ["software", ", ".join(f"{name} {version}" for name, version in manifest.versions.items())],
    ]
    recipes = {name: stage.recipe for name, stage in evidence.stages.items()} or {"run": evidence.recipe}
    code = [
        Code(
            title=f"Recipe of {name}",
            text=yaml.safe_dump(recipe.model_dump(mode="json", exclude={"output", "shards", "init_from"}), sort_keys=False),
        )
        for name, recipe in recipes.items()
    ]
    return [Table(head=["", ""], rows=rows), *code]


def _reproduce(evidence: Evidence) -> list[Block]:
    load = [
        "from transformers import AutoModel",
        f'model = AutoModel.from_pretrained("{evidence.job.push_to or MODEL_FOLDER}", trust_remote_code=True)',
        f'print(model.answer("clip.mp4", "What is in the video?", mode="{evidence.best_mode}"))',
    ]
    blocks: list[Block] = [Text(text="Make this release again:"), Code(text="\n".join(evidence.job.reproduce))]
    return [*blocks, Text(text="Use the model:"), Code(text="\n".join(load))]


def _published() -> list[Block]:
    benchmarks = list(dict.fromkeys(one.benchmark for one in REFERENCES))
    lines: dict[tuple[str, int, Mode | None], dict[str, float]] = {}
    for one in REFERENCES:
        lines.setdefault((one.model, one.tokens_per_frame, one.mode), {})[one.benchmark] = one.value
    rows = [
        [model, str(tokens), _words(mode) if mode else "", *(f"{scores[name]:.1f}" if name in scores else "" for name in benchmarks)]
        for (model, tokens, mode), scores in lines.items()
    ]
    note = f"Published by their authors, not measured here. Sources: {', '.join(dict.fromkeys(one.source for one in REFERENCES))}."
    return [Table(head=["model", "tokens per frame", "mode", *benchmarks], rows=rows, note=note)]


def duration(seconds: float) -> str:
    """E.g. `1 h 02 min`, `3 min 20 s`, `4.5 s`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def named_pictures(report: Report) -> list[Path]:
    """The pictures a report shows, relative to it."""
    return [Path(block.file) for section in report.sections for block in section.blocks if isinstance(block, Picture)]


def _words(mode: Mode) -> str:
    return {"coarse_only": "coarse-only", "coarse_fine": "coarse→fine", "autoregressive": "autoregressive"}[mode]


def _later(cell: OrderCell) -> Estimate | None:
    return cell.later_frames


def _first(cell: OrderCell) -> Estimate | None:
    return cell.first_frame


def _all(cell: OrderCell) -> Estimate | None:
    return cell.accuracy
