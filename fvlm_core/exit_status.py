"""How a job ends: its exit status, and the file in its output folder that says more to whoever started it.

torchrun ends with 1 whatever its ranks ended with, so that the file is what counts there. `infra/exit_status.py` is a copy, because
neither package imports the other; a test checks that they are equal.
"""

USER_ERROR = 2
"""The job refused its input, or its surroundings: a disk that is full. Running it again as it is is of no use."""
STOPPED = 75
"""The job stopped on a SIGTERM and has saved what it did: started again, it goes on from there (EX_TEMPFAIL)."""

ERROR_FILE = "error.json"
"""Fields kind, what, where, fix, attempt; absent where a job succeeded, or failed with a traceback."""
USER_ERROR_KIND, STOPPED_KIND = "user_error", "stopped"
ATTEMPT_VARIABLE = "FVLM_ATTEMPT"
"""A launcher's name for one start of a job; its `error.json` repeats it, so that another start's is not taken for it."""
