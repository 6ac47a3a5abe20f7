"""What commands and flows for rented machines share: the profile's rental, the account and volume that it names, and the budget as shown.

Nothing in this file knows Prefect.
"""

import io
import os
from pathlib import Path

from fvlm_core.errors import UserError
from fvlm_core.tables import Table
from infra import api
from infra.budget import Budget, Entry, Position
from infra.runpod.account import Account, Place
from infra.runpod.bills import reconcile
from infra.runpod.naming import owner
from infra.runpod.pod import IDENTITY
from infra.runpod.reaper import Reaped, reap
from infra.store import Store
from tasks.config import PipelineConfig
from tasks.rental import Rental

STORAGE, OTHER = "storage", "other"


def rental_of(config: PipelineConfig) -> Rental:
    """The profile's. Raises UserError where it has none."""
    if config.machine.rental is None:
        raise UserError(f"the profile {config.name} rents no machines", where="machine.rental", fix="use --profile runpod")
    return config.machine.rental


def account_of(rental: Rental) -> Account:
    """The account that RUNPOD_API_KEY opens; the volume as a folder where it is mounted here, else through S3."""
    mounted = (Path(rental.mount_path) / IDENTITY).is_file()
    return Account(
        Place(
            volume=rental.volume,
            runpod_url=rental.runpod_url,
            s3_url=rental.s3_url,
            folder=rental.mount_path if mounted else None,
        )
    )


def look_after(account: Account, budget: Budget | None) -> list[Reaped]:
    """End the pods that nobody owns, and bring the ledger up to date. Asks the Prefect server that PREFECT_API_URL names, if it answers."""
    url = os.environ.get("PREFECT_API_URL")
    over = (lambda run: api.run_over(url, os.environ, run)) if url else (lambda run: None)
    reaped = reap(account.client, owner(account.volume().id), over=over, budget=budget)
    if budget is not None:
        reconcile(account.client, budget)
    return reaped


def budget_of(rental: Rental, store: Store) -> Budget:
    """The ledger on the volume."""
    return Budget(store, cap_usd=rental.cap_usd, reserve_usd=rental.reserve_usd)


def by_phase(entries: tuple[Entry, ...]) -> dict[str, list[Entry]]:
    """The entries of the ledger by what they were for; those that never came to be are left out."""
    found: dict[str, list[Entry]] = {}
    for entry in entries:
        if not entry.released:
            found.setdefault(STORAGE if entry.kind == "storage" else entry.phase or OTHER, []).append(entry)
    return found


def budget_table(position: Position, now: float) -> Table:
    """A line per phase, and the sum."""
    horizon = max((one.until for one in position.entries if one.running), default=now)
    rows = []
    for name, mine in by_phase(position.entries).items():
        spent, more = sum(one.spent(now) for one in mine), sum(one.committed(now, horizon) for one in mine)
        rows.append([name, str(len(mine)), str(sum(one.running for one in mine)), f"${spent:.2f}", f"${more:.2f}"])
    left = f"${max(0.0, position.left):.2f} can still be promised."
    head = ["for", "pods", "running", "spent", "to their deadlines"]
    return Table(title="Budget", head=head, rows=rows, note=f"{position.sum()}. {left}")


def budget_plot(position: Position, now: float) -> bytes:
    """A PNG: spent and promised by phase, against the cap."""
    from matplotlib.figure import Figure

    phases = by_phase(position.entries)
    horizon = max((one.until for one in position.entries if one.running), default=now)
    spent = [sum(one.spent(now) for one in mine) for mine in phases.values()]
    more = [sum(one.committed(now, horizon) for one in mine) for mine in phases.values()]
    figure = Figure(figsize=(7, 0.4 * len(phases) + 1.2), layout="constrained")
    axes = figure.subplots()
    axes.barh(list(phases), spent, label="spent")
    axes.barh(list(phases), more, left=spent, label="to their deadlines", alpha=0.5)
    axes.set_xlabel(f"USD; cap ${position.cap_usd:.0f}, spent or promised ${position.committed:.2f}")
    axes.invert_yaxis()
    axes.legend()
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=100)
    return drawn.getvalue()
