"""`fvlm speedrun`: checks, starts the local stack, runs the pipeline through it, shows its progress, and ends with its results."""

import asyncio
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from uuid import UUID

from rich.console import Console

from deployments.checks import check_phase, check_programs, check_sources, check_volume
from deployments.pretrained import check_pretrained
from deployments.profile import chosen_profile
from infra.stack import Stack
from tasks.config import PipelineConfig
from tasks.mixtures import check_names, known_sources

CANCEL_TIMEOUT_S = 20.0
"""How long a cancelled run may take to end by itself."""
FAILED, INTERRUPTED = 1, 130


def speedrun(
    profile: str,
    videos: Path | None,
    volume: Path,
    *,
    keep_server: bool,
    port: int | None,
    console: Console,
    changes: Sequence[str] = (),
    phase: str | None = None,
) -> int:
    """Run the whole pipeline, or one phase; returns the exit status.

    Raises UserError before anything is started, StackError while it runs.
    """
    config, volume = chosen_profile(profile, videos=videos, changes=changes), volume.resolve()
    if phase is not None:
        check_phase(phase)
    check_volume(volume, config)
    check_programs(config)
    check_pretrained(config)
    check_names(config, known_sources(config, check_sources(config, volume)))
    stack = Stack(volume, environment=os.environ)
    with _terminated_as_interrupted():
        keep = False
        try:
            console.print(f"Prefect UI: {stack.start_server(port)}", highlight=False)
            status = _run(stack, config, volume, console, phase)
            keep = keep_server or not stack.fresh
            return status
        except KeyboardInterrupt:
            console.print("interrupted: the run is cancelled; the same command goes on from here")
            keep = not stack.fresh
            return INTERRUPTED
        finally:
            if stack.state is None:
                pass  # nothing was started: what runs on the volume is another command's
            elif keep:
                stack.leave_running()
                console.print(f"Server and workers go on; stop them with: fvlm stop --volume {volume}", highlight=False, soft_wrap=True)
            else:
                stack.stop()


def _run(stack: Stack, config: PipelineConfig, volume: Path, console: Console, phase: str | None) -> int:
    """Show the plan, register, trigger, watch, and print the results."""
    os.environ.update(stack.client_environment())
    from prefect.context import refresh_global_settings_context

    refresh_global_settings_context()  # Prefect reads the environment when it is imported
    from deployments import register, watch
    from flows.registry import PHASES
    from tasks.pipeline_flow import message
    from tasks.plan import plan

    console.print(plan(list(PHASES.values()), config, volume).summary().terminal())
    stack.wait_for_server()
    types = asyncio.run(register.register(config, volume))
    if stack.fresh:
        asyncio.run(register.crash_stale_runs(volume))
    stack.start_workers(types)
    run: UUID = watch.trigger(config, phase or "pipeline")
    try:
        state = watch.follow(run, config, volume, stack, console, phase)
    except KeyboardInterrupt:
        watch.cancel(run, timeout_s=CANCEL_TIMEOUT_S)
        raise
    if not state.is_completed():
        console.print(f"[red]The pipeline ended {state.name}.[/red]")
        console.print(message(state), highlight=False, markup=False, soft_wrap=True)
        console.print("Run the same command again: finished steps are kept, training goes on from its checkpoint.", soft_wrap=True)
        return FAILED
    watch.print_results(config, volume, console)
    return 0


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM and a closed terminal end the run as Ctrl-C does; what was told to ignore them (nohup) goes on doing so."""

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    heeded = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, interrupt) for number in heeded}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
