"""`fvlm data`: make the shards of a profile, and inspect a folder of shards."""

from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter
from rich.console import Console

from deployments.data_plan import plan
from deployments.options import DEFAULT_VOLUME, Changes, KeepServer, Port, Profile, Videos, Volume, table_console
from fvlm_core.data.rows import Split

app = App(name="data", help="Make the shards of a profile, and inspect a folder of shards.")
app.command(plan)
DEFAULT_SHARDS = DEFAULT_VOLUME / "shards"
DAMAGED = 1
"""Exit status of `verify` if it has found problems."""

Shards = Annotated[Path, Parameter(help="Folder of shards; `VOLUME/shards` is the newest that a pipeline run made.")]


@app.command
def prepare(
    *,
    profile: Profile = "laptop",
    videos: Videos = None,
    volume: Volume = DEFAULT_VOLUME,
    keep_server: KeepServer = False,
    port: Port = None,
    changes: Changes = (),
) -> int:
    """Make the shards of a profile, by running only its phase `precompute`. Run it again to resume."""
    from deployments.speedrun import speedrun

    return speedrun(profile, videos, volume, changes=changes, keep_server=keep_server, port=port, console=Console(), phase="precompute")


@app.command
def stats(shards: Shards = DEFAULT_SHARDS, /, *, output: Path | None = None) -> int:
    """Show statistics of a folder of shards: sources, durations, frames, tokens, and omitted samples.

    Parameters
    ----------
    output
        Folder for the tables as markdown (`stats.md`) and plots; by default the tables are only printed.
    """
    from fvlm_core.data.shard_set import ShardSet
    from fvlm_core.data.stats import FIGURES, draw, tables

    opened = ShardSet(shards.resolve())
    made = tables(opened)
    console = table_console()
    for table in made:
        console.print(table.terminal())
    if output is not None:
        draw(opened, output)
        parts = [f"## {table.title}\n\n{table.markdown()}" for table in made] + [figure.markdown() for figure in FIGURES]
        (output / "stats.md").write_text(f"# Data in {shards}\n\n" + "\n\n".join(parts) + "\n")
        console.print(f"wrote {output / 'stats.md'}", highlight=False, markup=False)
    return 0


@app.command
def look(
    shards: Shards = DEFAULT_SHARDS, /, *, output: Path = Path("look"), source: str | None = None, split: Split = "train", samples: int = 4
) -> int:
    """Write a contact sheet of frames with captions and questions, as `look.html` and `look.png`.

    Parameters
    ----------
    output
        Folder for the sheet.
    source
        Name of one source; by default all.
    split
        `train` or `val`.
    samples
        Samples per source, evenly spaced from the shortest to the longest.
    """
    from fvlm_core.data.look import choose, page, picture
    from fvlm_core.data.shard_set import ShardSet

    shown = choose(ShardSet(shards.resolve()), split, source=source, samples=samples)
    output.mkdir(parents=True, exist_ok=True)
    (output / "look.html").write_text(page(shown, f"{source or 'All sources'}, {split}"))
    picture(shown, output / "look.png")
    Console().print(f"wrote {output / 'look.html'} and {output / 'look.png'}", highlight=False, markup=False)
    return 0


@app.command
def verify(shards: Shards = DEFAULT_SHARDS, /) -> int:
    """Check every digest, index entry and sample; prints what is damaged, and then exits with status 1."""
    from fvlm_core.data.verify import verify as verified

    found = verified(shards.resolve())
    for problem in found.problems:
        print(problem)
    verdict = f"{len(found.problems)} problems" if found.problems else "everything is intact"
    print(f"{found.files} files, {found.shards} shards, {found.samples:,} samples: {verdict}")
    return DAMAGED if found.problems else 0
