"""The GPU benchmark is ready to run: its code on a CPU with a tiny model, and a clear refusal where there is no GPU."""

import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_train_step import NO_GPU, fill, main, measurements, speed_job, write_videos
from fvlm_core.config import ModelSettings
from fvlm_core.data.shard_set import ShardSet


def test_on_a_cpu(tmp_path: Path) -> None:
    shards = write_videos(tmp_path / "shards", frame_px=28, videos=3, vocabulary=2000)
    words = ShardSet(shards).rows("train")
    assert sorted(words["n_answer_tokens"].unique()) == [13, 25, 49, 101]  # a token a word, and the end of the turn
    model = ModelSettings.model_validate(
        {
            "vision": {"shape": {"width": 16, "layers": 2, "heads": 2}, "frame_px": 28},
            "llm": {"shape": {"width": 24, "layers": 2, "heads": 2, "kv_heads": 1, "mlp_width": 48, "context": 1024}},
            "fine_iterations": 1,
        }
    )
    job = speed_job(tmp_path / "tiny", shards, model, steps=2, workers=0, device="cpu")
    (eager,) = fill("tiny", job, largest=8, kinds=("eager",))
    assert eager.batch == 8
    found = {m.metric: m for m in measurements(eager)}
    assert found["tiny eager speed"].value > 0
    assert found["tiny eager peak_memory"].value > 0
    assert 0 <= found["tiny eager data_wait"].value <= 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_says_that_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_train_step", "--json"])
    with pytest.raises(SystemExit, match=str(NO_GPU)):
        main()
    said = capsys.readouterr()
    assert "needs a CUDA GPU" in said.err
    assert said.out == ""
