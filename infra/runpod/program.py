"""Passes the pod's program (`pod.py`) in the environment of the container, whose command only unpacks it."""

import base64
import zlib
from importlib import resources

PROGRAM_VARIABLE = "FVLM_POD_PROGRAM"
START = f"""python3 -c 'import base64,os,zlib;exec(zlib.decompress(base64.b64decode(os.environ["{PROGRAM_VARIABLE}"])))'"""
"""The container's command."""


def program(runpod_url: str) -> dict[str, str]:
    """Return the variables that every pod gets."""
    source = resources.files("infra.runpod").joinpath("pod.py").read_bytes()
    return {PROGRAM_VARIABLE: base64.b64encode(zlib.compress(source, 9)).decode(), "FVLM_RUNPOD_URL": runpod_url}
