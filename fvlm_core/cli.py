"""The entry point that every job shares: `python -m fvlm_core.<module> job.yaml`."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from fvlm_core.errors import UserError
from fvlm_core.settings import Settings

Job = TypeVar("Job", bound=Settings)
USER_ERROR = 2
"""Exit status of a job stopped by a UserError; retrying it is of no use."""


def run_job(settings: type[Job], function: Callable[[Job], object]) -> None:
    """Read the settings file named on the command line and run the job on it.

    A UserError is printed without a traceback and ends the process with status 2.
    """
    if len(sys.argv) != 2:
        print(f"usage: python -m {function.__module__} SETTINGS.yaml", file=sys.stderr)
        sys.exit(USER_ERROR)
    try:
        function(settings.from_yaml(Path(sys.argv[1])))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(USER_ERROR)
