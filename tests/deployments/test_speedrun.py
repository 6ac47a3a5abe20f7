"""What the command prints about a run that failed."""

from pathlib import Path

import pytest
from rich.console import Console

from deployments.speedrun import advice, speedrun
from fvlm_core.errors import UserError
from infra.stack import GO_ON

URL = "http://127.0.0.1:4200"


def test_bad_input_is_not_worth_the_same_command_again() -> None:
    refused = str(UserError("a video is missing", where="clips.csv", fix="correct the path"))
    assert advice(f"precompute ended Failed: UserError: {refused}", stopped=None)[-1] == "  fix:   correct the path"
    assert advice("train ended Failed: the job was killed", stopped=None)[-1] == GO_ON


def test_no_link_to_a_server_that_was_stopped() -> None:
    message = f"train ended Failed: the job was killed\nIts run: {URL}/runs/flow-run/1"
    assert not any(URL in line for line in advice(message, stopped=URL))
    assert any(URL in line for line in advice(message, stopped=None))


def test_a_rehearsals_pods_cannot_be_kept(tmp_path: Path) -> None:
    options = {"volume": tmp_path, "port": None, "console": Console()}
    with pytest.raises(UserError, match="end with the command"):
        speedrun("ci", None, keep_server=True, emulated=True, **options)
    assert not [*tmp_path.iterdir()]
