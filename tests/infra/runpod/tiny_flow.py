"""A flow for pods: writes a file for every piece of work, so that work that was done twice is seen."""

import os
import time
from pathlib import Path

from prefect import flow


@flow(name="tiny", retries=0)
def tiny(folder: str, pieces: int = 3, seconds: float = 0.1, fail: bool = False) -> None:
    """Do what is left of `pieces` pieces of work in `folder`, each in `seconds`."""
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    print(f"tiny flow on pod {os.environ.get('RUNPOD_POD_ID')} with the secret {bool(os.environ.get('PLANTED'))}", flush=True)
    for number in range(pieces):
        piece = place / f"piece{number}"
        if piece.exists():
            continue
        time.sleep(seconds)
        with (place / f"piece{number}.times").open("a") as stream:
            stream.write("1")
        piece.touch()
    if fail:
        raise ValueError("asked to fail")
