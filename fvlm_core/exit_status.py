"""How a job ends: its exit status, and a file in its output folder that tells the launcher the reason.

torchrun exits with 1 whatever the exit status of its ranks, so only the file is reliable there. `infra/exit_status.py` is a copy, because
neither package imports the other; a test checks that they are equal.
"""

USER_ERROR = 2
"""The job refused its input or its environment, e.g. a full disk. Retrying without a change is useless."""
STOPPED = 75
"""The job was stopped by SIGTERM and saved its progress; a new start resumes from there (EX_TEMPFAIL)."""

ERROR_FILE = "error.json"
"""Fields kind, what, where, fix, attempt; absent if the job succeeded or failed with a traceback."""
USER_ERROR_KIND, STOPPED_KIND = "user_error", "stopped"
ATTEMPT_VARIABLE = "FVLM_ATTEMPT"
"""Environment variable with the launcher's name for one start of a job. It is copied into `error.json`, so that the launcher can tell an
error of this start from one of an earlier start."""
