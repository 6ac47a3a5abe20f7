"""Compares the ledger with RunPod's bill, and adopts the billed amounts."""

from collections import defaultdict
from dataclasses import replace
from datetime import UTC, datetime, timedelta

from infra.budget import BILL_LAG_S, Budget, usd_text
from infra.runpod.client import RunPod

CENT = 0.01


def reconcile(client: RunPod, budget: Budget) -> list[str]:
    """Write into the ledger what RunPod has billed for each pod and volume.

    Returns a line for each whose bill has become complete and differs from the ledger's estimate by a cent or more.
    """
    entries = [entry for entry in budget.entries() if not entry.released]
    if not entries:
        return []
    start = datetime.fromtimestamp(min(entry.since for entry in entries), UTC) - timedelta(hours=1)
    end = datetime.now(UTC) + timedelta(hours=1)
    billed: dict[str, float] = defaultdict(float)
    for record in (*client.billed_pods(start, end), *client.billed_volumes(start, end)):
        billed[record.podId or record.networkVolumeId or ""] += record.totalAmount
    differences = []
    for entry in entries:
        amount = billed.get(entry.pod or entry.name)
        if amount is None:
            continue
        now = budget.clock()
        completes = not entry.settled and entry.ended is not None and now >= entry.ended + BILL_LAG_S
        estimate = replace(entry, billed=None).spent(now)
        if completes and abs(amount - estimate) >= CENT:
            differences.append(f"{entry.name}: {usd_text(estimate)} by price and time, {usd_text(amount)} by RunPod's bill")
        if completes or entry.billed is None or abs(amount - entry.billed) > CENT / 100:
            budget.billed(entry.name, amount)
    return differences
