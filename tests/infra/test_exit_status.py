"""Two packages that import neither each other agree on how a job ends."""

from fvlm_core import exit_status as job
from infra import exit_status as launcher


def constants(module: object) -> dict[str, object]:
    return {name: value for name, value in vars(module).items() if name.isupper()}


def test_equal() -> None:
    assert constants(job) == constants(launcher)
    assert {"USER_ERROR", "STOPPED", "ERROR_FILE", "ATTEMPT_VARIABLE"} <= constants(job).keys()
