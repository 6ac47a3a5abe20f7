"""`fvlm infra`, `fvlm volume` and `fvlm board`: rented machines, the files on their volume, and its message board."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter
from cyclopts.validators import Number
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn

from deployments.options import table_console
from fvlm_core.errors import UserError
from infra.board import Board, Entry
from infra.budget import Budget
from infra.errors import InfraError, RefusedError
from infra.runpod.account import Account
from infra.runpod.bills import reconcile
from infra.runpod.code import upload_code
from infra.runpod.errors import WrongKeyError
from infra.runpod.models import HOURS_PER_MONTH
from infra.runpod.reaper import reap, settle
from infra.runpod.setup import find_or_create_volume, mark
from infra.s3 import S3Store, local_path
from infra.stack import REPOSITORY

if TYPE_CHECKING:
    from tasks.rental import Rental

app = App(name="infra", help="Rented machines: set up, show cost, end pods without an owner. API keys come from the environment.")
volume_app = App(name="volume", help="Files on the network volume, through its S3 interface.")
Profile = Annotated[str, Parameter(help="A profile with `machine.rental`.")]
FOLLOW_S = 10.0
NAMED = {"report": "release", "shards": "shards"}
"""Results that can be named: links on the volume, and the step that each points to. S3 sees only the step's folder."""


@app.command
def setup(*, profile: Profile = "runpod") -> int:
    """Find or create the network volume, mark it as this project's, and upload this checkout. Prints what the volume costs."""
    from deployments.profile import chosen_profile
    from fvlm_core.data.sources.sizes import too_large
    from tasks.rented import account_of, budget_of, rental_of

    config = chosen_profile(profile)
    rental = rental_of(config)
    account = account_of(rental)
    gpus = config.machine.pools.gpu.job_variables.get("gpus", [])
    volume = find_or_create_volume(
        account.client,
        rental.volume,
        size_gb=rental.volume_gb,
        data_centers=rental.data_centers,
        gpus=[str(gpu) for gpu in gpus] if isinstance(gpus, list) else [],
        gpu_count=rental.gpu_count,
    )
    if said := too_large(config.precompute.sources, volume.size):
        _say(said)
    mark(account.store, volume)
    budget_of(rental, account.store).storage(volume.id, volume.usd_per_hour)
    name = upload_code(REPOSITORY, account.store)
    month = volume.usd_per_hour * HOURS_PER_MONTH
    _say(f"volume {volume.name} ({volume.id}), {volume.size} GB in {volume.dataCenter}: ${month:.2f} a month")
    _say(f"code {name}")
    return 0


@app.command(name="reap")
def reap_pods(
    *,
    profile: Profile = "runpod",
    every: Annotated[float | None, Parameter(validator=Number(gt=0), help="Seconds between two rounds; by default one round.")] = None,
) -> int:
    """End pods that are past their deadline, dead, or whose flow run is over. Needs only RUNPOD_API_KEY.

    If PREFECT_API_URL names a server that answers, pods whose run it does not know are ended too. Run this from cron, or with --every, on
    any machine: it is the last of three safeguards that end pods.
    """
    from deployments.profile import chosen_profile
    from tasks.rented import account_of, reap_and_reconcile, rental_of

    rental = rental_of(chosen_profile(profile))
    account = account_of(rental)
    while True:
        try:
            for one in reap_and_reconcile(account, _ledger(rental, account)):
                _say(f"pod {one.pod.id}: {one.reason}; {one.problem or 'ended'}")
        except (InfraError, OSError) as error:  # OSError: a mounted volume that is not available
            if every is None or isinstance(error, RefusedError | WrongKeyError):
                raise
            _say(f"retrying in {every:.0f} s: {error}")
        if every is None:
            return 0
        time.sleep(every)


@app.command
def up(
    *,
    profile: Profile = "runpod",
    days: Annotated[
        float | None, Parameter(validator=Number(gt=0), help="Most days that the pod runs; by default the profile's `server_days`.")
    ] = None,
) -> int:
    """Start the Prefect server and the workers on a small pod, and deploy this checkout there. Your own machine can then be switched off.

    If such a pod is already running, it is used, and this checkout is deployed again.
    """
    from deployments import remote
    from deployments.profile import chosen_profile

    return remote.up(chosen_profile(profile), Console(), days=days)


@app.command
def smoke(*, profile: Profile = "runpod", yes: Annotated[bool, Parameter(negative="", help="Do not ask.")] = False) -> int:
    """Test on two small pods, for a few cents, what RunPod's documentation leaves open. The volume must exist (`fvlm infra setup`)."""
    from deployments import remote
    from deployments.profile import chosen_profile

    return remote.smoke(chosen_profile(profile), _bucket(profile), Console(), yes=yes)


@app.command
def env(*, profile: Profile = "runpod") -> int:
    """Print the environment variables, password included, to reach the server that `up` started: eval "$(fvlm infra env)"."""
    from deployments import remote
    from deployments.profile import chosen_profile

    print(remote.exports(chosen_profile(profile)))
    return 0


@app.command
def down(*, profile: Profile = "runpod") -> int:
    """End every pod of the volume, whatever it is doing, and print what everything cost. The volume stays, and is still billed.

    Pods are ended even if the volume's files or its ledger cannot be reached. If the account has no such volume, no pod is ended, and the
    error names the pods that may belong to it. The exit status is 1 if a pod could not be ended.
    """
    from deployments import remote
    from deployments.profile import chosen_profile
    from tasks.rented import account_of, budget_table, owner_of, rental_of

    config = chosen_profile(profile)
    rental = rental_of(config)
    account = account_of(rental)
    mine = owner_of(account)
    ledger = _ledger(rental, account)
    try:
        remote.down(config, account, Console())
    except (InfraError, OSError) as error:
        _say(f"the server's database may be a minute old: {error}")
    reaped = reap(account.client, mine, budget=ledger, young_s=0.0, everything=True)
    for one in reaped:
        _say(f"pod {one.pod.id}: {one.problem or 'ended'}")
    if ledger is not None:
        try:
            reconcile(account.client, ledger)
        except (InfraError, OSError) as error:
            _say(f"cost is estimated by price and time, because RunPod's bill cannot be read: {error}")
        Console().print(budget_table(ledger.position(), ledger.clock()).terminal())
    month = account.volume().usd_per_hour * HOURS_PER_MONTH
    _say(f"The volume {account.volume().name} stays, for ${month:.2f} a month.")
    if left := [one for one in reaped if one.problem]:
        _say(f"{len(left)} pods could not be ended and are still billed: run this again, or end them at https://console.runpod.io/pods")
    return 1 if left else 0


@app.command
def budget(*, profile: Profile = "runpod") -> int:
    """Compare the ledger with RunPod's bill, then show money spent and reserved by phase, and planned and billed cost by step."""
    from deployments.profile import chosen_profile
    from tasks.rented import account_of, bill_table, budget_of, budget_table, rental_of

    rental = rental_of(chosen_profile(profile))
    account = account_of(rental)
    ledger = budget_of(rental, account.store)
    settle(ledger, {pod.name for pod in account.client.pods()}, ledger.clock())
    for line in reconcile(account.client, ledger):
        _say(line)
    position, now = ledger.position(), ledger.clock()
    Console().print(budget_table(position, now).terminal())
    if table := bill_table(account.store, position, now):
        table_console().print(table.terminal())
    return 0


@app.command
def code(*, profile: Profile = "runpod") -> int:
    """Upload this checkout to the volume; prints its name there."""
    from deployments.profile import chosen_profile
    from tasks.rented import account_of, rental_of

    _say(upload_code(REPOSITORY, account_of(rental_of(chosen_profile(profile))).store))
    return 0


def board(
    text: str | None = None,
    /,
    *,
    profile: Profile = "runpod",
    follow: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Read the volume's message board, post to it, or follow it.

    Parameters
    ----------
    text
        An entry to add.
    follow
        Keep showing new entries.
    """
    from deployments.profile import chosen_profile
    from tasks.rented import account_of, rental_of

    there = Board(account_of(rental_of(chosen_profile(profile))).store, "LOCAL")
    if text is not None:
        there.post(text)
    shown: set[Entry] = set()
    while True:
        try:
            # compared by entry, not by time: S3 may list a pod's entry minutes after later ones, and clocks differ
            new = [entry for entry in there.entries() if entry not in shown]
        except InfraError as error:
            if not shown:
                raise
            _say(f"retrying in {FOLLOW_S:.0f} s: {error}")
            new = []
        for entry in new:
            _say(entry.markdown())
        shown.update(new)
        if not follow:
            return 0
        time.sleep(FOLLOW_S)


@volume_app.command
def ls(prefix: str = "", /, *, profile: Profile = "runpod") -> int:
    """List files. RunPod's first listing of files written by pods can take minutes.

    Parameters
    ----------
    prefix
        Folder on the volume.
    """
    bucket = _bucket(profile)
    for key, size in bucket.entries(f"{prefix.rstrip('/')}/" if prefix else ""):
        _say(f"{size:>14,}  {key}")
    return 0


@volume_app.command
def get(what: str, to: Path = Path(), /, *, profile: Profile = "runpod") -> int:
    """Download a result: `report`, `shards`, a file, or a folder. Resumes after an interruption, and skips files that are complete.

    Parameters
    ----------
    what
        Name of a result, or path on the volume.
    to
        Folder to download to.
    """
    bucket = _bucket(profile)
    keys = [what] if bucket.size(what) is not None else bucket.keys(f"{_folder_of(what, bucket)}/")
    if not keys:
        raise UserError(f"there is no {what!r} on the volume", where=bucket.bucket, fix="see `fvlm volume ls`")
    with _progress() as show:
        for key in keys:
            task = show.add_task(key, total=None)

            def shown(done: int, total: int, task: TaskID = task) -> None:
                show.update(task, completed=done, total=total)

            bucket.download(key, local_path(to.resolve(), key), progress=shown)
    return 0


@volume_app.command
def put(file: Path, key: str, /, *, profile: Profile = "runpod") -> int:
    """Upload a file. Resumes after an interruption.

    Parameters
    ----------
    file
        A file on this machine.
    key
        Path on the volume.
    """
    if not file.is_file():
        raise UserError("there is no such file", where=str(file), fix="give another one")
    with _progress() as show:
        task = show.add_task(key, total=None)
        _bucket(profile).upload(file, key, progress=lambda done, total: show.update(task, completed=done, total=total))
    return 0


def _bucket(profile: str) -> S3Store:
    """The volume's S3 interface, even if the volume is mounted."""
    from deployments.profile import chosen_profile
    from tasks.rented import account_of, rental_of

    place = account_of(rental_of(chosen_profile(profile))).place
    store = Account(replace(place, folder=None)).store
    assert isinstance(store, S3Store)
    return store


def _folder_of(what: str, bucket: S3Store) -> str:
    """The folder of a named result. S3 has no links, so this finds the newest finished folder by its manifest."""
    if what not in NAMED:
        return what.rstrip("/")
    found = [key for key in bucket.keys(f"steps/{NAMED[what]}-") if key.endswith("/manifest.json")]
    if not found:
        raise UserError(f"no {what} is finished on the volume", where=bucket.bucket, fix="run the pipeline to its end")
    newest = max(found, key=lambda key: _written_at(bucket.read(key)))
    return newest.removesuffix("/manifest.json")


def _written_at(manifest: bytes | None) -> str:
    """When a manifest was written."""
    return str(json.loads(manifest or b"{}").get("created_at", ""))


def _progress() -> Progress:
    return Progress(TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), console=Console(stderr=True))


def _ledger(rental: "Rental", account: Account) -> Budget | None:
    """The ledger, or None (with a message) if it cannot be reached, so that pods can be ended anyway."""
    from tasks.rented import budget_of

    try:
        ledger = budget_of(rental, account.store)
        ledger.entries()
    except (InfraError, OSError) as error:
        _say(f"the ledger cannot be reached: {error}")
        return None
    return ledger


def _say(text: str) -> None:
    Console().print(text, highlight=False, markup=False, soft_wrap=True)
