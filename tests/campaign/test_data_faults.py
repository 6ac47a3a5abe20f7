"""The fault table: damage to shards is struck and named, and what is not named is counted as lost."""

import random
from pathlib import Path

import pytest

from tests.campaign import data_faults
from tests.campaign.data_faults import damaged_shards


def test_every_damage_to_a_shard_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [*damaged_shards(tmp_path / "one", 2, random.Random(0))]
    assert [row["fault"] for row in rows][:2] == ["corrupt JPEG in a shard", "truncated tar"]
    assert all(row["struck"] == row["as it has to be"] and row["what is said"] for row in rows), rows
    monkeypatch.setattr(data_faults, "truncate", lambda tar, row: None)
    spared = {row["fault"]: row["lost silently"] for row in damaged_shards(tmp_path / "two", 1, random.Random(0))}
    assert spared["truncated tar"] == 1
    assert sum(spared.values()) == 1
