"""A flow for pods: writes a file for every piece of work, so that work that was done twice is seen."""

import os
import time
from pathlib import Path

from prefect import flow
from prefect.artifacts import create_markdown_artifact

from infra.locks import leased

LEASE_S = 10.0


@flow(name="tiny")
def tiny(folder: str, pieces: int = 3, seconds: float = 0.1, fail: bool = False, show: bool = False) -> None:
    """Do what is left of `pieces` pieces of work in `folder`, each in `seconds`."""
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    print(f"tiny flow on pod {os.environ.get('RUNPOD_POD_ID')} with the secret {bool(os.environ.get('PLANTED'))}", flush=True)
    if show:
        create_markdown_artifact(f"{pieces} pieces of work", key="tiny")
    with leased(place / "work", lease_s=LEASE_S):
        for number in range(pieces):
            if (place / f"piece{number}").exists():
                continue
            time.sleep(seconds)
            with (place / f"piece{number}").open("a") as stream:
                stream.write("1")
    if fail:
        raise ValueError("asked to fail")
