"""The report's forms: what nobody vouches for stays text, sections say what is missing, differences are never rounded to nothing."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from matplotlib.image import imsave

from fvlm_core.data.jobs import BadClip, RejectedCount
from fvlm_core.eval.estimates import Estimate
from fvlm_core.eval.parts.captions import CaptionResult
from fvlm_core.eval.parts.gaze import GazeResult
from fvlm_core.eval.parts.losses import LossResult
from fvlm_core.eval.results import Results
from fvlm_core.eval.summary import verdict
from fvlm_core.figures import Figure
from fvlm_core.manifest import Manifest
from fvlm_core.release.evidence import Evidence
from fvlm_core.release.figures import Figures
from fvlm_core.release.formatting import duration, fenced
from fvlm_core.release.html import html, markdown_renderer
from fvlm_core.release.report import Report, Section
from fvlm_core.release.sections import SECTIONS, build, data, limitations, provenance, reproduce
from fvlm_core.tables import NO_DIFFERENCE, Table, difference
from tests.release.build import full_job

TAGS = "p em strong code pre details summary ul ol li h1 h2 h3 h4 h5 h6 hr br blockquote a div table thead tbody tr th td"
"""That markdown, and the report's way of showing it, may make."""
EVIL = ["<script>alert(1)</script>", "![x](https://evil.example/x.png)", "[click](javascript:alert(1))", "</td></table><h1>", "| a | b |"]


@pytest.fixture(scope="module")
def evidence(tmp_path_factory) -> Evidence:
    return Evidence.read(full_job(tmp_path_factory.mktemp("report")))


@pytest.fixture
def figures(tmp_path) -> Figures:
    return Figures(tmp_path)


def part(results: Results, kind):
    found = results.part(kind)
    assert found is not None
    return found


def page(evidence: Evidence, figures: Figures) -> str:
    return html(build(evidence, figures), figures.output)


@pytest.fixture(scope="module")
def page_as_it_is(evidence, tmp_path_factory) -> str:
    return page(evidence, Figures(tmp_path_factory.mktemp("page")))


@pytest.mark.parametrize("evil", EVIL)
def test_what_a_model_or_a_clip_says_is_text(evidence, figures, page_as_it_is, evil):
    results = evidence.results
    captions, gaze = (part(results, kind) for kind in (CaptionResult, GazeResult))
    (example,), (heat_map,) = captions.examples, gaze.heatmaps
    said = example.model_copy(update={"reference": evil, "generated": dict.fromkeys(example.generated, evil)})
    captions = captions.model_copy(update={"examples": [said], "constant_caption": evil})
    gaze = gaze.model_copy(update={"heatmaps": [heat_map.model_copy(update={"question": evil, "answer": evil})]})
    parts = results.parts | {"captions": captions, "gaze": gaze}
    results = results.model_copy(update={"parts": parts, "absent": {evil: evil}})
    shards = evidence.shards.model_copy(update={"bad": [BadClip(url=evil, reason=evil)]})
    shown = page(replace(evidence, results=results, shards=shards), figures)
    assert "<script" not in shown
    assert not re.search(r"""(src|href)="[^"]*(evil\.example|javascript:)""", shown)
    assert shown.count("<h1") == 1
    assert len(re.findall(r"<table", shown)) == len(re.findall(r"</table", shown)) == page_as_it_is.count("<table")
    text = re.sub(r"<[^>]*>", "", shown)
    for written, meant in (("&lt;", "<"), ("&gt;", ">"), ("&quot;", '"'), ("&amp;", "&")):
        text = text.replace(written, meant)
    assert text.count(evil) >= 8, "it is shown as it was said: captions, a picture's caption, a clip left out, a limitation"


@given(st.text("ab<>&\"'`*_![]()|\\:/\n# -", max_size=40))
@example("<script>alert(1)</script>")
@example("a <b onclick=x>b</b>")
@example("<img src=x onerror=alert(1)>")
@example("[a](javascript:alert(1)) <javascript:alert(1)>")
def test_markdown_never_becomes_html(text):
    """Whatever stands in the report's markdown: no tag but those that markdown makes, no picture but the report's own."""
    shown = markdown_renderer({}, Path()).render(text)
    assert set(re.findall(r"<(\w+)", shown)) <= set(TAGS.split())
    assert not re.search(r"href=\"(javascript|data|vbscript):", shown)


def test_only_the_reports_own_pictures_are_shown(tmp_path):
    imsave(tmp_path / "own.png", [[[0.0, 0.5, 1.0]]])
    (tmp_path / "secret.png").write_bytes(b"secret")
    own = Figure(file="own.png", caption="Ours.", chart=False)
    shown = markdown_renderer({"own.png": own}, tmp_path).render(f"{own.markdown()}\n\n![secret](secret.png)\n\n![up](../own.png)")
    assert re.findall(r'<img class="(\w+)" src="([^"]{22})', shown) == [("photo", "data:image/png;base64,")]
    assert '<p class="note"><em>Ours.</em></p>' in shown


def test_tables_keep_their_looks():
    table = Table(head=["run", "loss"], rows=[["a", "0.512 [0.480, 0.541]"], ["b", "0.6"]], marked=[1], note="In nats.")
    shown = markdown_renderer({}, Path()).render(table.markdown())
    assert '<td class="number"><span class="value">0.512</span> <span class="interval">[0.480, 0.541]</span></td>' in shown
    assert '<tr class="marked">\n<td><strong>b</strong></td>' in shown
    assert '<div class="scroll" tabindex="0"><table>' in shown
    assert '<p class="note">In nats.</p>' in shown


def test_long_code_is_folded_and_code_cannot_end_its_block():
    render = markdown_renderer({}, Path()).render
    assert "<details>" not in render(fenced("a\nb", "sh"))
    assert "<summary>13 lines</summary>" in render(fenced("a\n" * 13, "yaml"))
    assert render(fenced("```\n# no heading")).count("<h1>") == 0


def test_a_section_without_its_step_says_so(evidence, figures):
    bare = replace(evidence, reports={}, phases={})
    sections = {section.title: section for section in (write(bare, figures) for write in SECTIONS)}
    assert [title for title, section in sections.items() if section.missing] == [
        "Ablations",
        "Scaling",
        "Speed",
        "Experiment log",
        "Published models",
    ]
    assert sections["Scaling"].markdown() == "Missing: no scaling grid was run."
    assert len(sections) == len(SECTIONS)
    assert "| **ours** |" in sections["Selectors: which patches to encode"].markdown()


def test_any_stages_are_shown_in_their_order(evidence, figures):
    """A stage that this code has never heard of appears by itself."""
    stages = {"warmup": evidence.run, **evidence.stages, "dpo": evidence.run}
    report = build(replace(evidence, stages=stages), figures)
    (curves,) = [section for section in report.sections if section.title == "Training curves"]
    (table,) = [block for block in curves.blocks if isinstance(block, Table)]
    assert [row[0] for row in table.rows] == ["warmup", "stage1", "stage2", "stage3", "dpo"]
    assert "### Recipe of dpo" in provenance.section(replace(evidence, stages=stages), figures).markdown()


def test_a_new_phase_finds_its_report_by_the_manifests_name(tmp_path):
    class Demo(Manifest):
        score: float

    job = full_job(tmp_path)
    Demo(name="demo", settings_hash="d", score=0.5, seconds=7).write(tmp_path / "anything")
    evidence = Evidence.read(job.model_copy(update={"reports": {**job.reports, "demo-step": tmp_path / "anything"}}))
    found = evidence.report("demo", Demo)
    assert found is not None
    assert (found.manifest.score, found.folder) == (0.5, tmp_path / "anything")
    assert evidence.report("nothing", Demo) is None
    assert evidence.inputs["demo-step"] == found.manifest.digest


def test_steps_made_by_other_code_are_named(evidence, figures):
    assert "other code" not in provenance.section(evidence, figures).markdown()
    stage = evidence.stages["stage2"]
    old = replace(stage, manifest=stage.manifest.model_copy(update={"code": {"fvlm_core/train/loop.py": "0" * 64}}))
    text = provenance.section(replace(evidence, stages=evidence.stages | {"stage2": old}), figures).markdown()
    assert "* stage2 was made by other code: fvlm_core/train/loop.py has changed" in text


@pytest.mark.parametrize(
    ("job", "commands"),
    [
        ({"profile": "ci"}, ["./speedrun.sh --profile ci"]),
        ({"profile": ""}, ["./speedrun.sh"]),
        ({"profile": "ci", "reproduce": ["./speedrun.sh --profile my.yaml"]}, ["./speedrun.sh --profile my.yaml"]),
    ],
)
def test_the_command_names_the_profile_that_was_used(evidence, figures, job, commands):
    made = evidence.job.model_copy(update=job)
    assert reproduce.commands(made) == commands
    assert "\n".join(commands) in reproduce.section(replace(evidence, job=made), figures).markdown()


@pytest.mark.parametrize(
    ("value", "low", "high", "shown"),
    [
        (0.00003, 0.000002, 0.0001, "+0.000030 [+0.000002, +0.000100]"),
        (-0.31, -0.4, -0.2, "-0.3100 [-0.4000, -0.2000]"),
        (0.0, -0.001, 0.001, "+0.0000 [-0.0010, +0.0010]"),
        (0.0, 0.0, 0.0, NO_DIFFERENCE),
    ],
)
def test_differences_show_whether_they_are_any(value, low, high, shown):
    assert difference(Estimate(value=value, low=low, high=high, n=3, count=3)) == shown


def test_a_small_difference_is_not_worse_by_nothing(evidence):
    losses = part(evidence.results, LossResult)
    small = Estimate(value=3e-5, low=2e-6, high=9e-5, n=24, count=96)
    changes = {name: getattr(losses, name).model_copy(update={"difference": small}) for name in ("train_inference_gap", "foveation_gain")}
    parts = evidence.results.parts | {"losses": losses.model_copy(update=changes)}
    results = evidence.results.model_copy(update={"parts": parts})
    made = replace(evidence, results=results)
    text = " ".join([*limitations.limitations(made), verdict(results).line])
    assert "worse than coarse→fine: +0.000030 [+0.000002, +0.000090]" in text
    assert "better than coarse-only by 0.000030 nats" in text
    assert not re.search(r"[ +-]0\.0000?[ .,]", text)


@pytest.mark.parametrize(("seconds", "shown"), [(4.5, "4.5 s"), (59.97, "1 min 00 s"), (200, "3 min 20 s"), (3725, "1 h 02 min")])
def test_durations(seconds, shown):
    assert duration(seconds) == shown


def test_report_json_is_the_same_report(evidence, figures):
    report = build(evidence, figures)
    assert Report.model_validate(json.loads(report.model_dump_json())) == report
    assert all((figures.output / file).is_file() for file in report.figures)


def test_bad_clips_are_listed_up_to_a_limit(evidence, figures):
    bad, lost = [BadClip(url=f"u{number}", reason="r") for number in range(12)], [RejectedCount(source="clips", reason="r", samples=12)]
    text = data.section(replace(evidence, shards=evidence.shards.model_copy(update={"bad": bad, "lost": lost})), figures).markdown()
    assert "| clips | r | 12 |" in text
    assert "* u9: r\n* and 2 more" in text
    assert "u10" not in text


@pytest.mark.parametrize(
    "module",
    [
        "fvlm_core.release.evidence",
        "fvlm_core.release.sections",
        "fvlm_core.release.html",
        "fvlm_core.release.card",
        "fvlm_core.scaling.tables",
    ],
)
def test_a_table_needs_no_scipy_and_no_matplotlib(module):
    code = f"import sys, {module}; print(sorted({{'scipy', 'matplotlib', 'torch'}} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_release_itself_needs_no_matplotlib():
    """SciPy comes with transformers, which the model needs."""
    code = "import sys, fvlm_core.release.release; print('matplotlib' in sys.modules, 'fvlm_core.scaling.fits' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False False"


def test_a_section_is_markdown_in_every_form():
    table = Table(head=["a"], rows=[["b"]])
    assert Section(title="Time and cost", blocks=["text", table]).markdown() == f"text\n\n{table.markdown()}"
    assert Section(title="Time and cost").anchor == "time-and-cost"
