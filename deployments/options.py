"""Options with their help texts, and the console for tables, shared by several commands."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from rich.console import Console

DEFAULT_VOLUME = Path("volume")
PIPED_WIDTH = 240
"""Width of tables that are not printed to a terminal."""

Profile = Annotated[str, Parameter(help="`laptop`, `ci`, `runpod`, or the path of a profile's YAML file.")]
Videos = Annotated[
    Path | None, Parameter(help="Your own clips: a csv or parquet file with the columns url (address or file path) and caption.")
]
Volume = Annotated[Path, Parameter(help="Folder for all results, as the workers see it; finished results in it are reused.")]
KeepServer = Annotated[bool, Parameter(negative="", help="Leave the Prefect server and its workers running at the end.")]
Port = Annotated[int | None, Parameter(help="Port of the Prefect server and its UI; by default 4200 or the next free one.")]
Cloud = Annotated[
    Literal["emulator"] | None,
    Parameter(help="`emulator`: rehearse a run on rented machines with an emulated RunPod, whose pods are local processes; costs nothing."),
]
Live = Annotated[bool, Parameter(negative="", help="For rented machines: use current prices from the catalogue (needs RUNPOD_API_KEY).")]
Recipes = Annotated[
    tuple[Path, ...],
    Parameter(name="--recipe", negative="", help="YAML file of a recipe to price, e.g. in `deployments/recipes/`; may be repeated."),
]
Changes = Annotated[
    tuple[str, ...],
    Parameter(
        name="--set",
        negative="",
        help="PATH=VALUE: change a setting of the profile, e.g. `stages.stage2.run.steps=10`; may be repeated.",
    ),
]


def table_console() -> Console:
    """A console for tables; output that is piped to a file or program is not cut to a terminal's width."""
    console = Console()
    return console if console.is_terminal else Console(width=PIPED_WIDTH)
