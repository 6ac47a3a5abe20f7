"""The user's own Prefect settings against the stack's defaults."""

from pathlib import Path

import pytest

from infra.prefect_settings import of_own_server, of_users_server

OWN = {"origins": "http://127.0.0.1:4200", "password": "fvlm:ours", "database": Path("/state/prefect.db")}
POSTGRES = "postgresql+asyncpg://me:secret@db/prefect"


def test_what_the_user_has_set_stands() -> None:
    given = {
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": POSTGRES,
        "PREFECT_SERVER_API_AUTH_STRING": "me:mine",
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": "https://mine",
        "PREFECT_WORKER_QUERY_SECONDS": "7",
        "PREFECT_SERVER_SERVICES_LATE_RUNS_ENABLED": "false",
    }
    settings = of_own_server(given, **OWN)
    assert given.items() <= settings.items()
    assert settings["PREFECT_API_AUTH_STRING"] == "me:mine", "our own commands and workers know it"


@pytest.mark.parametrize(
    ("name", "value", "ours"),
    [
        ("PREFECT_API_DATABASE_CONNECTION_URL", POSTGRES, "PREFECT_SERVER_DATABASE_CONNECTION_URL"),
        ("PREFECT_SERVER_DATABASE_HOST", "db", "PREFECT_SERVER_DATABASE_CONNECTION_URL"),
        ("PREFECT_LOGGING_SERVER_LEVEL", "DEBUG", "PREFECT_SERVER_LOGGING_LEVEL"),
        ("PREFECT_SERVER_API_CORS_ALLOWED_ORIGINS", "https://mine", "PREFECT_SERVER_CORS_ALLOWED_ORIGINS"),
    ],
)
def test_also_under_the_setting_s_other_names(name: str, value: str, ours: str) -> None:
    settings = of_own_server({name: value}, **OWN)
    assert settings[name] == value
    assert ours not in settings, "Prefect would let it win"


def test_without_settings_of_the_user_s_the_server_is_closed_and_its_database_where_it_can_be() -> None:
    settings = of_own_server({"PREFECT_API_KEY": "of the cloud", "PREFECT__FLOW_RUN_ID": "a parent's", "PREFECT_PROFILE": "mine"}, **OWN)
    assert settings["PREFECT_SERVER_CORS_ALLOWED_ORIGINS"] == OWN["origins"]
    assert settings["PREFECT_SERVER_API_AUTH_STRING"] == settings["PREFECT_API_AUTH_STRING"] == "fvlm:ours"
    assert settings["PREFECT_SERVER_DATABASE_CONNECTION_URL"] == "sqlite+aiosqlite:////state/prefect.db"
    assert not {"PREFECT_API_KEY", "PREFECT__FLOW_RUN_ID", "PREFECT_PROFILE"} & settings.keys()


def test_a_server_of_the_user_s_gets_the_user_s_key_and_is_never_replaced_by_a_temporary_one() -> None:
    settings = of_users_server({"PREFECT_API_KEY": "key", "PREFECT_SERVER_EPHEMERAL_ENABLED": "true"})
    assert settings["PREFECT_API_KEY"] == "key"
    assert settings["PREFECT_SERVER_EPHEMERAL_ENABLED"] == "false"
    assert "PREFECT_SERVER_API_AUTH_STRING" not in settings
