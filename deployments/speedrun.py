"""`fvlm speedrun`: run checks, start the local stack, run the pipeline on it, and show its progress and results."""

import asyncio
import os
import signal
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING
from uuid import UUID

import httpx
from rich.console import Console

from deployments.checks import check_phase, check_programs, check_sources, check_volume
from deployments.pretrained import check_pretrained
from deployments.profile import chosen_profile
from deployments.status import print_results
from fvlm_core.errors import UserError, is_user_error
from infra import prefect_settings
from infra.stack import GO_ON, PROCESS_POOL, Stack, StackError, stop_command
from infra.volume import is_network_file_system
from infra.watchdog import watched
from tasks.config import PipelineConfig
from tasks.mixtures import check_names, known_sources

if TYPE_CHECKING:
    from deployments.cloud import Rehearsal

CANCEL_TIMEOUT_S = 20.0
"""How long a cancelled run may take to end on its own."""
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
    emulated: bool = False,
    inspect: "Callable[[Rehearsal], None] | None" = None,
) -> int:
    """Run the complete pipeline, or one phase; returns the exit status.

    With `emulated`, it runs on pods of an emulated RunPod; `inspect` is called with the rehearsal at the end, before the emulator stops.

    Raises UserError before anything is started, StackError while it runs.
    """
    if emulated and keep_server:
        raise UserError(
            "the emulated cloud and its pods end with the command", where="--keep-server", fix="leave it out, or leave out --cloud"
        )
    config, volume = chosen_profile(profile, videos=videos, changes=changes), volume.resolve()
    if phase is not None:
        check_phase(phase)
    check_volume(volume, config)
    check_programs(config)
    check_pretrained(config)
    check_names(config, known_sources(config, check_sources(config, volume)))
    if emulated:
        from deployments.cloud import rehearsal

        with rehearsal(config, volume) as cloud:
            status = _with_stack(cloud.config, volume, console, phase, keep_server=False, port=port, environment=cloud.environment)
            cloud.print_bill(console)
            if inspect is not None:
                inspect(cloud)
            return status
    return _with_stack(config, volume, console, phase, keep_server=keep_server, port=port, environment={})


def _with_stack(
    config: PipelineConfig,
    volume: Path,
    console: Console,
    phase: str | None,
    *,
    keep_server: bool,
    port: int | None,
    environment: Mapping[str, str],
) -> int:
    """Start the stack, run, and stop what was started. `environment` is added to that of the workers."""
    stack = Stack(volume, environment={**os.environ, **environment})
    with _terminated_as_interrupted():
        keep = False
        try:
            stack.start_server(port)
            keep = not stack.fresh
            _say_where(stack, console)
            status = _run(stack, config, volume, console, phase, keep=keep_server or keep)
            keep = keep_server or keep
            return status
        except KeyboardInterrupt:
            console.print("interrupted: the run is cancelled; run the same command again to resume")
            return INTERRUPTED
        finally:
            if stack.state is None:
                pass  # nothing was started here: any stack on the volume belongs to another command
            elif keep:
                stack.leave_running()
                console.print(
                    f"Server and workers go on; stop them with: {stop_command(volume)}", highlight=False, markup=False, soft_wrap=True
                )
            else:
                with _undisturbed():
                    stack.stop()


def _say_where(stack: Stack, console: Console) -> None:
    """Print the address of the UI. The link with the password goes only to a terminal, since others may read a log file."""
    link = stack.opening_link()
    address = link if link and console.is_terminal else stack.ui_url
    console.print(f"Prefect UI: {address}", highlight=False, markup=False, soft_wrap=True)
    if link:
        console.print(f"Its password: {stack.password_file}", highlight=False, markup=False, soft_wrap=True)
    if stack.owns_server and is_network_file_system(stack.home):
        console.print(
            f"The volume is on a network; the server's database is in {stack.database_folder()}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )


def _run(stack: Stack, config: PipelineConfig, volume: Path, console: Console, phase: str | None, *, keep: bool) -> int:
    """Show the plan, register, trigger, follow, and print the results. `keep`: leave the server and all workers running."""
    pools = config.machine.pools.by_role
    if phase is None and pools["pipeline"].type == PROCESS_POOL:
        stack.prepare_worker(pools["pipeline"].name)
    prefect_settings.apply(stack.client_environment())
    from deployments import register, watch
    from flows.registry import PHASES
    from tasks.pipeline_flow import message
    from tasks.plan import plan

    console.print(plan(list(PHASES.values()), config, volume).of(phase).summary().terminal())
    for flow in register.FLOWS[:2]:  # while the server starts: comparing deployments needs the schemas of the pipeline and of a phase
        register.parameter_schema(flow)
    stack.wait_for_server()
    with watched(stack, console.print) as watchdog:
        try:
            if stack.fresh:
                asyncio.run(register.crash_stale_runs(volume))
            types = asyncio.run(register.make_pools(config, volume))
            # first start the worker that takes the run, and the pipeline's other workers once the run has begun: each spends seconds on
            # imports, and two at once delay each other
            first = pools[PHASES[phase].pool if phase else register.PIPELINE].name
            stack.start_workers(types if config.machine.rental else {first: types[first]})
            later = {} if phase else types
            registered = asyncio.run(register.register(config, volume, pool_types=types))
            run: UUID = watch.trigger(config, phase or register.PIPELINE, registered.deployment)
            try:
                state = watch.follow(run, config, volume, console, phase, begun=lambda: stack.start_workers(later))
            except KeyboardInterrupt:
                if watchdog.error is None:
                    watch.cancel(run, timeout_s=CANCEL_TIMEOUT_S)
                raise
        except httpx.HTTPError as error:
            raise StackError(f"the Prefect server at {stack.api_url} failed: {error}") from None
    if keep:
        stack.start_workers(types)
    if not state.is_completed():
        console.print(f"[red]The pipeline ended {state.name}.[/red]")
        for line in advice(message(state), stopped=None if keep else stack.ui_url):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        return FAILED
    print_results(list(PHASES.values()), config, volume, console)
    return 0


def advice(message: str, *, stopped: str | None) -> list[str]:
    """Lines to print for a failed run's message: without links to a server that was stopped (at address `stopped`), with what to do."""
    lines = [line for line in message.splitlines() if stopped is None or stopped not in line]
    return lines if is_user_error(message) else [*lines, GO_ON]


@contextmanager
def _undisturbed() -> Generator[None]:
    """Ignore Ctrl-C, SIGTERM and a closed terminal, so that the stack is stopped completely."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _terminated_as_interrupted() -> Generator[None]:
    """Treat SIGTERM and a closed terminal like Ctrl-C, except for signals that are ignored (nohup)."""

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    heeded = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, interrupt) for number in heeded}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
