"""A run that is killed, stopped or finds its checkpoint damaged ends where one that never stopped ends, bit for bit."""

import json
import random
import shutil
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pandas as pd
import pytest

from fvlm_core.config import Recipe
from fvlm_core.errors import UserError
from fvlm_core.exit_status import STOPPED
from fvlm_core.manifest import sha256_file
from fvlm_core.train.__main__ import train
from fvlm_core.train.jobs import RunManifest
from tests.tiny import tiny_shards
from tests.train.conftest import one_rank_then_stop, start, tiny_recipe
from tests.waiting import wait_until

TIMINGS = ["samples_per_s", "frames_per_s", "tokens_per_s", "mfu", "data_wait_share", "peak_memory_gb"]
LONG = {"run__steps": 60, "run__eval_every": 3, "run__checkpoint_every": 4}


def wait_for_rows(recipe: Recipe, process: BaseProcess | subprocess.Popen[bytes], rows: int) -> None:
    """Until the run has written so many rows."""

    def written() -> bool:
        status = process.poll() if isinstance(process, subprocess.Popen) else process.exitcode
        assert status is None, f"the run ended (status {status}) before row {rows}"
        metrics = recipe.output / "metrics.csv"
        return metrics.is_file() and len(metrics.read_text().splitlines()) > rows

    wait_until(written, f"row {rows}", poll_s=0.002)


def rows(recipe: Recipe) -> pd.DataFrame:
    return pd.read_csv(recipe.output / "metrics.csv").drop(columns=TIMINGS)


def same_end(recipe: Recipe, other: Recipe) -> None:
    """Equal metrics to the last digit, and equal weights."""
    pd.testing.assert_frame_equal(rows(recipe), rows(other), check_exact=True)
    assert sha256_file(recipe.output / "model" / "model.safetensors") == sha256_file(other.output / "model" / "model.safetensors")
    mine, theirs = RunManifest.read(recipe.output), RunManifest.read(other.output)
    assert mine.digest == theirs.digest
    assert (mine.losses, mine.flops, mine.best_step, mine.model_step) == (theirs.losses, theirs.flops, theirs.best_step, theirs.model_step)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Recipe:
    recipe = tiny_recipe(tmp_path_factory.mktemp("whole") / "run", shards, **LONG)
    train(recipe)
    return recipe


@pytest.mark.slow(reason="runs in processes of their own, stopped and killed")
def test_stopped_then_killed_then_finished(tmp_path: Path, shards: Path, uninterrupted: Recipe) -> None:
    recipe = tiny_recipe(tmp_path / "run", shards, **LONG)
    stopped = start(recipe)
    wait_for_rows(recipe, stopped, random.randint(1, 4))
    stopped.terminate()
    stopped.join(30)
    assert stopped.exitcode == STOPPED
    newest = max((recipe.output / "checkpoints").glob("step-*"))
    assert (newest / "manifest.json").is_file()
    at_stop = int(newest.name.removeprefix("step-"))
    killed = start(recipe)
    wait_for_rows(recipe, killed, at_stop // 3 + random.randint(1, 6))
    time.sleep(random.random() * 0.1)
    killed.kill()
    killed.join()
    assert not (recipe.output / "manifest.json").exists()
    manifest = train(recipe)
    same_end(recipe, uninterrupted)
    assert manifest.resumed_from[0] == at_stop
    assert len(manifest.resumed_from) == 2


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete file", "no manifest"])
def test_damaged_newest_checkpoint(tmp_path: Path, shards: Path, uninterrupted: Recipe, damage: str) -> None:
    """The one before it is used; the finished run is made whole again."""
    recipe = uninterrupted.model_copy(update={"output": tmp_path / "run"})
    shutil.copytree(uninterrupted.output, recipe.output)
    newest = recipe.output / "checkpoints" / "step-00000060"
    tensors = next(newest.glob("*.distcp"))
    if damage == "flip":
        content = bytearray(tensors.read_bytes())
        content[random.randrange(len(content))] ^= 0x10
        tensors.write_bytes(content)
    elif damage == "truncate":
        tensors.write_bytes(tensors.read_bytes()[:-1])
    elif damage == "delete file":
        tensors.unlink()
    else:
        (newest / "manifest.json").unlink()
    assert RunManifest.read_whole(recipe.output) is None
    manifest = train(recipe)
    assert manifest.resumed_from == [56]
    same_end(recipe, uninterrupted)


def test_half_made_checkpoint_is_cleaned_away(tmp_path: Path, shards: Path, uninterrupted: Recipe) -> None:
    recipe = uninterrupted.model_copy(update={"output": tmp_path / "run"})
    shutil.copytree(uninterrupted.output, recipe.output)
    (recipe.output / "manifest.json").unlink()
    (recipe.output / "checkpoints" / "step-00000060").rename(recipe.output / "checkpoints" / ".making-00000060")
    (recipe.output / "metrics.csv").open("a").write("63,504,1")  # a row that a kill cut short
    train(recipe)
    same_end(recipe, uninterrupted)
    assert not list((recipe.output / "checkpoints").glob(".making*"))


def test_goes_on_from_a_checkpoint_before_the_first_evaluation(tmp_path: Path, shards: Path) -> None:
    late = {"run__steps": 6, "run__eval_every": 6, "run__checkpoint_every": 2}
    whole, stopped = (tiny_recipe(tmp_path / name, shards, **late) for name in ("whole", "stopped"))
    train(whole)
    one_rank_then_stop(stopped, 2, evaluated=False)
    assert train(stopped).resumed_from == [2]
    same_end(stopped, whole)


def test_finished_run_returns_at_once(uninterrupted: Recipe) -> None:
    before = RunManifest.read(uninterrupted.output)
    path = uninterrupted.output.with_suffix(".yaml")
    uninterrupted.to_yaml(path)
    command = [sys.executable, "-X", "importtime", "-m", "fvlm_core.train", path]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert "pydantic" in imported
    assert "torch" not in imported, "torch alone takes a second"
    assert RunManifest.read(uninterrupted.output) == before


def test_checkpoints_kept(uninterrupted: Recipe) -> None:
    """The last two and the best."""
    held = {int(path.name.removeprefix("step-")) for path in (uninterrupted.output / "checkpoints").iterdir()}
    assert held == {56, 60, RunManifest.read(uninterrupted.output).best_step}


def test_folder_of_another_recipe(uninterrupted: Recipe) -> None:
    other = uninterrupted.with_changes({"optimizer.lr_llm": 0.5})
    with pytest.raises(UserError, match=r"optimizer\.lr_llm was 0\.002 and is 0\.5"):
        train(other)


def test_folder_of_a_run_on_other_shards(tmp_path: Path, shards: Path, uninterrupted: Recipe) -> None:
    """By another path, or by a link that was moved since."""
    tiny_shards(tmp_path / "other", clips=4)
    with pytest.raises(UserError, match=f"shards was '{shards}' and is '{tmp_path / 'other'}'") as refused:
        train(uninterrupted.model_copy(update={"shards": tmp_path / "other"}))
    assert "correct these settings to resume that run" in refused.value.fix
    link = tmp_path / "link"
    link.symlink_to(shards)
    recipe = tiny_recipe(tmp_path / "run", link, run__steps=1)
    train(recipe)
    link.unlink()
    link.symlink_to(tmp_path / "other")
    with pytest.raises(
        UserError, match=f"the content of its shards .{link}., of init_from or of a backbone.s checkpoint has changed since"
    ):
        train(recipe)


def test_moved_volume_is_the_same_run(tmp_path: Path, shards: Path, uninterrupted: Recipe) -> None:
    shutil.copytree(shards, tmp_path / "shards")
    shutil.copytree(uninterrupted.output, tmp_path / "moved")
    moved = uninterrupted.model_copy(update={"output": tmp_path / "moved", "shards": tmp_path / "shards"})
    assert train(moved) == RunManifest.read(uninterrupted.output)


def test_bad_recipe_ends_with_status_2_and_says_why(tmp_path: Path, shards: Path) -> None:
    recipe = tiny_recipe(tmp_path / "run", shards).model_dump(mode="json")
    recipe["optimizer"]["lr_conector"] = 0.1
    path = tmp_path / "bad.yaml"
    path.write_text(json.dumps(recipe))
    done = subprocess.run([sys.executable, "-m", "fvlm_core.train", path], capture_output=True, text=True, timeout=20)
    assert done.returncode == 2
    assert "unknown key 'optimizer.lr_conector'" in done.stderr
    assert "lr_connector" in done.stderr
    assert str(path) in done.stderr
    assert "Traceback" not in done.stderr


def test_continues_from_an_earlier_run(tmp_path: Path, shards: Path, uninterrupted: Recipe) -> None:
    changes = {"run__steps": 1, "optimizer__lr_connector": 1e-9, "optimizer__lr_vision": 0.0, "optimizer__lr_llm": 0.0}
    recipe = tiny_recipe(tmp_path / "run", shards, **changes).model_copy(update={"init_from": uninterrupted.output})
    manifest = train(recipe)
    assert manifest.final_loss == pytest.approx(RunManifest.read(uninterrupted.output).final_loss, abs=1e-4)
    assert manifest.inputs["init_from"] == RunManifest.read(uninterrupted.output).digest
    wider = recipe.with_changes({"model.llm.shape.mlp_width": 64, "output": str(tmp_path / "wider")})
    with pytest.raises(UserError, match="the earlier run has another model"):
        train(wider)
