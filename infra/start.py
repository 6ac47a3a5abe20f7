"""Starts Python programs with many imports faster than `python -m MODULE ARGUMENTS...`.

`python -m infra.start MODULE ARGUMENTS...` runs the garbage collector rarely. By default Python runs it after every 700 new objects and
once more at exit. Importing Prefect creates a million objects, none of which is garbage: collecting takes a third of the time that a flow
run needs to start and end.

`python -m infra.start --prepared MODULES` imports the comma-separated modules, then waits for a line on standard input: the command to
run, as a JSON list. A program can thus do its imports before its command is known. If the input ends without a line, it exits.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import sys

THRESHOLDS = 50_000, 20, 20
"""Arguments of `gc.set_threshold`: new objects before a collection of the youngest generation (which takes a few milliseconds), and
collections of a generation before one of the next older generation."""
PREPARED = "--prepared"


def collect_rarely() -> None:
    """Run the garbage collector rarely from now on, and not at exit, when all memory is freed anyway."""
    gc.set_threshold(*THRESHOLDS)
    atexit.register(gc.freeze)


def awaited(modules: str) -> list[str]:
    """Import the comma-separated modules, then read a command from standard input, which is empty from then on.

    Returns an empty list if there is no command.
    """
    for module in modules.split(","):
        importlib.import_module(module)
    line = sys.stdin.readline()
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), sys.stdin.fileno())
    return json.loads(line) if line else []


def run(command: list[str]) -> None:
    """Run a module as `__main__`. `command` is its name, followed by its arguments."""
    sys.argv = command
    runpy.run_module(command[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    collect_rarely()
    command = sys.argv[1:]
    if command[0] == PREPARED:
        command = awaited(command[1]) or sys.exit()
    run(command)
