"""Two kills of the campaign; twenty by hand."""

from pathlib import Path

import pytest

from tasks.config import PipelineConfig
from tests.campaign.precompute_kills import Outcome, campaign
from tests.tiny import PROFILE

PYTHON = PipelineConfig.from_yaml(PROFILE).machine.video2dataset_python


@pytest.mark.slow(reason="starts video2dataset several times, for each of three parts")
@pytest.mark.skipif(not PYTHON.exists(), reason="needs ./infra/video2dataset_env.sh")
def test_two_kills_lose_nothing_and_make_nothing_twice(tmp_path: Path) -> None:
    assert campaign(tmp_path, kills=2, seed=1) == Outcome(kills=2, same_bytes=True, lost=0, twice=0, remade=0)
