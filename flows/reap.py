"""Manage rented machines on a schedule: end pods without an owner, compare the ledger with RunPod's bill, and show the budget.

The flow runs as a local process of a worker, never on a pod of its own. `fvlm infra reap` does the same without Prefect.
"""

import base64

from prefect import flow, get_run_logger
from prefect.artifacts import create_image_artifact, create_table_artifact

from tasks.artifacts import publish_bill
from tasks.config import PipelineConfig
from tasks.rented import account_of, bill_table, budget_of, budget_plot, budget_table, reap_and_reconcile, rental_of

EVERY_S = 300
POOL = "fvlm-home"
"""Work pool of local processes for this flow."""


@flow(
    name="reap",
    description="End pods without an owner, compare the ledger with RunPod's bill, and show the budget.",
    flow_run_name="{config.name} · reap",
)
def reap(*, config: PipelineConfig) -> None:
    """End pods without an owner, compare the ledger with RunPod's bill, and show the budget.

    Args:
        config: The profile, whose `machine.rental` names the account and the volume.
    """
    rental, log = rental_of(config), get_run_logger()
    account = account_of(rental)
    budget = budget_of(rental, account.store)
    for one in reap_and_reconcile(account, budget):
        log.warning("pod %s: %s; %s", one.pod.id, one.reason, one.problem or "ended")
    position, now = budget.position(), budget.clock()
    table = budget_table(position, now)
    create_table_artifact(table.records(), key="budget-table", description=table.note)
    picture = base64.b64encode(budget_plot(position, now)).decode()
    create_image_artifact(f"data:image/png;base64,{picture}", key="budget-plot", description="Spent and reserved, by phase")
    publish_bill(bill_table(account.store, position, now))
    log.info(table.note)
