"""`fvlm speedrun`: checks, starts the local stack, runs the pipeline through it, shows its progress, and ends with its results."""

import asyncio
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any
from uuid import UUID

import httpx
from rich.console import Console

from deployments.checks import check_programs, check_videos, check_volume, load_profile
from fvlm_core.errors import UserError
from infra.stack import GO_ON, Stack, StackError, stop_command
from infra.volume import is_network_file_system
from infra.watchdog import watched
from tasks.config import PipelineConfig
from tasks.mixtures import check_names, made_sources, mixtures
from tasks.outside import VIDEOS, read_sources
from tasks.recipes import OWN_DATA

CANCEL_TIMEOUT_S = 20.0
"""How long a cancelled run may take to end by itself."""
FAILED, INTERRUPTED = 1, 130
FIX = "\n  fix:"
"""In the message of an error that says itself what to do: bad input, which the same command would meet again."""
CAPTION_SOURCES = ("gaze_caption", "natural")
"""Sources whose share of every mixture goes to the user's own videos."""


def speedrun(profile: str, videos: Path | None, volume: Path, *, keep_server: bool, port: int | None, console: Console) -> int:
    """Run the whole pipeline; returns the exit status. Raises UserError before anything is started, StackError while it runs."""
    config, volume = load_profile(profile), volume.resolve()
    if videos is not None:
        config = with_videos(config, videos.resolve())
    check_volume(volume, config)
    check_programs(config)
    own = config.precompute.videos
    if own is not None:
        check_videos(own, config.precompute.download.max_bad_share)
    check_names(config, made_sources(config) | (read_sources(own) if own else set()))
    stack = Stack(volume, environment=os.environ)
    with _terminated_as_interrupted():
        keep = False
        try:
            stack.start_server(port)
            keep = not stack.fresh
            _say_where(stack, console)
            status = _run(stack, config, volume, console, keep=keep_server or keep)
            keep = keep_server or keep
            return status
        except KeyboardInterrupt:
            console.print("interrupted: the run is cancelled; the same command goes on from here")
            return INTERRUPTED
        finally:
            if stack.state is None:
                pass  # nothing was started: what runs on the volume is another command's
            elif keep:
                stack.leave_running()
                console.print(f"Server and workers go on; stop them with: {stop_command(volume)}", highlight=False, soft_wrap=True)
            else:
                with _undisturbed():
                    stack.stop()


def with_videos(config: PipelineConfig, videos: Path) -> PipelineConfig:
    """The profile with the user's own videos in place of the default clips that are captioned."""
    values = config.model_dump(mode="json")
    values["precompute"] |= {"videos": str(videos), "natural": False}
    for part in (values["base"], *values["stages"].values()):
        for data in (part["data"], part["data"]["validation"]):
            if data:
                data["mixture"] = _with_videos(data["mixture"])
    for ablation in values["ablations"]:
        if ablation["path"] == OWN_DATA:
            ablation["value"] = _with_videos(ablation["value"])
    mine = PipelineConfig.from_values(values, where=f"the profile {config.name} with {videos}")
    if not any(part.source == VIDEOS for _, _, mixture in mixtures(mine) for part in mixture):
        raise UserError(
            f"no mixture of the profile {config.name} has a share for them",
            where="--videos",
            fix=f"name the source {VIDEOS!r} in a mixture of the profile, or one of {', '.join(CAPTION_SOURCES)}, whose place they take",
        )
    return mine


def _with_videos(mixture: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The user's videos in place of the default captioned clips, with their share."""
    share = sum(one["share"] for one in mixture if one["source"] in CAPTION_SOURCES)
    kept = [one for one in mixture if one["source"] not in CAPTION_SOURCES]
    return kept + ([{"source": VIDEOS, "share": share}] if share else [])


def _say_where(stack: Stack, console: Console) -> None:
    """Where the UI is. The link that carries the password is for a terminal: what is written to a file is kept and read by others."""
    link = stack.opening_link()
    address = link if link and console.is_terminal else stack.ui_url
    console.print(f"Prefect UI: {address}", highlight=False, markup=False, soft_wrap=True)
    if link:
        console.print(f"Its password: {stack.password_file}", highlight=False, markup=False, soft_wrap=True)
    if stack.owns_server and is_network_file_system(stack.home):
        console.print(f"The volume is on a network; the server's database is in {stack.database_folder()}", highlight=False, soft_wrap=True)


def _run(stack: Stack, config: PipelineConfig, volume: Path, console: Console, *, keep: bool) -> int:
    """Register, trigger, watch, and print the results. `keep`: the server goes on afterwards."""
    for name in [name for name in os.environ if name.startswith("PREFECT_")]:
        del os.environ[name]
    os.environ.update(stack.client_environment())
    from deployments import register, watch  # Prefect reads the environment when it is imported
    from tasks.run_phase import told

    stack.wait_for_server()
    with watched(stack, console.print) as watchdog:
        try:
            registered = asyncio.run(register.register(config, volume))
            if stack.fresh:
                asyncio.run(register.crash_stale_runs(volume))
            stack.start_workers(registered.pool_types)
            run: UUID = watch.trigger(config, registered.deployment)
            try:
                state = watch.follow(run, config, volume, console)
            except KeyboardInterrupt:
                if watchdog.error is None:
                    watch.cancel(run, timeout_s=CANCEL_TIMEOUT_S)
                raise
        except httpx.HTTPError as error:
            raise StackError(f"the Prefect server at {stack.api_url} failed: {error}") from None
    if not state.is_completed():
        console.print(f"[red]The pipeline ended {state.name}.[/red]")
        for line in advice(told(state), stopped=None if keep else stack.ui_url):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        return FAILED
    watch.print_results(config, volume, console)
    return 0


def advice(message: str, *, stopped: str | None) -> list[str]:
    """What to print of a failed run's message: no links to a server that has been stopped (the address `stopped`), and what to do."""
    lines = [line for line in message.splitlines() if stopped is None or stopped not in line]
    return lines if FIX in message else [*lines, GO_ON]


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Neither Ctrl-C nor a closed terminal leaves half of a stack behind."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
