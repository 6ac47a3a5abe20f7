"""`fvlm infra`, `fvlm volume` and `fvlm board`: rented machines, what is on their volume, and the board on it."""

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

app = App(name="infra", help="Rented machines: set up, what they cost, end what nobody owns. Keys come from the environment.")
volume_app = App(name="volume", help="Files on the network volume, through its S3 side.")
Profile = Annotated[str, Parameter(help="A profile with `machine.rental`.")]
FOLLOW_S = 10.0
NAMED = {"report": "release", "shards": "shards"}
"""Names of results: links on the volume, of which S3 sees the target's folder only."""


@app.command
def setup(*, profile: Profile = "runpod") -> int:
    """Find or make the network volume, mark it, and put this checkout on it. Says what the volume costs."""
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
    every: Annotated[
        float | None, Parameter(validator=Number(gt=0), help="Seconds between two rounds; by default there is one round.")
    ] = None,
) -> int:
    """End pods that are past their deadline, dead, or whose flow run is over. Needs RUNPOD_API_KEY only.

    Where PREFECT_API_URL names a server that answers, pods whose run it does not know are ended too. Run it from cron, or with --every, on
    any machine: it is the last of the three that end pods.
    """
    from deployments.profile import chosen_profile
    from tasks.rented import account_of, look_after, rental_of

    rental = rental_of(chosen_profile(profile))
    account = account_of(rental)
    while True:
        try:
            for one in look_after(account, _ledger(rental, account)):
                _say(f"pod {one.pod.id}: {one.reason}; {one.problem or 'ended'}")
        except (InfraError, OSError) as error:  # a mounted volume that is away
            if every is None or isinstance(error, RefusedError | WrongKeyError):
                raise
            _say(f"tried again in {every:.0f} s: {error}")
        if every is None:
            return 0
        time.sleep(every)


@app.command
def up(
    *,
    profile: Profile = "runpod",
    days: Annotated[
        float | None, Parameter(validator=Number(gt=0), help="How long the pod runs at most; by default the profile's `server_days`.")
    ] = None,
) -> int:
    """Start the Prefect server and the workers on a small pod, and deploy this checkout there: your own machine may be switched off then.

    Where such a pod runs already, it is used, and this checkout is deployed again.
    """
    from deployments import remote
    from deployments.profile import chosen_profile

    return remote.up(chosen_profile(profile), Console(), days=days)


@app.command
def smoke(*, profile: Profile = "runpod", yes: Annotated[bool, Parameter(negative="", help="Do not ask.")] = False) -> int:
    """Find out on two small pods, for a few cents, what RunPod's documents leave open. The volume must be there (`fvlm infra setup`)."""
    from deployments import remote
    from deployments.profile import chosen_profile

    return remote.smoke(chosen_profile(profile), _bucket(profile), Console(), yes=yes)


@app.command
def env(*, profile: Profile = "runpod") -> int:
    """Print what a shell needs to reach the server that `up` started, with its password: eval "$(fvlm infra env)"."""
    from deployments import remote
    from deployments.profile import chosen_profile

    print(remote.exports(chosen_profile(profile)))
    return 0


@app.command
def down(*, profile: Profile = "runpod") -> int:
    """End every pod of the volume, whatever it does, and say what everything cost. The volume stays, and goes on costing.

    Pods are ended also where the volume's files or its ledger cannot be reached. Where the account has no such volume, none is, and the
    error names those that may be its own. Ends with status 1 where a pod could not be ended.
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
            _say(f"by price and time, because RunPod's bill cannot be read: {error}")
        Console().print(budget_table(ledger.position(), ledger.clock()).terminal())
    month = account.volume().usd_per_hour * HOURS_PER_MONTH
    _say(f"The volume {account.volume().name} stays, for ${month:.2f} a month.")
    if left := [one for one in reaped if one.problem]:
        _say(f"{len(left)} pods could not be ended and cost on: run this again, or end them at https://console.runpod.io/pods")
    return 1 if left else 0


@app.command
def budget(*, profile: Profile = "runpod") -> int:
    """Compare with RunPod's bill, then show what was spent and what is promised by phase, and plan against bill by step."""
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
    """Put this checkout on the volume; prints its name."""
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
    """Read the board of the volume, post to it, or follow it.

    Parameters
    ----------
    text
        An entry to add.
    follow
        Go on showing what is written.
    """
    from deployments.profile import chosen_profile
    from tasks.rented import account_of, rental_of

    there = Board(account_of(rental_of(chosen_profile(profile))).store, "LOCAL")
    if text is not None:
        there.post(text)
    shown: set[Entry] = set()
    while True:
        try:
            # by entry and not by time: S3 may list a pod's entry minutes after later ones, and clocks differ
            new = [entry for entry in there.entries() if entry not in shown]
        except InfraError as error:
            if not shown:
                raise
            _say(f"tried again in {FOLLOW_S:.0f} s: {error}")
            new = []
        for entry in new:
            _say(entry.markdown())
        shown.update(new)
        if not follow:
            return 0
        time.sleep(FOLLOW_S)


@volume_app.command
def ls(prefix: str = "", /, *, profile: Profile = "runpod") -> int:
    """List files. RunPod's first listing of files that pods wrote can take minutes.

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
    """Bring a result home: `report`, `shards`, a file, or a folder. Goes on after an interruption; what is here is not fetched again.

    Parameters
    ----------
    what
        Name or path on the volume.
    to
        Folder for it.
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
    """Send a file. Goes on after an interruption.

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
    """The volume's S3 side, also where it is mounted."""
    from deployments.profile import chosen_profile
    from tasks.rented import account_of, rental_of

    place = account_of(rental_of(chosen_profile(profile))).place
    store = Account(replace(place, folder=None)).store
    assert isinstance(store, S3Store)
    return store


def _folder_of(what: str, bucket: S3Store) -> str:
    """The folder of a result by its name: S3 knows no links, so the newest finished one is looked for by its manifest."""
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
    """The ledger; None, which is said, where it cannot be reached: pods are ended all the same."""
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
