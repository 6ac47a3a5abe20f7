"""Shared by commands and flows for rented machines: the profile's rental settings, its account and volume, and the display of the budget.

This module does not depend on Prefect.
"""

import io
import logging
import os
from pathlib import Path

from pydantic import TypeAdapter

from fvlm_core.errors import UserError
from fvlm_core.tables import Table
from infra import api
from infra.budget import Budget, Entry, Position, usd_text, warnings_between
from infra.errors import InfraError, RefusedError
from infra.mirror import mirror
from infra.runpod.account import KEY_VARIABLE, S3_ACCESS_VARIABLE, S3_SECRET_VARIABLE, Account, Place, mounted
from infra.runpod.bills import reconcile
from infra.runpod.client import RunPod
from infra.runpod.naming import PodName, owner
from infra.runpod.reaper import Reaped, reap
from infra.runpod.rent import PodRequirements, candidates
from infra.s3 import S3Store
from infra.store import Store
from tasks.bill import bill_against_plan, billed_by_step, recorded_plan
from tasks.config import PipelineConfig
from tasks.machine import Pool
from tasks.rental import Rental

log = logging.getLogger(__name__)
STORAGE, OTHER = "storage", "other"
MACHINE = ("gpus", "gpu_count", "cpus", "vcpus", "max_usd_per_hour", "min_cuda")
"""Job variables that say which machine a pool wants."""
LOOKED_AT = ("phases/", "steps/", "sources/")
"""Folders of the volume that show what is done."""


def rental_of(config: PipelineConfig) -> Rental:
    """Return the profile's rental settings. Raises UserError if it has none."""
    if config.machine.rental is None:
        raise UserError(f"the profile {config.name} rents no machines", where="machine.rental", fix="use --profile runpod")
    return config.machine.rental


def account_of(rental: Rental) -> Account:
    """Return the account of RUNPOD_API_KEY. Its volume is used as a folder if it is mounted here, otherwise through S3."""
    return Account(
        Place(
            volume=rental.volume,
            runpod_url=rental.runpod_url,
            s3_url=rental.s3_url,
            folder=mounted(rental.mount_path, rental.volume),
        )
    )


def local_view(rental: Rental) -> Path | None:
    """Return the volume's folder if it is mounted here, otherwise a mirror of its manifests; None if there are no keys or no volume yet."""
    keys = (KEY_VARIABLE, S3_ACCESS_VARIABLE, S3_SECRET_VARIABLE)
    if mounted(rental.mount_path, rental.volume):
        return Path(rental.mount_path)
    if not all(os.environ.get(name) for name in keys):
        return None
    account = account_of(rental)
    if not any(rental.volume in (one.id, one.name) for one in account.client.volumes()):
        return None
    store = account.store
    assert isinstance(store, S3Store)
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = caches / "fvlm" / account.volume().id
    folder.mkdir(parents=True, exist_ok=True)
    mirror(store, folder, LOOKED_AT)
    return folder


def at_live_prices(config: PipelineConfig) -> Rental:
    """Return the profile's rental settings with current prices: for each pool, of its first machine in stock where the volume may be.

    Raises RefusedError if all machines of a pool are above its price limit, WrongKeyError without RUNPOD_API_KEY.
    """
    rental, pools = rental_of(config), config.machine.pools.by_role
    with RunPod(os.environ.get(KEY_VARIABLE, ""), rental.runpod_url) as client:

        def usd_per_hour(pool: Pool) -> float:
            given = {name: pool.job_variables[name] for name in MACHINE if name in pool.job_variables}
            requirements = TypeAdapter(PodRequirements).validate_python({"image": "", "data_centers": rental.data_centers} | given)
            return candidates(client, requirements, None)[0].usd_per_hour

        prices = {
            "gpu_usd_per_hour": usd_per_hour(pools["gpu"]),
            "cpu_usd_per_hour": usd_per_hour(pools["cpu"]),
            "pipeline_usd_per_hour": usd_per_hour(pools["pipeline"]),
        }
    return rental.model_copy(update=prices)


def owner_of(account: Account) -> str:
    """Return the prefix of the names of the volume's pods.

    Raises RefusedError if the volume is not found. The error lists all pods that may belong to it, because they are known only by its id.
    """
    try:
        return owner(account.volume().id)
    except RefusedError as error:
        left = [pod for pod in account.client.pods() if PodName.parse(pod.name)]
        if not left:
            raise
        raise RefusedError(
            f"{error.what}; nothing was ended, and pods cost on: {', '.join(f'{pod.id} ({pod.name})' for pod in left)}",
            where=error.where,
            fix=f"end those that nobody needs at https://console.runpod.io/pods; {error.fix}",
        ) from error


def reap_and_reconcile(account: Account, budget: Budget | None) -> list[Reaped]:
    """End orphaned pods, and update the ledger. Asks the Prefect server at PREFECT_API_URL about their flow runs, if it answers.

    The ended pods are returned even if the ledger or the bill cannot be read.
    """
    url = os.environ.get("PREFECT_API_URL")
    over = (lambda run: api.run_over(url, os.environ, run)) if url else (lambda run: None)
    reaped = reap(account.client, owner_of(account), over=over, budget=budget)
    if budget is not None:
        try:
            reconcile(account.client, budget)
        except (InfraError, OSError) as error:
            log.warning("the ledger was not compared with the bill: %s", error)
    return reaped


def budget_of(rental: Rental, store: Store) -> Budget:
    """Return the ledger on the volume, with the cap of the rental settings."""
    return Budget(store, cap_usd=rental.cap_usd, reserve_usd=rental.reserve_usd)


def by_phase(entries: tuple[Entry, ...]) -> dict[str, list[Entry]]:
    """Group the entries of the ledger by phase, without those of pods that were never created."""
    found: dict[str, list[Entry]] = {}
    for entry in entries:
        if not entry.released:
            found.setdefault(STORAGE if entry.kind == "storage" else entry.phase or OTHER, []).append(entry)
    return found


def budget_table(position: Position, now: float) -> Table:
    """Return a row per phase, with the total and the highest warning about the cap in the note."""
    horizon = max((one.until for one in position.entries if one.running), default=now)
    rows = []
    for name, mine in by_phase(position.entries).items():
        spent, more = sum(one.spent(now) for one in mine), sum(one.committed(now, horizon) for one in mine)
        rows.append([name, str(len(mine)), str(sum(one.running for one in mine)), usd_text(spent), usd_text(more)])
    left = f"{usd_text(max(0.0, position.left))} can still be reserved."
    warned = [f"{line}." for line in warnings_between(0.0, position.committed, position.cap_usd)[-1:]]
    head = ["for", "pods", "running", "spent", "to their deadlines"]
    return Table(title="Budget", head=head, rows=rows, note=" ".join([f"{position.sum()}.", left, *warned]))


def bill_table(store: Store, position: Position, now: float) -> Table | None:
    """Return plan and bill side by side, step by step; None if no run was planned on this volume."""
    planned = recorded_plan(store)
    return bill_against_plan(planned, billed_by_step(store, by_phase(position.entries), now)) if planned else None


def budget_plot(position: Position, now: float) -> bytes:
    """Return a PNG with the cost by phase: spent so far, and committed up to the deadlines."""
    from matplotlib.figure import Figure

    phases = by_phase(position.entries)
    horizon = max((one.until for one in position.entries if one.running), default=now)
    spent = [sum(one.spent(now) for one in mine) for mine in phases.values()]
    more = [sum(one.committed(now, horizon) for one in mine) for mine in phases.values()]
    figure = Figure(figsize=(7, 0.4 * len(phases) + 1.2), layout="constrained")
    axes = figure.subplots()
    axes.barh(list(phases), spent, label="spent")
    axes.barh(list(phases), more, left=spent, label="to their deadlines", alpha=0.5)
    axes.set_xlabel(f"USD; cap ${position.cap_usd:.0f}, spent or reserved {usd_text(position.committed)}")
    axes.invert_yaxis()
    axes.legend()
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=100)
    return drawn.getvalue()
