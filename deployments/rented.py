"""What the commands for rented machines share: the profile's rental, and the account and volume that it names."""

import os
from pathlib import Path

from fvlm_core.errors import UserError
from fvlm_core.tables import Table
from infra.budget import Budget, Position
from infra.runpod.account import Account, Place
from infra.runpod.pod import IDENTITY
from infra.store import Store
from tasks.config import PipelineConfig
from tasks.rental import Rental


def rental_of(config: PipelineConfig) -> Rental:
    """The profile's. Raises UserError where it has none."""
    if config.machine.rental is None:
        raise UserError(
            f"the profile {config.name} rents no machines",
            where="machine.rental",
            fix="use --profile runpod",
        )
    return config.machine.rental


def account_of(rental: Rental) -> Account:
    """The account that RUNPOD_API_KEY opens; the volume as a folder where it is mounted here, else through S3."""
    mounted = (Path(rental.mount_path) / IDENTITY).is_file()
    return Account(
        Place(
            volume=rental.volume,
            runpod_url=os.environ.get("FVLM_RUNPOD_URL", rental.runpod_url),
            s3_url=os.environ.get("FVLM_S3_URL", rental.s3_url or "") or None,
            folder=rental.mount_path if mounted else None,
        )
    )


def budget_of(rental: Rental, store: Store) -> Budget:
    """The ledger on the volume."""
    return Budget(store, cap_usd=rental.cap_usd, reserve_usd=rental.reserve_usd)


def budget_table(position: Position, now: float) -> Table:
    """A line per phase, and the sum."""
    rows: dict[str, list[float]] = {}
    for entry in position.entries:
        if entry.released:
            continue
        name = "storage" if entry.kind == "storage" else entry.phase or "other"
        line = rows.setdefault(name, [0, 0, 0.0, 0.0])
        line[0] += 1
        line[1] += entry.running
        line[2] += entry.spent(now)
        line[3] += entry.committed(now, max((one.until for one in position.entries if one.running), default=now))
    head = ["for", "pods", "running", "spent", "to their deadlines"]
    shown = [[name, f"{line[0]:.0f}", f"{line[1]:.0f}", f"${line[2]:.2f}", f"${line[3]:.2f}"] for name, line in rows.items()]
    left = f"${max(0.0, position.left):.2f} can still be promised."
    return Table(title="Budget", head=head, rows=shown, note=f"{position.sum()}. {left}")
