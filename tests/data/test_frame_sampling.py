from pathlib import Path

import pytest

from fvlm_core.data.frame_sampling import FRAME_SAMPLING_FILE, FrameSampling
from fvlm_core.data.frames import FrameRule
from fvlm_core.data.jobs import ShardManifest
from fvlm_core.errors import UserError


def test_a_model_is_shown_what_it_was_trained_with(tmp_path: Path) -> None:
    shards = ShardManifest(name="shards", settings_hash="", sources=[], frame_px=42, fps=2.5, max_frames=12, vocab_size=300)
    shown = FrameSampling.of_training(shards, image_repeats=3)
    shown.to_yaml(tmp_path / FRAME_SAMPLING_FILE)
    assert FrameSampling.of_model(tmp_path, frame_px=224) == shown
    assert (shown.rule, shown.image_repeats) == (FrameRule(42, 2.5, 12), 3)


def test_a_model_that_was_trained_elsewhere_is_shown_the_originals_frames(tmp_path: Path) -> None:
    shown = FrameSampling.of_model(tmp_path, frame_px=224)
    assert (shown.rule, shown.image_repeats) == (FrameRule(224, fps=1.0, max_frames=64), 8)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / FRAME_SAMPLING_FILE).write_text("frame_px: 42\nfps: often\n")
    with pytest.raises(UserError, match="fps"):
        FrameSampling.of_model(tmp_path, frame_px=42)
