"""The grace of a run grows with what it has to save."""

from pathlib import Path

from fvlm_core.train.grace_period import BASE_S, SAVES, UNKNOWN_S, WRITE_BYTES_PER_S, stop_grace_s


def file(path: Path, size: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as stream:
        stream.truncate(int(size))  # sparse: takes no disk


def test_by_the_newest_checkpoint_else_the_first_model_else_the_default(tmp_path: Path) -> None:
    run, start = tmp_path / "run", tmp_path / "start"
    assert stop_grace_s(run) == stop_grace_s(run, start) == UNKNOWN_S
    file(start / "model" / "model.safetensors", 7e9)  # 1.7B parameters
    assert stop_grace_s(run, start) == BASE_S + SAVES * 21e9 / WRITE_BYTES_PER_S
    file(run / "checkpoints" / "step-00000050" / "__0_0.distcp", 9e9)
    file(run / "checkpoints" / "step-00000100" / "__0_0.distcp", 1e9)
    file(run / "checkpoints" / "step-00000100" / "__1_0.distcp", 1e9)
    file(run / "checkpoints" / ".making-00000150" / "__0_0.distcp", 5e9)
    assert stop_grace_s(run, start) == BASE_S + SAVES * 2e9 / WRITE_BYTES_PER_S
