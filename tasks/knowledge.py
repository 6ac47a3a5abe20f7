"""The experiment log on the volume, `knowledge.md`: every finished phase appends, once, what its runs were meant to show and did show."""

import os
from collections.abc import Sequence
from pathlib import Path

from fvlm_core.experiments import LOG_FILE, Experiment, log_table

HEAD = """# Knowledge

What every run was to show, what it changed, what came out. The flows only append: a later entry says what was wrong with
an earlier one.
"""


def append_experiments(volume: Path, phase: str, digest: str, created_at: str, experiments: Sequence[Experiment]) -> None:
    """Append the experiments of a finished phase, unless there are none or the log already has those of this result (`digest`)."""
    if not experiments:
        return
    path, mark = volume / LOG_FILE, f"<!-- {phase} {digest[:16]} -->"
    known = path.read_text() if path.is_file() else ""
    if mark in known:
        return
    text = f"\n## {created_at[:16].replace('T', ' ')} UTC, {phase}\n\n{mark}\n\n{log_table(experiments).markdown()}\n"
    with path.open("a") as stream:  # one write in append mode: entries of two phases never mix
        stream.write(text if known else HEAD + text)
        stream.flush()
        os.fsync(stream.fileno())
