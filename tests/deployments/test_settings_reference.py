"""The table of settings says what the types say, and `docs/settings.md` is that table."""

from typing import Annotated, Literal

import pytest
from pydantic import Field

from deployments import settings_reference
from deployments.settings_reference import PARTS, Key, keys, reference
from fvlm_core.settings import Settings
from infra.stack import REPOSITORY


class Place(Settings):
    """A place."""

    row: Annotated[int, Field(ge=1)] = 1
    """Counted
    from the top."""


class Other(Settings):
    """Another thing."""

    kind: Literal["a", "b"] = "a"


class Everything(Settings):
    """One of each kind of value."""

    name: str
    first: Place = Place()
    second: Place
    """The second place."""
    places: Annotated[list[Place], Field(min_length=1)]
    named: dict[str, Other] = Field(default_factory=dict)
    either: Place | Other | None = None
    several: list[float] = Field(default_factory=lambda: [1.0])


def test_every_kind_of_value_has_its_rows() -> None:
    assert keys(Everything) == [
        Key("name", "string", "required", ""),
        Key("first", "group", "", "A place."),
        Key("first.row", "integer ≥ 1", "`1`", "Counted\nfrom the top."),
        Key("second", "group", "required", "The second place. As `first`."),
        Key("places", "list of at least 1: group", "required", "A place. As `first`."),
        Key("named", "group by name", "", "Another thing."),
        Key("named.NAME.kind", '"a" or "b"', '`"a"`', ""),
        Key("either", "group or null", "`null`", "A place. Another thing. As `first`. As `named.NAME`."),
        Key("several", "list: number", "", ""),
    ]


def test_every_key_is_documented() -> None:
    assert [key.path for _, _, settings in PARTS for key in keys(settings) if not key.text.strip()] == []


def test_the_page_is_the_same_wherever_the_checkout_is() -> None:
    assert str(REPOSITORY) not in reference()


def test_cells_hold_no_line_ends_and_no_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    class Barred(Settings):
        mode: Annotated[str, Field(pattern="^(a|b)$", description="a or\nb")]

    monkeypatch.setattr(settings_reference, "PARTS", (("One", "Text.", Barred),))
    assert "| `mode` | string matches ^(a\\|b)$ | required | a or b |\n" in reference()


def test_the_page_is_what_the_types_say(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Where this fails: `python -m deployments.settings_reference`."""
    monkeypatch.setattr("sys.argv", ["settings_reference", "--check"])
    assert settings_reference.main() == 0, capsys.readouterr().err


def test_a_page_that_is_out_of_date_is_refused_and_made_anew(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "settings.md"
    page.write_text(reference().replace("stages.stage1", "stages.first"))
    monkeypatch.setattr(settings_reference, "REFERENCE", page)
    monkeypatch.setattr("sys.argv", ["settings_reference", "--check"])
    assert settings_reference.main() == 1
    monkeypatch.setattr("sys.argv", ["settings_reference"])
    assert settings_reference.main() == 0
    assert page.read_text() == reference()
