"""Numbers in the docs that follow from the settings and the data, recomputed."""

from pathlib import Path

import pytest

from fvlm_core.config import LLMSettings, LossSettings, ModelSettings, VisionSettings
from fvlm_core.data.digits import forms_of
from fvlm_core.model.flops import ModelDims, SampleShape, sample_flops
from fvlm_core.model.published import PUBLISHED
from fvlm_core.settings import read_yaml

ROOT = Path(__file__).parents[2]
VISION, LLM = "facebook/dinov2-small", "HuggingFaceTB/SmolLM2-135M-Instruct"
A100_TFLOP_S, MFU, FRAME_KB = 312, 0.5, 9


def test_whether_the_gpu_waits_for_data_is_computed_from_the_profile():
    profile = read_yaml(ROOT / "deployments" / "profiles" / "runpod.yaml")
    stage, means = profile["stages"]["stage3"], profile["machine"]["rental"]["assumed"]["samples"]
    assert "loss" not in stage, "the estimate is with the default loss"
    model = ModelSettings(vision=VisionSettings(checkpoint=VISION, frame_px=224), llm=LLMSettings(checkpoint=LLM))
    dims = ModelDims.from_configs(PUBLISHED[VISION], PUBLISHED[LLM], 224)
    flops = frames = 0.0
    for source in stage["data"]["mixture"]:
        sample = means[source["source"]]
        distinct = sample.get("frames", 0)
        shown = distinct * (8 if sample.get("image") else 1)
        shape = SampleShape(
            frames=distinct, shown=shown, text_tokens=sample["tokens"], labels=sample["answer_tokens"], query_prefix=20 + shown
        )
        flops += source["share"] * sample_flops(model, dims, shape, LossSettings()).train
        frames += source["share"] * distinct
    tflop_s, per_frame = MFU * A100_TFLOP_S, flops / frames / 1e12
    per_s = round(tflop_s / per_frame, -1)
    a_step = stage["run"]["batch_samples"] / profile["machine"]["ranks"] * frames
    page = (ROOT / "docs" / "data-sources.md").read_text()
    assert f"| {1000 * per_frame:.1f} GFLOP |" in page
    assert f"{tflop_s:.0f} / {per_frame:.4f} = {per_s:,.0f} per second and GPU" in page
    assert f"| {round(a_step, -1):,.0f} frames per GPU, {a_step * per_frame / tflop_s:.1f} s of computing |" in page
    assert f"| {per_s:,.0f} x {FRAME_KB} KB = {per_s * FRAME_KB / 1000:.0f} MB/s per GPU |" in page


@pytest.mark.parametrize("page", ["docs/foveation.md", "docs/research.md"])
def test_pages_say_how_many_digits_are_held_out(page: str):
    assert f"{len(forms_of('val'))} digits" in (ROOT / page).read_text()
