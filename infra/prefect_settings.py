"""Environment variables with Prefect's settings, for the processes of a local stack.

The user's own settings are kept, except for those that define a stack: which server is used, and where its files are.
"""

import os
from collections.abc import Mapping
from pathlib import Path

DEFAULTS = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    "PREFECT_LOGGING_LEVEL": "INFO",
    # a phase starts within this time; each poll costs the server 30 ms of CPU time, and two workers poll
    "PREFECT_WORKER_QUERY_SECONDS": "2",
    "PREFECT_WORKER_PREFETCH_SECONDS": "1",
    "PREFECT_CLIENT_MAX_RETRIES": "10",
    # the shortest interval that Prefect accepts: a run whose process has vanished is detected after a few of them
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
}
OTHER_NAMES = {
    "PREFECT_SERVER_LOGGING_LEVEL": ("PREFECT_LOGGING_SERVER_LEVEL",),
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": ("PREFECT_RUNNER_HEARTBEAT_FREQUENCY",),
    "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": ("PREFECT_SERVER_API_CORS_ALLOWED_ORIGINS",),
    "PREFECT_SERVER_DATABASE_CONNECTION_URL": (
        "PREFECT_API_DATABASE_CONNECTION_URL",
        *(f"PREFECT_{part}_DATABASE_{name}" for part in ("SERVER", "API") for name in ("DRIVER", "HOST", "NAME")),
    ),
}
"""Other names under which the user may have set the same setting; Prefect would prefer our default to them."""
OF_ANOTHER_SERVER = ("PREFECT_API_KEY", "PREFECT_API_AUTH_STRING", "PREFECT_PROFILE", "PREFECT_PROFILES_PATH")
INTERNAL = "PREFECT__"
"""Prefix of variables that Prefect sets for its own subprocesses; none of them may reach a new stack."""
SERVER_PASSWORD, CLIENT_PASSWORD = PASSWORDS = "PREFECT_SERVER_API_AUTH_STRING", "PREFECT_API_AUTH_STRING"


def without(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that are not Prefect's."""
    return {name: value for name, value in environment.items() if not name.startswith("PREFECT_")}


def apply(settings: Mapping[str, str]) -> None:
    """Make these, and no others, the settings of Prefect in this process."""
    for name in os.environ.keys() - without(os.environ).keys():
        del os.environ[name]
    os.environ.update(settings)
    from prefect.context import refresh_global_settings_context

    refresh_global_settings_context()  # Prefect reads the environment when it is imported


def of_own_server(given: Mapping[str, str], *, origins: str, password: str, database: Path | None) -> dict[str, str]:
    """Return the settings for a server that the stack starts, and for its clients.

    `origins` are the origins of the UI, comma-separated; requests from other web pages are refused. `database` is a SQLite file, or None
    for Prefect's default location.
    """
    defaults = DEFAULTS | {"PREFECT_SERVER_CORS_ALLOWED_ORIGINS": origins, SERVER_PASSWORD: password}
    if database is not None:
        defaults["PREFECT_SERVER_DATABASE_CONNECTION_URL"] = f"sqlite+aiosqlite:///{database}"
    settings = _with_defaults(given, defaults)
    kept = {name: value for name, value in settings.items() if name not in OF_ANOTHER_SERVER}
    return kept | {CLIENT_PASSWORD: kept[SERVER_PASSWORD], "PREFECT_SERVER_EPHEMERAL_ENABLED": "false"}


def of_users_server(given: Mapping[str, str]) -> dict[str, str]:
    """Return the settings for a server that the user runs. Prefect never starts a temporary server in its place."""
    return _with_defaults(given, DEFAULTS) | {"PREFECT_SERVER_EPHEMERAL_ENABLED": "false"}


def _with_defaults(given: Mapping[str, str], defaults: Mapping[str, str]) -> dict[str, str]:
    users = {name: value for name, value in given.items() if name.startswith("PREFECT_") and not name.startswith(INTERNAL)}
    return {name: value for name, value in defaults.items() if not any(other in users for other in OTHER_NAMES.get(name, ()))} | users
