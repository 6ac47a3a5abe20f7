"""Starts Python programs that import much in less time than `python -m MODULE ARGUMENTS...`.

`python -m infra.start MODULE ARGUMENTS...` looks for garbage rarely. Python does after every 700 new objects, and once more when it ends;
Prefect makes a million of them when it is imported, and none is garbage: looking takes a third of a flow run's start and end.

`python -m infra.start --prepared MODULES` imports the modules (with commas) and waits: a line of its standard input says, as a JSON list,
what to run. So a program can be imported before it is known what it is to do. Where the input ends without a line, it ends too.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import sys

THRESHOLDS = 50_000, 20, 20
"""New objects before the youngest are looked at (a few milliseconds), and how often that is done before older ones are."""
PREPARED = "--prepared"


def collect_rarely() -> None:
    """Look for garbage rarely from now on, and not at the end of the process, when all of its memory goes."""
    gc.set_threshold(*THRESHOLDS)
    atexit.register(gc.freeze)


def awaited(modules: str) -> list[str]:
    """Import the modules; returns what the standard input says, which is empty from then on."""
    for module in modules.split(","):
        importlib.import_module(module)
    line = sys.stdin.readline()
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), sys.stdin.fileno())
    return json.loads(line) if line else []


def run(command: list[str]) -> None:
    """Run a module as the main one: its name, and its arguments."""
    sys.argv = command
    runpy.run_module(command[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    collect_rarely()
    command = sys.argv[1:]
    if command[0] == PREPARED:
        command = awaited(command[1]) or sys.exit()
    run(command)
