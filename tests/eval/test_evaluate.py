"""The whole job on tiny shards with a tiny random model."""

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fvlm_core.errors import UserError
from fvlm_core.eval.evaluate import evaluate
from fvlm_core.eval.pictures import HeatRow, draw
from fvlm_core.eval.results import EvalReport, Latency, Results
from fvlm_core.eval.tables import markdown_table
from fvlm_core.manifest import sha256_file
from fvlm_core.model.names import MODES
from fvlm_core.progress import ProgressReport
from tests.eval.conftest import make_run, small_job


@pytest.fixture(scope="module")
def report(run: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, EvalReport]:
    folder = tmp_path_factory.mktemp("report")
    return folder, evaluate(small_job(run, shards, folder))


def test_everything_is_there(report: tuple[Path, EvalReport], run: Path):
    folder, made = report
    assert made == EvalReport.read(folder)
    assert made.problems(folder) == []
    results = Results.read(folder)
    assert list(results.modes) == list(MODES)
    assert results.checkpoint == sha256_file(run / "model/model.safetensors")
    assert results.train_inference_gap is not None
    gap = results.modes["autoregressive"].loss.value - results.modes["coarse_fine"].loss.value
    assert results.train_inference_gap.difference.value == pytest.approx(gap, abs=2e-6)
    for mode, result in results.modes.items():
        assert set(result.loss_by_source) == {"gaze_caption", "gaze_cell", "gaze_image", "text"}
        assert result.captions is not None
        assert result.captions.cider_d.count == 6
        assert result.multiple_choice is not None
        assert result.attention_entropy is not None
        assert 0 < result.attention_entropy.value <= 1
        assert made.headline[mode].loss == result.loss.value
    assert len(results.question_order) == 6
    assert set(results.absent) <= {"meteor"}
    assert len(results.heatmaps) == 2
    for picture in ["gaze.png", *(heatmap.file for heatmap in results.heatmaps)]:
        with Image.open(folder / picture) as image:
            assert min(image.size) > 100


def test_latency_is_kept_out_of_the_identity(report: tuple[Path, EvalReport]):
    folder, made = report
    timing = Latency.model_validate_json((folder / "latency.json").read_text())
    assert set(timing.modes) == set(MODES)
    assert all(0 < mode.low_ms <= mode.median_ms <= mode.high_ms and mode.clips == 2 for mode in timing.modes.values())
    assert "median_ms" not in (folder / "results.json").read_text()
    assert {entry.path for entry in made.files if not entry.identity} == {"latency.json", "tables.md"}


def test_tables_show_the_numbers_and_name_what_is_not_ours(report: tuple[Path, EvalReport]):
    folder, _ = report
    text, results = (folder / "tables.md").read_text(), Results.read(folder)
    for result in results.modes.values():
        assert f"{result.loss.value:.3f} [{result.loss.low:.3f}, {result.loss.high:.3f}]" in text
    assert "not measured here" in text
    assert "SmolVLM2-256M" in text
    in_tables = [(a, b) for a, b in pairwise(text.splitlines()) if a.startswith("|") and b.startswith("|")]
    assert all(a.count("|") == b.count("|") for a, b in in_tables)


def test_again_gives_the_same_digest_as_a_program(report: tuple[Path, EvalReport], run: Path, shards: Path, tmp_path: Path):
    _, made = report
    small_job(run, shards, tmp_path / "again").to_yaml(tmp_path / "job.yaml")
    subprocess.run([sys.executable, "-m", "fvlm_core.eval", tmp_path / "job.yaml"], check=True, env={"OMP_NUM_THREADS": "1"})
    again = EvalReport.read(tmp_path / "again")
    assert again.digest == made.digest
    assert again.settings_hash == made.settings_hash
    progress = ProgressReport.read(tmp_path / "again")
    assert progress is not None
    assert progress.step == progress.total


def test_pooled_model_has_one_mode_and_no_gaze(shards: Path, tmp_path: Path):
    run = make_run(tmp_path / "run", shards, query="pooled", fine_iterations=0, tokens_per_frame=4)
    report = evaluate(small_job(run, shards, tmp_path / "report"))
    results = Results.read(tmp_path / "report")
    assert list(results.modes) == ["coarse_only"]
    assert results.train_inference_gap is None
    assert results.modes["coarse_only"].attention_entropy is None
    assert "heatmaps" in results.absent
    assert not (tmp_path / "report/gaze.png").exists()
    assert report.counts["modes"] == 1
    assert [cell.gaze_hit_rate for cell in results.question_order] == [None, None]


def test_parts_can_be_left_out(run: Path, shards: Path, tmp_path: Path):
    job = small_job(
        run, shards, tmp_path, modes=["coarse_fine"], caption_samples=0, mcq_samples=0, order_samples=0, heatmaps=0, latency_clips=0
    )
    evaluate(job)
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["modes"]) == ["coarse_fine"]
    assert results["absent"] == dict.fromkeys(("captions", "multiple_choice", "question_order", "heatmaps"), "switched off")


def test_a_mode_the_model_lacks_is_named(shards: Path, tmp_path: Path):
    run = make_run(tmp_path / "run", shards, query="pooled", fine_iterations=0)
    with pytest.raises(UserError, match="no mode autoregressive"):
        evaluate(small_job(run, shards, tmp_path / "report", modes=["autoregressive"]))


def test_a_run_that_has_not_finished_is_an_error(shards: Path, tmp_path: Path):
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match="no manifest"):
        evaluate(small_job(tmp_path / "run", shards, tmp_path / "report"))


def test_text_cannot_break_a_table_or_a_picture(tmp_path: Path):
    assert markdown_table(["a"], [["x|y\nz\x03"]]).splitlines()[-1] == "| x/y·z· |"
    frames = np.zeros((2, 42, 42, 3), np.uint8)
    draw(tmp_path / "a.png", [HeatRow("costs $5 or $6", frames, np.full((2, 3, 3), 1 / 9), [(0, 0), (2, 2)])], "a $ and a _ and a ^")
    with Image.open(tmp_path / "a.png") as image:
        assert image.info.keys().isdisjoint({"Software"})


def test_a_long_clip_is_drawn_in_at_most_eight_columns(tmp_path: Path):
    frames = np.zeros((64, 42, 42, 3), np.uint8)
    draw(tmp_path / "long.png", [HeatRow("long", frames, np.full((64, 3, 3), 1 / 9))], "long")
    draw(tmp_path / "eight.png", [HeatRow("long", frames[:8], np.full((8, 3, 3), 1 / 9))], "long")
    with Image.open(tmp_path / "long.png") as long, Image.open(tmp_path / "eight.png") as eight:
        assert long.size == eight.size


def test_results_are_read_without_torch():
    code = "import sys, fvlm_core.eval.results, fvlm_core.eval.job, fvlm_core.eval.references; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
