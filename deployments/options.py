"""What several commands have in common: options, each with its help, and the console that their tables go to."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from rich.console import Console

DEFAULT_VOLUME = Path("volume")
PIPED_WIDTH = 240
"""Columns of a table that no terminal shows."""

Profile = Annotated[str, Parameter(help="`laptop`, `ci`, `runpod`, or the path of a profile's YAML file.")]
Videos = Annotated[
    Path | None, Parameter(help="Your own clips: a csv or parquet file with the columns url (address or file path) and caption.")
]
Volume = Annotated[Path, Parameter(help="Folder for all results, as the workers see it; what is finished there is not made again.")]
KeepServer = Annotated[bool, Parameter(negative="", help="Leave the Prefect server and its workers running at the end.")]
Port = Annotated[int | None, Parameter(help="Port of the Prefect server and its UI; by default 4200 or the next free one.")]
Cloud = Annotated[
    Literal["emulator"] | None,
    Parameter(help="`emulator`: rehearse a rented run on pods of an emulated RunPod, which are processes of this machine; costs nothing."),
]
Live = Annotated[bool, Parameter(negative="", help="Of rented machines: today's prices from the catalogue (needs RUNPOD_API_KEY).")]
Recipes = Annotated[
    tuple[Path, ...],
    Parameter(name="--recipe", negative="", help="YAML file of a recipe to price, e.g. of `deployments/recipes/`; any number of times."),
]
Changes = Annotated[
    tuple[str, ...],
    Parameter(
        name="--set",
        negative="",
        help="PATH=VALUE: a setting of the profile to change, e.g. `stages.stage2.run.steps=10`; any number of times.",
    ),
]


def table_console() -> Console:
    """A console for tables: what is piped into a file or another program is not cut to a terminal's width."""
    console = Console()
    return console if console.is_terminal else Console(width=PIPED_WIDTH)
