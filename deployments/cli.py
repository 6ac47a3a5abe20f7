"""The `fvlm` command."""

import os
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter
from rich.console import Console

from fvlm_core.errors import UserError
from fvlm_core.exit_status import USER_ERROR
from infra.stack import PortTakenError, Stack, StackError

app = App(name="fvlm", help="A video language model that reads each frame as one token, and the whole road to releasing it.")
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
    if "PREFECT_API_URL" not in os.environ:
        raise UserError("no Prefect server is named", where="PREFECT_API_URL", fix="set it, e.g. http://127.0.0.1:4200/api")
    import asyncio

    from deployments.checks import load_profile
    from deployments.register import FLOWS, register

    config = load_profile(profile)
    asyncio.run(register(config, volume.absolute()))
    Console().print("\n".join(f"{name}/{config.name}" for name in FLOWS), highlight=False)
    return 0


@app.command
def stop(*, volume: Path = DEFAULT_VOLUME) -> int:
    """End the server, the workers and the runs that work on a volume.

    Parameters
    ----------
    volume
        The volume whose stack is to end.
    """
    Stack(volume, environment=os.environ).stop()
    return 0


def main() -> None:
    """Entry point: errors that a user can act on are printed without a traceback."""
    try:
        sys.exit(app())
    except (UserError, StackError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(USER_ERROR if isinstance(error, UserError | PortTakenError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
