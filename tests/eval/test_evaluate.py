"""The complete job on tiny shards with a tiny random model."""

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
from fvlm_core.eval.parts import RESULTS
from fvlm_core.eval.parts.benchmarks import BenchmarksResult
from fvlm_core.eval.parts.captions import CaptionResult
from fvlm_core.eval.parts.drift import DriftResult
from fvlm_core.eval.parts.gaze import GazeResult
from fvlm_core.eval.parts.latency import ROUNDS, LatencyResult
from fvlm_core.eval.parts.losses import LossResult
from fvlm_core.eval.parts.multiple_choice import ChoiceResult
from fvlm_core.eval.parts.question_order import OrderResult
from fvlm_core.eval.pictures import HeatRow, draw
from fvlm_core.eval.results import AnyResult, EvalReport, Results
from fvlm_core.eval.summary import verdict
from fvlm_core.manifest import sha256_file
from fvlm_core.model.names import MODES
from fvlm_core.progress import ProgressReport
from fvlm_core.tables import Table
from tests.eval.conftest import make_run, small_job


@pytest.fixture(scope="module")
def report(run: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, EvalReport]:
    folder = tmp_path_factory.mktemp("report")
    return folder, evaluate(small_job(run, shards, folder))


def part(results: Results, kind: type[AnyResult]) -> AnyResult:
    found = results.part(kind)
    assert found is not None
    return found


def test_everything_is_there(report: tuple[Path, EvalReport], run: Path):
    folder, made = report
    assert made == EvalReport.read(folder)
    assert made.problems(folder) == []
    results = Results.read(folder)
    assert results.modes == list(MODES)
    assert results.checkpoint == sha256_file(run / "model/model.safetensors")
    assert list(results.parts) == list(RESULTS)
    assert part(results, BenchmarksResult).benchmarks["gaze"].questions == 12
    assert results.code
    assert "torch" in results.versions
    losses = part(results, LossResult)
    assert losses.train_inference_gap is not None
    gap = losses.modes["autoregressive"].loss.value - losses.modes["coarse_fine"].loss.value
    assert losses.train_inference_gap.difference.value == pytest.approx(gap, abs=2e-6)
    for mode in MODES:
        assert set(losses.modes[mode].by_source) == {"gaze_caption", "gaze_cell", "gaze_image", "text"}
        assert part(results, CaptionResult).modes[mode].cider_d.count == 6
        assert part(results, ChoiceResult).modes[mode].accuracy.count == 12
        assert 0 < part(results, GazeResult).entropy[mode].value <= 1
    assert len(part(results, OrderResult).cells) == 6
    assert set(results.not_measured()) <= {"meteor"}
    assert len(part(results, GazeResult).heatmaps) == 2
    assert results.figures()[0].file == "gaze.png"
    assert [figure.file for figure in results.figures() if "Where the model looks" not in figure.caption] == ["drift.png"]
    assert [point.frames for point in part(results, DriftResult).points] == [4]
    for timed in part(results, LatencyResult).modes.values():
        assert timed.peak_memory_gb is not None
        assert timed.peak_memory_gb > 0.05, "the process's memory, torch included"
    for figure in results.figures():
        with Image.open(folder / figure.file) as image:
            assert min(image.size) > 100


def test_results_read_again_are_the_typed_results_that_were_written(report: tuple[Path, EvalReport], tmp_path: Path):
    folder, _ = report
    results = Results.read(folder)
    assert {name: type(one) for name, one in results.parts.items()} == RESULTS
    results.write(tmp_path)
    assert Results.read(tmp_path) == results
    assert (tmp_path / "results.json").read_bytes() == (folder / "results.json").read_bytes()


def test_a_part_from_a_newer_version_is_named(report: tuple[Path, EvalReport], tmp_path: Path):
    values = json.loads((report[0] / "results.json").read_text())
    values["parts"]["newer"] = {}
    (tmp_path / "results.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"parts that this version does not know: newer") as refused:
        Results.read(tmp_path)
    assert "the version of fVLM that wrote it" in (refused.value.fix or "")


def test_latency_is_kept_out_of_the_identity(report: tuple[Path, EvalReport]):
    folder, made = report
    timing = part(Results.read(folder), LatencyResult)
    assert set(timing.modes) == set(MODES)
    assert (timing.clips, timing.batch, timing.timings) == (2, 1, 2 * ROUNDS)
    for mode in timing.modes.values():
        assert 0 < mode.first_token.median_ms <= mode.first_token.p95_ms
        assert 0 < mode.answer.median_ms <= mode.answer.p95_ms
    assert "median_ms" not in (folder / "results.json").read_text()
    assert {entry.path for entry in made.files if not entry.identity} == {"timings.json", "tables.md"}


def test_tables_show_the_numbers_and_name_what_is_not_ours(report: tuple[Path, EvalReport]):
    folder, _ = report
    text, results = (folder / "tables.md").read_text(), Results.read(folder)
    for result in part(results, LossResult).modes.values():
        assert f"{result.loss.value:.3f} [{result.loss.low:.3f}, {result.loss.high:.3f}]" in text
    assert verdict(results).text in text
    assert "SmolVLM2-256M" not in text, "no benchmark was run that it reports"
    assert all(figure.caption in text for figure in results.figures())
    in_tables = [(a, b) for a, b in pairwise(text.splitlines()) if a.startswith("|") and b.startswith("|")]
    assert all(a.count("|") == b.count("|") for a, b in in_tables)


def test_every_mode_stands_beside_what_it_has_to_be_compared_with(report: tuple[Path, EvalReport]):
    _, made = report
    rows = {row[0]: row[-1] for row in made.headline.rows}
    assert all(name in rows["multiple choice"] for name in ("chance 0.250", "no frames", "constant"))
    assert rows["gaze, question first"] == "chance 0.111"
    assert rows["question after"].startswith("constant")
    assert made.headline.head[1:-1] == list(MODES)


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
    assert results.modes == ["coarse_only"]
    assert part(results, LossResult).train_inference_gap is None
    assert results.absent["gaze"] == "the model pools its patches and looks nowhere"
    assert verdict(results).text == "This model pools its frames and does not look anywhere."
    assert not (tmp_path / "report/gaze.png").exists()
    assert report.counts["modes"] == 1
    assert [cell.gaze_hit_rate for cell in part(results, OrderResult).cells] == [None, None]


def test_parts_can_be_left_out(run: Path, shards: Path, tmp_path: Path):
    off = {"captions": {"samples": 0}, "multiple_choice": {"questions": 0}, "question_order": {"questions": 0}, "latency": {"clips": 0}}
    evaluate(small_job(run, shards, tmp_path, modes=["coarse_fine"], gaze={"heatmaps": 0}, drift={}, benchmarks={}, **off))
    results = Results.read(tmp_path)
    assert list(results.parts) == ["losses", "gaze"]
    reasons = {"benchmarks": "no benchmark was asked for (evaluation.benchmarks.run)", "drift": "mode autoregressive was not asked for"}
    assert results.absent == dict.fromkeys(off, "switched off") | reasons
    assert results.not_measured()["heatmaps"] == "switched off"
    assert verdict(results).text == "Whether looking helps was not measured."


def test_a_mode_the_model_lacks_is_named(shards: Path, tmp_path: Path):
    run = make_run(tmp_path / "run", shards, query="pooled", fine_iterations=0)
    with pytest.raises(UserError, match="no mode autoregressive"):
        evaluate(small_job(run, shards, tmp_path / "report", modes=["autoregressive"]))


def test_a_run_that_has_not_finished_is_an_error(shards: Path, tmp_path: Path):
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match="no manifest"):
        evaluate(small_job(tmp_path / "run", shards, tmp_path / "report"))


def test_text_cannot_break_a_table_or_a_picture(tmp_path: Path):
    assert Table(head=["a"], rows=[["x|y\nz\x03"]]).markdown().splitlines()[-1] == "| x\\|y·z· |"
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


def test_a_heat_map_has_a_scale_and_bare_frames_have_none(tmp_path: Path):
    frames = np.full((1, 42, 42, 3), 90, np.uint8)
    draw(tmp_path / "heat.png", [HeatRow("heat", frames, np.full((1, 3, 3), 1 / 9))], "title")
    draw(tmp_path / "bare.png", [HeatRow("bare", frames, None)], "title")
    with Image.open(tmp_path / "heat.png") as heat, Image.open(tmp_path / "bare.png") as bare:
        added = np.asarray(heat.convert("RGB"))[bare.height :]
    colours = added[(np.ptp(added, axis=-1) > 10)]  # neither white nor black nor grey
    assert len(np.unique(colours, axis=0)) > 20


def test_how_it_is_done_is_no_part_of_the_identity(run: Path, shards: Path, tmp_path: Path):
    job = small_job(run, shards, tmp_path)
    assert small_job(run, shards, tmp_path, threads=2, batch_samples=7, device="auto").hash() == job.hash()
    assert small_job(run, shards, tmp_path, seed=1).hash() != job.hash()


def test_settings_and_results_are_read_without_what_only_measuring_needs():
    heavy = "{'torch', 'scipy', 'matplotlib', 'sklearn', 'pandas'}"
    code = f"import sys, fvlm_core.eval.summary, fvlm_core.eval.jobs; assert not {heavy} & set(sys.modules), {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
