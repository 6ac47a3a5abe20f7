"""A table's renderings say the same."""

import pytest
from rich.console import Console

from fvlm_core.tables import Table, signed


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


@pytest.mark.parametrize(
    ("cells", "numeric"),
    [
        (["0.512 [0.480, 0.541]", ""], True),
        (["1.8079 at 30", "2.0"], True),
        (["3 min 20 s", "5.4 s", "1 h 02 min"], True),
        (["2.29e+10", "652.8", "3.0%", "-0.0065*", "~$4"], True),
        (["9 at the middle centre", "4"], False),
        (["861 114 063"], False),
        (["", ""], False),
    ],
)
def test_only_columns_of_numbers_are_set_flush_right(cells: list[str], numeric: bool) -> None:
    assert Table(head=["", "x"], rows=[["a", cell] for cell in cells]).numeric == [False, numeric]


@pytest.mark.parametrize(
    ("difference", "shown"),
    [(0.25, "+0.2500"), (-0.0135, "-0.0135"), (0.00004, "+0.000040"), (-0.0000999, "-0.000100"), (3e-12, "+3.0e-12"), (0.0, "0")],
)
def test_a_difference_is_never_rounded_to_nothing(difference: float, shown: str) -> None:
    assert signed(difference) == shown
