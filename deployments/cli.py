"""The `fvlm` command."""

import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import httpx
from cyclopts import App, Parameter
from rich.console import Console

from fvlm_core.cli import USER_ERROR
from fvlm_core.errors import UserError
from infra.api import problem_with
from infra.stack import Stack, StackError, StackRefusedError, require_access
from infra.volume import known_volume_id

app = App(
    name="fvlm",
    version=lambda: version("fvlm"),
    help="A video language model that reads each frame as one token, and the complete pipeline that trains and releases it.",
)
DEFAULT_VOLUME = Path("volume")


@app.command
def speedrun(
    *,
    profile: str = "laptop",
    videos: Path | None = None,
    volume: Path = DEFAULT_VOLUME,
    keep_server: Annotated[bool, Parameter(negative="")] = False,
    port: int | None = None,
) -> int:
    """Run the whole pipeline: from videos to an evaluated and packaged model. Run it again to resume.

    Parameters
    ----------
    profile
        `laptop`, `ci`, or the path of a profile's YAML file.
    videos
        Your own clips: a csv or parquet file with the columns url (address or file path) and caption.
    volume
        Folder for all results; what is finished there is not made again.
    keep_server
        Leave the Prefect server and its workers running at the end.
    port
        Port of the Prefect server and its UI; by default 4200 or the next free one.
    """
    from deployments.speedrun import speedrun as run

    return run(profile, videos, volume, keep_server=keep_server, port=port, console=Console())


@app.command
def deploy(*, profile: str = "laptop", volume: Path = DEFAULT_VOLUME) -> int:
    """Register the work pools and every deployment of a profile on the server that PREFECT_API_URL names.

    Parameters
    ----------
    profile
        `laptop`, `ci`, `runpod`, or the path of a profile's YAML file.
    volume
        Folder for all results, as the workers see it.
    """
    url = os.environ.get("PREFECT_API_URL")
    if not url or (problem := problem_with(url)):
        what = f"{url!r} is no server's address: {problem}" if url else "no Prefect server is named"
        raise UserError(what, where="PREFECT_API_URL", fix="set it to the server's, e.g. http://127.0.0.1:4200/api")
    os.environ["PREFECT_SERVER_EPHEMERAL_ENABLED"] = "false"
    from deployments.checks import load_profile

    config = load_profile(profile)
    require_access(url, os.environ)
    import asyncio

    from deployments.register import FLOWS, register

    registered = asyncio.run(register(config, volume.absolute()))
    Console().print("\n".join(f"{name}/{registered.deployment}" for name in FLOWS), highlight=False)
    return 0


@app.command
def stop(*, volume: Path = DEFAULT_VOLUME) -> int:
    """End the server, the workers and the runs that work on a volume.

    Parameters
    ----------
    volume
        The volume whose stack is to end.
    """
    if known_volume_id(volume) is None:
        raise UserError("no fvlm command has run on this volume", where=str(volume.absolute()), fix="give the --volume that was used")
    Stack(volume, environment=os.environ).stop()
    return 0


def main() -> None:
    """Entry point: errors that a user can act on are printed without a traceback."""
    try:
        sys.exit(app())
    except (UserError, StackError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(USER_ERROR if isinstance(error, UserError | StackRefusedError) else 1)
    except httpx.HTTPError as error:
        print(f"error: the Prefect server failed: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
