"""A whole release, made once: the folder works in a clean process, and card and reports say what was measured."""

import json
import re
import runpy
import subprocess
import sys
from dataclasses import replace
from unittest.mock import patch

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries

from fvlm_core import __version__
from fvlm_core.config import LLMSettings, VisionSettings
from fvlm_core.errors import UserError
from fvlm_core.eval.estimates import Dataset
from fvlm_core.eval.parts.losses import LossResult
from fvlm_core.eval.results import Results
from fvlm_core.release import verify as verify_module
from fvlm_core.release.card import base_models, card, hub_datasets, hub_results
from fvlm_core.release.evidence import Evidence
from fvlm_core.release.jobs import BLOG, CARD_FILE, HUB_FOLDER, REPORT_HTML, REPORT_JSON, REPORT_TEXT, ReleaseJob, ReleaseManifest
from fvlm_core.release.release import release
from tests.browser import browser_page
from tests.release.build import POOLED, evaluation, full_job, run

pytestmark = pytest.mark.slow(reason="releases, each checked in a clean process")


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> ReleaseJob:
    return full_job(tmp_path_factory.mktemp("release"))


@pytest.fixture(scope="module")
def manifest(job) -> ReleaseManifest:
    return release(job)


def test_a_clean_process_computed_the_same_logits(manifest, job):
    assert set(manifest.verified) == {"coarse_only", "coarse_fine", "autoregressive"}
    assert all(count > 10_000 for count in manifest.verified.values())
    assert ReleaseManifest.read(job.output).problems(job.output) == []
    assert manifest.pushed_to is None
    assert all((job.output / path).exists() for path in manifest.outputs.values())


def test_a_moved_volume_knows_no_old_paths(manifest, job):
    """What a phase's table shows is relative to the step's folder."""
    assert manifest.outputs == {"model": "model", "report": "report.html"}
    assert str(job.output.parent) not in (job.output / "manifest.json").read_text()


def test_the_folder_stands_alone(manifest, job):
    folder = job.output / HUB_FOLDER
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "modeling_fvlm.py", "README.md", "gaze.png"} <= names
    for path in folder.glob("*.py"):
        source = path.read_text()
        assert not re.search(r"^\s*(from|import)\s+(fvlm_core|pydantic|yaml|simplejpeg|safetensors)", source, re.M), path.name
        assert not re.search(r"^from \.+\w+\.", source, re.M), f"{path.name}: nested relative import"
    checked = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F,E9", folder], check=False, capture_output=True
    )
    assert checked.returncode == 0, checked.stdout.decode()
    config = json.loads((folder / "config.json").read_text())
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForImageTextToText"}


def test_card_metadata(manifest, job):
    found_card = ModelCard.load(job.output / CARD_FILE)
    assert found_card.data.library_name == "transformers"
    assert found_card.data.pipeline_tag == "video-text-to-text"
    assert found_card.data.license == "apache-2.0"
    assert found_card.data.base_model is None
    results = Results.read(job.evaluation)
    found = {(one.dataset_config, one.metric_type): one.metric_value for one in found_card.data.eval_results}
    losses = results.part(LossResult)
    assert losses is not None
    assert found["coarse_fine", "loss"] == losses.modes["coarse_fine"].loss.value
    assert found["autoregressive", "accuracy"] == 0.654
    assert len(found) == 12
    assert "Said by the job." in found_card.text
    assert "| loss (nats/token) | 1.877 [1.857, 1.897] |" in found_card.text
    assert "first token (ms)" not in found_card.text, "times are of the machine"
    assert f"made from fVLM {__version__};" in found_card.text
    assert re.search(r"\| gaze_cell \| video \| \d+ \| 50% \|", found_card.text)
    assert 'AutoModelForImageTextToText.from_pretrained("path/to/fVLM-tiny", trust_remote_code=True)' in found_card.text


def test_base_models_are_those_that_the_hub_knows(job):
    """Local folders are no base models of a card."""
    evidence = Evidence.read(job)
    recipe = evidence.recipe.model_copy(
        update={
            "model": evidence.recipe.model.model_copy(
                update={
                    "llm": LLMSettings(checkpoint="HuggingFaceTB/SmolLM2-135M-Instruct"),
                    "vision": VisionSettings(checkpoint="/volume/steps/vision"),
                }
            )
        }
    )
    named = replace(evidence, run=replace(evidence.run, recipe=recipe))
    assert base_models(named) == ["HuggingFaceTB/SmolLM2-135M-Instruct"]
    text = ModelCard(card(named, "Verdict.", picture=None))
    assert text.data.base_model == ["HuggingFaceTB/SmolLM2-135M-Instruct"]
    assert "/volume" not in str(text)


def test_card_and_report_show_every_part_that_the_results_hold(manifest, job):
    """Nothing in the release names a part to show it: what the results hold is there."""
    results = Results.read(job.evaluation)
    card_text, report_text = (job.output / CARD_FILE).read_text(), (job.output / REPORT_TEXT).read_text()
    for part in results.parts.values():
        for table in part.tables():
            assert f"### {table.title}" in report_text or f"## {table.title}" in report_text
        assert part.timing or all(f"| {metric.name} |" in card_text for metric in part.headline())
    for figure in results.figures():
        assert figure.markdown().partition("(")[0] in report_text


def test_html_is_one_file(manifest, job):
    html = (job.output / REPORT_HTML).read_text()
    assert not re.search(r"""(?<!<a )(src|href)\s*=\s*["']?(https?:)?//""", html), "only links lead out"
    assert not re.search(r"@import|url\(\s*['\"]?http", html)
    sources = re.findall(r'<img[^>]*src="([^"]{0,30})', html)
    assert len(sources) == 9  # curves, ablations, five of scaling, gaze and a heat map
    assert all(source.startswith("data:image/png;base64,") for source in sources)


def test_the_report_is_no_wider_than_a_phone(manifest, job):
    """In a real browser; what is wider, tables and code, scrolls in its own box."""
    with browser_page() as page:
        page.set_viewport_size({"width": 390, "height": 844})
        page.goto((job.output / REPORT_HTML).resolve().as_uri())
        width = page.evaluate("document.documentElement.scrollWidth")
    assert width == 390


@pytest.mark.parametrize("form", [REPORT_HTML, REPORT_TEXT])
def test_reports_hold_the_numbers(manifest, job, form):
    text = re.sub(r"<[^>]*>", "", (job.output / form).read_text())
    results = Results.read(job.evaluation)
    losses = results.part(LossResult)
    assert losses is not None
    for mode in losses.modes.values():
        assert f"{mode.loss.value:.3f} [{mode.loss.low:.3f}, {mode.loss.high:.3f}]" in text
    for value in ("3.210", "0.543", "0.654", "0.912", "0.233", "0.222", "0.876", "12.5", "+0.1357", results.checkpoint):
        assert value in text, value
    assert "Looking helps" in text
    assert "Missing: no speed work was done." in text
    assert "Not measured: meteor (no java)" in text
    assert "3 model sizes, at least 4 are needed" in text
    assert "optimizer.lr_vision = 0.0" in text
    assert "Said by the job." in text
    assert "./speedrun.sh --profile ci" in text


def test_the_draft_of_a_blog_post_says_what_the_report_says(manifest, job):
    text, report = (job.output / BLOG).read_text(), json.loads((job.output / REPORT_JSON).read_text())
    assert report["verdict"] in text
    losses = Results.read(job.evaluation).part(LossResult)
    assert losses is not None
    for mode in losses.modes.values():
        assert f"{mode.loss.value:.3f} [{mode.loss.low:.3f}, {mode.loss.high:.3f}]" in text
    for value in ("720 frames seen", "7 min 00 s", "+0.1357", "Said by the job.", Results.read(job.evaluation).checkpoint):
        assert value in text, value
    linked = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
    assert linked
    assert all((job.output / path).is_file() for path in linked)


def test_results_in_the_folder_are_the_checkpoints(manifest, job):
    """What the folder says of itself is what was evaluated; nothing of the hub's own datasets was, so it has no `.eval_results`."""
    folder = job.output / HUB_FOLDER
    assert (folder / "results.json").read_bytes() == (job.evaluation / "results.json").read_bytes()
    assert not (folder / ".eval_results").exists()


def test_results_on_datasets_of_the_hub_are_said_as_it_reads_them(job):
    evidence = Evidence.read(job)
    part = evidence.results.parts["multiple_choice"]
    named = Dataset(type="OpenGVLab/MVBench", name="MVBench", split="test")
    with patch.object(type(part), "dataset", named):
        entries = parse_eval_result_entries(yaml.safe_load(hub_results(evidence)))
        assert hub_datasets(evidence) == []
    assert [(one.dataset_id, one.task_id, one.value) for one in entries] == [("OpenGVLab/MVBench", "test", 0.654)] * 3
    assert {one.notes.split(", ")[1] for one in entries} == {"coarse_only", "coarse_fine", "autoregressive"}


def test_markdown_links_pictures_that_exist(manifest, job):
    text = (job.output / REPORT_TEXT).read_text()
    linked = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
    assert len(linked) == 9
    assert all((job.output / path).is_file() for path in linked)


def test_times_and_costs_add_up(manifest, job):
    report = json.loads((job.output / REPORT_JSON).read_text())
    (section,) = [section for section in report["sections"] if section["title"] == "Time and cost"]
    (table,) = section["blocks"]
    assert table["head"] == ["phase", "wall time", "machine time", "of", "USD"]
    rows = {row[0]: row[1:] for row in table["rows"]}
    assert rows["precompute"][:3] == ["50.0 s", "30.0 s", "2 steps"]  # clips and shards, whose time is 0
    assert rows["train"][:3] == ["5 min 00 s", "3 min 45 s", "3 steps"]
    assert rows["ablations"][0] == "1 min 10 s"
    assert rows["ablations"][2] == "3 steps"
    assert rows["scaling-report"][0] == "", "a step of no phase has no wall time"
    assert rows["evaluation"][:3] == ["", "20.0 s", "1 step"]
    assert rows["all"][0] == "7 min 00 s"
    usd = {name: float(row[3]) for name, row in rows.items()}
    assert usd["all"] == pytest.approx(sum(value for name, value in usd.items() if name != "all"), abs=0.03)


def test_the_same_inputs_give_the_same_digest(manifest, job, monkeypatch):
    """Only the packaged model is the identity; nothing in it depends on when or where it was made."""
    monkeypatch.setattr("fvlm_core.release.release.verify", lambda *_: dict(manifest.verified))
    again = release(job.model_copy(update={"output": job.output.with_name("again")}))
    assert {entry.path: entry.sha256 for entry in again.files if entry.identity} == {
        entry.path: entry.sha256 for entry in manifest.files if entry.identity
    }
    assert again.digest == manifest.digest


def test_other_logits_release_nothing(job, monkeypatch):
    """The clean process is the judge: with other expected logits it refuses, and no model folder is left."""
    honest = verify_module.logits
    monkeypatch.setattr(verify_module, "logits", lambda *arguments: honest(*arguments) + 1e-6)
    broken = job.model_copy(update={"output": job.output.with_name("broken"), "verify_samples": 1})
    with pytest.raises(UserError, match=r"gives other results in a clean process: .*logits differ"):
        release(broken)
    assert not (broken.output / HUB_FOLDER).exists()
    assert not (broken.output / "manifest.json").exists()


def test_a_pooled_baseline_with_nothing_else(job, tmp_path):
    """Only what is required: the rest is named as missing, the one mode there is works."""
    folder = run(tmp_path / "pooled", job.shards, **POOLED)
    small = ReleaseJob(
        output=tmp_path / "out",
        name="pooled",
        run=folder,
        evaluation=evaluation(tmp_path / "evaluation", folder, modes=("coarse_only",)),
        shards=job.shards,
        verify_samples=2,
    )
    manifest = release(small)
    assert set(manifest.verified) == {"coarse_only"}
    assert manifest.missing == ["Ablations", "Scaling", "Speed", "Experiment log", "Published models"]
    text = (small.output / REPORT_TEXT).read_text()
    assert "does not look anywhere" in text
    assert "Missing: no ablations were run." in text
    assert "Missing: no scaling grid was run." in text
    assert "| pooled | 10 | 80 |" in text
    assert "| step | machine time | of |" in text


def test_an_evaluation_of_another_checkpoint_is_refused(job, tmp_path):
    other = run(tmp_path / "other", job.shards, **{"model.temperature": 0.5, "run.seed": 1})
    (other / "model" / "model.safetensors").write_bytes(b"other")
    manifest = json.loads((other / "manifest.json").read_text())
    for entry in manifest["files"]:
        entry["sha256"] = "0" * 64 if entry["path"].endswith("safetensors") else entry["sha256"]
    (other / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="another checkpoint"):
        release(job.model_copy(update={"run": other}))


def test_command_line(tmp_path, monkeypatch, capsys):
    """A bad setting is a few lines on stderr and status 2."""
    (tmp_path / "job.yaml").write_text(yaml.safe_dump({"output": "o", "name": "bad name"}))
    monkeypatch.chdir(tmp_path)  # a refused job writes error.json into its output
    monkeypatch.setattr(sys, "argv", ["release", str(tmp_path / "job.yaml")])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("fvlm_core.release", run_name="__main__")
    assert stopped.value.code == 2
    assert "name: String should match pattern" in capsys.readouterr().err
