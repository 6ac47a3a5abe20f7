"""`fvlm infra up`: run the Prefect server and the workers on a small pod, so that no local machine has to stay on."""

import contextlib
import shlex
import time
from pathlib import Path
from urllib.parse import quote

from rich.console import Console

from fvlm_core.errors import UserError
from fvlm_core.tables import Table
from infra import prefect_settings
from infra.runpod.account import Account
from infra.runpod.code import upload_code
from infra.runpod.models import Pod
from infra.runpod.naming import PodName
from infra.runpod.rent import utc_text
from infra.runpod.setup import mark
from infra.s3 import S3Store
from infra.stack import PROCESS_POOL, REPOSITORY
from tasks.config import PipelineConfig
from tasks.rented import account_of, budget_of, rental_of

DAY_S = 86_400.0
ENDED = UserError("everything on the volume was ended", where="`fvlm infra down`", fix="run `fvlm infra up`, and start the run again")
"""Message of the runs that `down` marks Crashed. It is a refusal: a pipeline that still runs does not retry a refused phase."""
LOOKS, LOOK_S = 5, 2.0
"""How often, and at which interval, `down` looks for runs that a running pipeline has started meanwhile."""


def up(config: PipelineConfig, console: Console, *, days: float | None = None) -> int:
    """Find or rent the server's pod, wait until the server answers, and deploy the profile on it; returns the exit status."""
    from infra.runpod.remote import rent_server, server_pod, wait_until_it_answers

    rental = rental_of(config)
    account = account_of(rental)
    ledger = budget_of(rental, account.store)
    volume = account.volume()
    mark(account.store, volume)
    code = upload_code(REPOSITORY, account.store)

    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    pod = server_pod(account)
    if pod is None:
        pod = rent_server(
            account,
            ledger,
            _configuration(config, code),
            pools=_pool_types(config),
            port=rental.server_port,
            address=rental.server_address.replace("{port}", str(rental.server_port)),
            days=rental.server_days if days is None else days,
            say=say,
        )
    else:
        refuse_longer(pod, days)
        say(f"the server's pod {pod.id} is already running, until {_until(pod)}")
    address = rental.address_of(pod.id)
    wait_until_it_answers(account, pod, address, say)
    prefect_settings.apply(variables(account, address))
    deploy(config, Path(rental.mount_path), code)
    _say_where(account, address, console)
    return 0


def refuse_longer(pod: Pod, days: float | None) -> None:
    """Raise UserError if the server's pod ends earlier than requested, by a tenth or more."""
    name = PodName.parse(pod.name)
    if days is not None and name is not None and name.deadline < time.time() + 0.9 * days * DAY_S:
        fix = f"run `fvlm infra down`, which saves the server's records, and then `fvlm infra up --days {days:g}`"
        what = f"the server's pod {pod.id} runs already, and ends sooner than in {days:g} days"
        raise UserError(what, where=f"its end: {_until(pod)}", fix=fix)


def _until(pod: Pod) -> str:
    name = PodName.parse(pod.name)
    return utc_text(name.deadline) if name else "an unknown time"


def variables(account: Account, address: str) -> dict[str, str]:
    """Environment variables for clients of the server. Raises UserError if the server's password is not on the volume."""
    from infra.runpod.remote import PASSWORD

    password = account.store.read(PASSWORD)
    if not password:
        raise UserError("the server has no password on the volume", where=PASSWORD, fix="run `fvlm infra up`")
    return {"PREFECT_API_URL": f"{address}/api", "PREFECT_API_AUTH_STRING": password.decode(), "PREFECT_SERVER_EPHEMERAL_ENABLED": "false"}


def exports(config: PipelineConfig) -> str:
    """`export` lines for a shell, with the password. Raises UserError if no server is running."""
    from infra.runpod.remote import server_pod

    rental = rental_of(config)
    account = account_of(rental)
    pod = server_pod(account)
    if pod is None:
        raise UserError("no pod runs a Prefect server", where=rental.volume, fix="run `fvlm infra up`")
    known = variables(account, rental.address_of(pod.id))
    return "\n".join(f"export {name}={shlex.quote(value)}" for name, value in known.items())


def down(config: PipelineConfig, account: Account, console: Console) -> None:
    """Mark unfinished runs Crashed, then end the server's pod, if there is one, after it has saved its database."""
    import asyncio

    import httpx

    from infra.runpod.remote import server_pod, stop_server

    rental = rental_of(config)
    if pod := server_pod(account):
        console.print(f"pod {pod.id} runs the server; it saves its database and ends", highlight=False)
        with contextlib.suppress(UserError, httpx.HTTPError):  # end the pod even if the server does not answer
            prefect_settings.apply(variables(account, rental.address_of(pod.id)))
            from deployments.register import crash_stale_runs

            for _ in range(LOOKS):
                if not asyncio.run(crash_stale_runs(Path(rental.mount_path), str(ENDED))):
                    break
                time.sleep(LOOK_S)
        stop_server(account, pod)


def smoke(config: PipelineConfig, bucket: S3Store, console: Console, *, yes: bool) -> int:
    """Run the smoke test on RunPod after asking for confirmation, and print its findings."""
    from infra.runpod.smoke import most_usd
    from infra.runpod.smoke import smoke as asked

    rental = rental_of(config)
    account = account_of(rental)
    mark(account.store, account.volume())
    usd = most_usd(rental.pipeline_usd_per_hour)
    console.print(
        f"Rents two small CPU pods for some minutes, at most ${usd:.2f}; also requests a GPU type that should be unavailable.",
        highlight=False,
    )
    if not yes and console.input("Go on? [y/N] ").strip().lower() not in ("y", "yes"):
        return 1

    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    answers = asked(account, bucket, budget_of(rental, account.store), _configuration(config, None), say=say)
    rows = [[one.question, one.answer] for one in answers]
    console.print(Table(title="First dollar", head=["question", "answer"], rows=rows).terminal())
    return 0


def deploy(config: PipelineConfig, volume: Path, code: str | None) -> str:
    """Register pools and deployments on the server at PREFECT_API_URL; returns the name of the deployments."""
    import asyncio

    from deployments.register import register

    return asyncio.run(register(config, volume, code=code)).deployment


def _configuration(config: PipelineConfig, code: str | None):
    """The pod configuration of the pipeline pool, which is also small enough for the server."""
    from infra.runpod.pool import RunPodConfiguration

    pool = config.machine.pools.by_role["pipeline"]
    return RunPodConfiguration.model_validate(rental_of(config).job_variables(code) | pool.job_variables)


def _pool_types(config: PipelineConfig) -> dict[str, str]:
    from flows.reap import POOL

    return {pool.name: pool.type for pool in config.machine.pools.by_role.values()} | {POOL: PROCESS_POOL}


def _say_where(account: Account, address: str, console: Console) -> None:
    """Print how to reach the server. The link with the password goes only to a terminal, since others may read a log file."""
    from infra.runpod.remote import PASSWORD

    password = variables(account, address)["PREFECT_API_AUTH_STRING"]
    link = f"{address}/open#{quote(password)}" if console.is_terminal else address
    lines = [
        f"Prefect UI: {link}",
        f"Its password: {PASSWORD} on the volume (`fvlm volume get {PASSWORD}`)",
        'For other commands: eval "$(fvlm infra env)", then `prefect deployment run pipeline/...`',
        "It ends with `fvlm infra down`.",
    ]
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
