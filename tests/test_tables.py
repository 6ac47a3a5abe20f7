"""A table's renderings say the same."""

from rich.console import Console

from fvlm_core.tables import Table


def table() -> Table:
    return Table.of(
        [{"mode": "coarse_only", "loss": 1.23456, "samples": 12345}, {"mode": "a|b", "loss": None, "accuracy": "0.51 [0.4, 0.6]"}],
        title="Modes",
        note="Losses in nats.",
    )


def test_records_become_columns_with_rounded_numbers() -> None:
    assert table().head == ["mode", "loss", "samples", "accuracy"]
    assert table().rows == [["coarse_only", "1.235", "12,345", ""], ["a|b", "", "", "0.51 [0.4, 0.6]"]]
    assert table().numeric == [False, True, True, True]


def test_markdown_escapes_what_would_break_it_and_stresses_marked_rows() -> None:
    head, rule, first, second, _, note = table().model_copy(update={"marked": [0]}).markdown().splitlines()
    assert head == "| mode | loss | samples | accuracy |"
    assert rule == "| --- | ---: | ---: | ---: |"
    assert first == "| **coarse_only** | **1.235** | **12,345** |  |"
    assert second == "| a\\|b |  |  | 0.51 [0.4, 0.6] |"
    assert note == "Losses in nats."


def test_the_terminal_shows_the_same_cells() -> None:
    console = Console(width=100, record=True, file=None)
    with console.capture() as captured:
        console.print(table().terminal())
    shown = captured.get()
    for cell in ("coarse_only", "1.235", "12,345", "a|b", "0.51 [0.4, 0.6]", "Losses in nats."):
        assert cell in shown


def test_prefects_table_artifact_gets_a_dict_per_row() -> None:
    assert table().records()[0] == {"mode": "coarse_only", "loss": "1.235", "samples": "12,345", "accuracy": ""}
