"""Statistics of a folder of shards, as tables and figures: sources, durations, frames, tokens, and what was left out."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fvlm_core.canvas import COLOURS, WIDTH, canvas
from fvlm_core.data.rows import SPLITS
from fvlm_core.data.shard_set import ShardSet
from fvlm_core.figures import Figure
from fvlm_core.tables import Table

DataFrame = Any
"""A pandas.DataFrame. Type checkers do not know its groups and columns."""
QUANTILES = {"least": 0.0, "5 %": 0.05, "median": 0.5, "95 %": 0.95, "most": 1.0}
BINS = 40
SHOWN_REASONS = 20
"""Reasons listed for samples that were left out, most frequent first."""
FIGURES = (
    Figure(file="sources.png", caption="Samples of each source, in training and in validation (logarithmic)."),
    Figure(file="durations.png", caption="How long the videos of each source are."),
    Figure(file="frames.png", caption="Frames in a sample, by source."),
    Figure(file="tokens.png", caption="Text tokens in a conversation, by source."),
)


def tables(shards: ShardSet) -> list[Table]:
    """Return the tables: counts per source and split; quantiles of seconds, frames and tokens; why samples were left out."""
    rows = _rows(shards)
    made = [_sources(rows), _quantiles(rows)]
    if lost := sorted(shards.manifest.lost, key=lambda loss: -loss.samples):
        rows_lost = [[loss.source, loss.reason, f"{loss.samples:,}"] for loss in lost[:SHOWN_REASONS]]
        made.append(Table(title="Left out", head=["source", "reason", "samples"], rows=rows_lost))
    return made


def draw(shards: ShardSet, folder: Path) -> None:
    """Write FIGURES into `folder`."""
    rows = _rows(shards)
    samples = rows.drop_duplicates("key")
    names = sorted(rows["source"].unique())
    with canvas(folder / FIGURES[0].file, (WIDTH, 1.5 + 0.4 * len(names))) as figure:
        axes = figure.add_subplot()
        for place, split in enumerate(SPLITS):
            counts = samples[samples["split"] == split].groupby("source").size().reindex(names, fill_value=0)
            axes.barh(np.arange(len(names)) + 0.2 * (2 * place - 1), counts, height=0.4, label=split, color=COLOURS[place])
        axes.set_yticks(range(len(names)), names)
        axes.set_xscale("log")
        axes.set_xlabel("samples")
        axes.legend()
    videos = samples[samples["kind"] == "video"]
    _histograms(folder / FIGURES[1].file, videos, "duration_s", "seconds")
    _histograms(folder / FIGURES[2].file, samples[samples["kind"] != "text"], "n_frames", "frames")
    _histograms(folder / FIGURES[3].file, rows, "n_tokens", "text tokens")


def _rows(shards: ShardSet) -> DataFrame:
    return pd.concat([shards.rows(split) for split in SPLITS])


def _sources(rows: DataFrame) -> Table:
    found = []
    for (source, split), mine in rows.groupby(["source", "split"]):
        samples = mine.drop_duplicates("key")
        found.append(
            {
                "source": source,
                "split": split,
                "kind": str(samples["kind"].iloc[0]),
                "samples": len(samples),
                "conversations": len(mine),
                "frames": int(samples["n_frames"].sum()),
                "text_tokens": int(mine["n_tokens"].sum()),
                "answer_tokens": int(mine["n_answer_tokens"].sum()),
                "hours_of_video": float(samples.loc[samples["kind"] == "video", "duration_s"].sum() / 3600),
            }
        )
    return Table.of(found, title="Sources")


def _quantiles(rows: DataFrame) -> Table:
    samples = rows.drop_duplicates("key")
    shown = samples[samples["kind"] != "text"]
    parts = {"seconds": samples[samples["kind"] == "video"]["duration_s"], "frames": shown["n_frames"], "tokens": rows["n_tokens"]}
    made = []
    for name, column in parts.items():
        for source, values in column.groupby(rows.loc[column.index, "source"]) if len(column) else ():
            numbers = values.quantile(list(QUANTILES.values())).tolist()
            made.append([str(source), name, *(f"{number:,.4g}" for number in numbers)])
    return Table(
        title="Sizes",
        head=["source", "of", *QUANTILES],
        rows=made,
        note="Seconds are per video, frames per sample, tokens per conversation.",
    )


def _histograms(path: Path, rows: DataFrame, column: str, unit: str) -> None:
    """Plot a histogram per source over common bins, as shares of the source."""
    names: Sequence[str] = sorted(rows["source"].unique())
    with canvas(path, (WIDTH, 4.5)) as figure:
        axes = figure.add_subplot()
        edges = np.linspace(0, max(1.0, float(rows[column].max() if len(rows) else 1.0)) * 1.001, BINS + 1)
        for place, name in enumerate(names):
            values = rows.loc[rows["source"] == name, column]
            share = np.histogram(values, edges)[0] / max(1, len(values))
            axes.stairs(share, edges, label=name, color=COLOURS[place % len(COLOURS)], linestyle="-" if place < len(COLOURS) else "--")
        axes.set_xlabel(unit)
        axes.set_ylabel("share of the source")
        if names:
            axes.legend(ncols=2)
