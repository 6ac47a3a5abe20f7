"""Commands in the documentation are commands that there are: names, options and their values, as the program itself reads them."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
from cyclopts import CycloptsError, MissingArgumentError

from deployments.checks import load_profile
from deployments.cli import app
from deployments.register import FLOWS
from flows.reap import POOL
from infra.runpod.account import KEY_VARIABLE, S3_ACCESS_VARIABLE, S3_SECRET_VARIABLE

REPOSITORY = Path(__file__).parents[2]
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
COMMAND = re.compile(r"(?:`|^|[\s(])(fvlm [a-z][^`\n#|&)]*)", re.MULTILINE)
CHOICE = re.compile(r"(\w+)(?:\\?\|\w+)+")
"""`a|b|c`, in tables with backslashes: any of them."""
MODULE = re.compile(r"python -m ((?:benchmarks|tests|deployments|infra)[\w.]*)")


def check(command: str) -> None:
    """Raises what the program would say of it; a command that is only named needs no arguments."""
    try:
        app.parse_args(shlex.split(command)[1:], exit_on_error=False, print_error=False)
    except MissingArgumentError:
        if " --" in command:
            raise


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_of_a_page_is_one(page: Path) -> None:
    text = CHOICE.sub(r"\1", page.read_text())
    if page.stem == "log":  # what was run then
        return
    for command in COMMAND.findall(text):
        check(command)
    for module in MODULE.findall(text):
        assert importlib.util.find_spec(module.rstrip(".")), module


@pytest.mark.parametrize("command", ["fvlm infra nothing", "fvlm infra reap --each 300", "fvlm infra up --days many", "fvlm bord"])
def test_what_is_no_command_is_found(command: str) -> None:
    with pytest.raises(CycloptsError):
        check(command)


def test_ten_commands_lead_from_a_key_to_a_running_pipeline() -> None:
    _, _, rest = (REPOSITORY / "docs" / "runpod.md").read_text().partition("## From a key to a running pipeline\n")
    lines = [line.partition(" #")[0].strip() for line in rest.partition("```text\n")[2].partition("```")[0].splitlines()]
    assert len(lines) <= 10
    said = "\n".join(lines)
    for name in (KEY_VARIABLE, S3_ACCESS_VARIABLE, S3_SECRET_VARIABLE):
        assert f"{name}=" in said
    for line in lines:
        for command in COMMAND.findall(line):
            check(command)
    profile = load_profile("runpod")
    last = lines[-1].split()
    assert last[:3] == ["prefect", "deployment", "run"]
    flow, _, deployment = last[3].partition("/")
    assert flow in FLOWS
    assert deployment == profile.name
    assert (REPOSITORY / "setup.sh").is_file()
    pools = {pool.name for pool in profile.machine.pools.by_role.values()}
    assert {f"fvlm-runpod-{word}" for word in re.findall(r"`(\w+)`", re.search(r"fvlm-runpod-\$pool`? for (.*)\.", rest)[1])} == pools
    assert f"`{POOL}`" in rest
