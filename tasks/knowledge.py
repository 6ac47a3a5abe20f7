"""The experiment log on the volume, `knowledge.md`: every finished phase appends what its runs were to show and what they showed, once."""

import os
from collections.abc import Sequence
from pathlib import Path

from fvlm_core.experiments import LOG_FILE, Experiment, log_table

HEAD = """# Knowledge

What every run was to show, what it changed, what came out. The flows only append: a later entry says what was wrong with
an earlier one.
"""


def append_experiments(volume: Path, phase: str, digest: str, created_at: str, experiments: Sequence[Experiment]) -> None:
    """Add the entries of a finished phase, whose result has this digest, if it has any and they are not there yet."""
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
