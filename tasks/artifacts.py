"""What a phase shows in the Prefect UI: its table, its text, its pictures."""

import base64
from collections.abc import Iterable, Sequence
from pathlib import Path

from prefect.artifacts import create_image_artifact, create_markdown_artifact, create_table_artifact
from pydantic import JsonValue

PICTURE_BYTES = 400_000
"""Larger pictures are named by their path only: artifacts live in the server's database."""
DIGITS = 4


def publish(phase: str, profile: str, rows: Sequence[dict[str, JsonValue]], text: str, pictures: Iterable[Path]) -> None:
    """Publish the phase's artifacts: `PHASE-table`, `PHASE-summary` and a picture each."""
    pictures = list(pictures)
    if rows:
        create_table_artifact(
            [{name: rounded(value) for name, value in row.items()} for row in rows], key=f"{phase}-table", description=text
        )
    paths = "\n".join(f"* `{path}`" for path in pictures)
    create_markdown_artifact(
        "\n\n".join([f"## {phase} · {profile}", text, markdown_table(rows), f"### Pictures\n\n{paths}" if paths else ""]),
        key=f"{phase}-summary",
        description=f"What {phase} did with profile {profile}",
    )
    for path in pictures:
        if path.stat().st_size <= PICTURE_BYTES:
            create_image_artifact(
                data_url(path),
                key=_slug(path.stem) if path.stem.startswith(phase) else f"{phase}-{_slug(path.stem)}",
                description=str(path),
            )


def markdown_table(rows: Sequence[dict[str, JsonValue]]) -> str:
    """Rows with equal keys as a markdown table; numbers are rounded."""
    if not rows:
        return ""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, ["---"] * len(names), *([str(rounded(row.get(name, ""))) for name in names] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def rounded(value: JsonValue) -> JsonValue:
    """Floats with four significant digits, everything else as it is."""
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def data_url(picture: Path) -> str:
    """The PNG itself as an address: a browser shows it without a file server."""
    return f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"


def _slug(name: str) -> str:
    """Artifact keys are lower-case letters, digits and dashes."""
    return "".join(letter if letter.isalnum() else "-" for letter in name.lower()).strip("-")
