"""Publishes the results of a phase in the Prefect UI: its table, text and pictures."""

import base64
from pathlib import Path

from prefect.artifacts import create_image_artifact, create_markdown_artifact, create_table_artifact

from fvlm_core.tables import Table
from tasks.phase import Shown

PICTURE_BYTES = 400_000
"""Larger pictures are only listed by path, because artifacts are stored in the server's database."""


def publish(phase: str, profile: str, shown: Shown, volume: Path) -> None:
    """Publish the phase's artifacts: `PHASE-table`, `PHASE-summary`, and one per picture."""
    parts = [f"## {phase} · {profile}", shown.text]
    if shown.table:
        create_table_artifact(shown.table.records(), key=f"{phase}-table", description=shown.text)
        parts.append(shown.table.markdown())
    listed = {name: volume / path for name, path in shown.outputs.items()}
    listed |= {figure.caption: volume / figure.file for figure in shown.figures}
    parts.append("\n".join(f"* {name}: `{path}`" for name, path in listed.items()))
    create_markdown_artifact(
        "\n\n".join(part for part in parts if part), key=f"{phase}-summary", description=f"What {phase} did with profile {profile}"
    )
    for figure in shown.figures:
        path = volume / figure.file
        if path.stat().st_size <= PICTURE_BYTES:
            stem = _slug(path.stem)
            key = stem if stem.startswith(phase) else f"{phase}-{stem}"
            create_image_artifact(data_url(path), key=key, description=figure.caption)


def publish_bill(table: Table | None) -> None:
    """Publish the comparison of plan and bill, if there was a plan."""
    if table:
        create_table_artifact(table.records(), key="plan-against-bill", description="Plan against bill, step by step")


def data_url(picture: Path) -> str:
    """Return a PNG as a data URL, which a browser shows without a file server."""
    return f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"


def _slug(name: str) -> str:
    """Artifact keys are lower-case letters, digits and dashes."""
    return "".join(letter if letter.isalnum() else "-" for letter in name.lower()).strip("-")
