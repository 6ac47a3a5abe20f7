"""Every number of every mode, and how the modes differ; from the evaluation's results."""

from fvlm_core.eval.results import Latency, Results
from fvlm_core.eval.tables import number
from fvlm_core.model.names import Mode
from fvlm_core.release.evidence import Evidence
from fvlm_core.release.figures import Figures
from fvlm_core.release.report import Block, Section
from fvlm_core.release.words import MODES, difference
from fvlm_core.tables import Table


def section(evidence: Evidence, figures: Figures) -> Section:
    results = evidence.results
    blocks: list[Block] = [modes_table(results, evidence.latency), _by_source(results)]
    optional = (_multiple_choice(results), _paired(results), _captions(results))
    return Section(title="Evaluation", blocks=blocks + [table for table in optional if table is not None])


def modes_table(results: Results, latency: Latency | None) -> Table:
    """A row per mode; with the time per clip where it is given."""
    rows = [
        [
            MODES[mode],
            number(one.loss),
            number(one.captions.cider_d if one.captions else None),
            number(one.captions.bleu_4 if one.captions else None),
            number(one.multiple_choice.accuracy if one.multiple_choice else None),
            number(one.attention_entropy),
            *([f"{latency.modes[mode].median_ms:.1f}" if mode in latency.modes else ""] if latency else []),
        ]
        for mode, one in results.modes.items()
    ]
    head = ["mode", "loss (nats/token)", "CIDEr-D", "BLEU-4", "multiple choice", "attention entropy"]
    head += ["ms per clip"] if latency else []
    entropy = "Attention entropy is a share of the uniform's: 1 is looking everywhere."
    return Table(head=head, rows=rows, note=f"In brackets: 95 % bootstrap interval over clips. {entropy}")


def _by_source(results: Results) -> Table:
    names = sorted({source for one in results.modes.values() for source in one.loss_by_source})
    rows = [[name, *(number(one.loss_by_source.get(name)) for one in results.modes.values())] for name in names]
    return Table(head=["loss by source", *(MODES[mode] for mode in results.modes)], rows=rows)


def _multiple_choice(results: Results) -> Table | None:
    base = results.multiple_choice
    if base is None:
        return None
    rows = [
        [MODES[mode], number(scores.accuracy), number(scores.shuffled_frames)]
        for mode, one in results.modes.items()
        if (scores := one.multiple_choice)
    ]
    rows += [["without frames (blind)", number(base.blind), ""], ["most frequent position", f"{base.majority:.3f}", ""]]
    rows += [["chance", f"{base.chance:.3f}", ""]]
    note = f"{base.questions} questions about {base.clips} clips, by mean log-likelihood per token of each option's text."
    return Table(head=["multiple choice", "accuracy", "frames shuffled"], rows=rows, note=note)


def _paired(results: Results) -> Table | None:
    tests = [test for test in (results.foveation_gain, results.train_inference_gap) if test] + results.paired_tests
    rows = [
        [
            f"{test.metric.replace('_', ' ')}: {MODES[test.a]} − {MODES[test.b]}",
            difference(test.difference),
            "" if test.p_value is None else f"{test.p_value:.3g}",
        ]
        for test in tests
    ]
    return Table(head=["paired difference", "value", "McNemar p"], rows=rows) if rows else None


def _captions(results: Results) -> Table | None:
    examples = results.caption_examples
    modes: list[Mode] = [mode for mode in results.modes if any(mode in example.generated for example in examples)]
    rows = [[example.reference, *(example.generated.get(mode, "") for mode in modes)] for example in examples]
    return Table(head=["reference caption", *(MODES[mode] for mode in modes)], rows=rows) if rows else None
