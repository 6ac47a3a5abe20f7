"""Finds, rents, waits for and ends the pod that runs the Prefect server. The program on that pod is `infra.runpod.server_pod`."""

import json
import os
import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

from infra import api
from infra.budget import SERVER, Budget
from infra.errors import InfraError
from infra.runpod.account import KEY_VARIABLE, Account
from infra.runpod.models import OVER, Pod
from infra.runpod.naming import NO_RUN, PodName, owner
from infra.runpod.pool import RunPodConfiguration
from infra.runpod.rent import rent
from infra.runpod.server_pod import ACCOUNT_KEY_VARIABLE, STOP
from infra.stack import StackError
from infra.volume import HOME, PASSWORD_FILE

PASSWORD = f"{HOME}/{PASSWORD_FILE}"
"""File on the volume with the password of the server."""
START_TIMEOUT_S = 2400.0
"""The first pod with a new lock file has to create the Python environment."""
STOP_TIMEOUT_S = 90.0
LOOK_S = 2.0


class RemoteServerError(InfraError):
    """The pod of the server has ended."""


def server_pod(account: Account) -> Pod | None:
    """Return the pod that runs the server of the account's volume, or None; the oldest one if there are several."""
    mine = owner(account.volume().id)
    found: list[Pod] = []
    for pod in account.client.pods():
        name = PodName.parse(pod.name)
        if name and name.owner == mine and name.run == NO_RUN and pod.status not in OVER:
            found.append(pod)
    return min(found, key=lambda pod: (pod.createdAt, pod.id), default=None)


def rent_server(
    account: Account,
    budget: Budget,
    configuration: RunPodConfiguration,
    *,
    pools: Mapping[str, str],
    port: int,
    address: str,
    days: float,
    say: Callable[[str], None],
) -> Pod:
    """Rent a pod with a server on `port` and workers for the `pools`; use one that somebody else has rented in the meantime instead.

    Raises the same errors as `rent`, and RefusedError if the image cannot be pulled.
    """
    command = ["{python}", "-m", "infra.runpod.server_pod", "--volume", configuration.mount_path, "--port", str(port)]
    command += ["--address", address, "--pools", json.dumps(dict(pools), separators=(",", ":"))]
    configuration.check_image()
    volume = account.volume()
    key = account.place.key.get_secret_value() if account.place.key else os.environ.get(KEY_VARIABLE, "")
    requirements = configuration.requirements
    requirements = replace(requirements, ports=(f"{port}/http",), env=requirements.env | {ACCOUNT_KEY_VARIABLE: key})
    configuration = configuration.model_copy(update={"command": shlex.join(command)})
    budget.storage(volume.id, volume.usd_per_hour)
    pod, name = rent(
        account.client,
        requirements,
        budget,
        run=NO_RUN,
        volume=volume,
        mount_path=configuration.mount_path,
        max_runtime_s=days * 86400,
        phase=SERVER,
        say=say,
        warn=say,
        environment=lambda deadline, machine: {"FVLM_POD_JOB": configuration.job(NO_RUN, volume, deadline, machine)},
    )
    first = server_pod(account)
    if first is None or first.id == pod.id:
        return pod
    say(f"pod {first.id} was rented for the server at the same time; pod {pod.id} is ended")
    account.client.terminate(pod.id)
    budget.ended(str(name))
    return first


def wait_until_it_answers(
    account: Account, pod: Pod, address: str, say: Callable[[str], None], *, timeout_s: float = START_TIMEOUT_S
) -> None:
    """Wait until the server answers at `address`. Raises RemoteServerError if its pod ends, StackError after `timeout_s` seconds."""
    deadline, shown = time.monotonic() + timeout_s, ""
    while not api.healthy(f"{address}/api"):
        now = server_pod(account)
        if now is None or now.id != pod.id:
            raise RemoteServerError(
                f"the server's pod {pod.id} has ended: {account.outcome(pod.id) or 'it left no reason'}",
                where=f"pods/{pod.id}/log.txt on the volume",
                fix="see `fvlm volume get` with that path; then run the command again",
            )
        if time.monotonic() > deadline:
            raise StackError(f"no answer from {address} in {timeout_s:.0f} s; the pod {pod.id} goes on, `fvlm infra down` ends it")
        if str(now.status) != shown:
            shown = str(now.status)
            say(f"pod {pod.id} is {shown}")
        time.sleep(LOOK_S)


def stop_server(account: Account, pod: Pod) -> None:
    """Ask the server to save its database and stop, wait for that, and end the pod in any case."""
    try:
        account.store.write(STOP, b"")
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while (found := server_pod(account)) and found.id == pod.id and time.monotonic() < deadline:
            time.sleep(LOOK_S)
    finally:
        account.client.terminate(pod.id)
