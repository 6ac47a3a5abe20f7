"""Exit statuses of jobs: a copy of `fvlm_core/exit_status.py`, which documents them. A test checks that both are equal."""

USER_ERROR = 2
STOPPED = 75

ERROR_FILE = "error.json"
USER_ERROR_KIND, STOPPED_KIND = "user_error", "stopped"
ATTEMPT_VARIABLE = "FVLM_ATTEMPT"
