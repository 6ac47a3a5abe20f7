"""Everything a release needs, at the smallest size: shards, a trained-looking run, results, ablations and a grid."""

from pathlib import Path

import numpy as np
from matplotlib.image import imsave

from fvlm_core.data.jobs import ShardManifest
from fvlm_core.eval.estimates import Estimate, PairedTest
from fvlm_core.eval.part import PartResult
from fvlm_core.eval.parts.captions import CaptionExample, CaptionResult, CaptionScores
from fvlm_core.eval.parts.gaze import GAZE_PICTURE, GazeResult, HeatMap
from fvlm_core.eval.parts.latency import LatencyResult, ModeLatency, Times
from fvlm_core.eval.parts.losses import LossResult, ModeLoss
from fvlm_core.eval.parts.multiple_choice import ChoiceBaselines, ChoiceResult, ChoiceScores
from fvlm_core.eval.parts.question_order import ORDERS, OrderCell, OrderResult
from fvlm_core.eval.results import EvalReport, Results
from fvlm_core.eval.summary import verdict
from fvlm_core.eval.tables import headline_table
from fvlm_core.figures import Figure
from fvlm_core.manifest import Manifest, file_entries, sha256_file
from fvlm_core.model.build import build_model, save_model
from fvlm_core.release.evidence import PhaseRecord
from fvlm_core.release.jobs import ReleaseJob
from fvlm_core.scaling.ablations import compare
from fvlm_core.scaling.grid import study
from fvlm_core.scaling.jobs import AblationJob, AblationRun
from fvlm_core.train.jobs import METRICS_FILE, RECIPE_FILE, RunManifest
from tests.scaling.build import finished, recipe
from tests.scaling.test_grid import SIZES, grid_job
from tests.tiny import tiny_shards

MIXTURE = [{"source": "gaze_cell", "share": 0.5}, {"source": "gaze_image", "share": 0.25}, {"source": "text", "share": 0.25}]
POOLED = {"model.query": "pooled", "model.fine_iterations": 0, "loss.fine": [], "model.tokens_per_frame": 4}
METRICS = """step,val_loss,val_coarse,val_fine1,val_fine2,grad_norm_connector,grad_norm_llm,lr_connector,lr_llm,entropy,frames_per_s
5,3.5,3.7,3.6,3.5,1.0,0.7,0.001,0.0001,2.1,40
10,2.5,2.7,2.6,2.5,0.8,0.6,0.0005,0.00005,1.8,60
"""


def shards(folder: Path) -> ShardManifest:
    """Tiny shards at `folder`."""
    tiny_shards(folder, clips=6)
    return ShardManifest.read(folder)


def run(folder: Path, shards_folder: Path, **changes) -> Path:
    """A finished run whose model has random weights."""
    manifest = ShardManifest.read(shards_folder)
    settings = recipe(**{"data.mixture": MIXTURE, **changes}).model_copy(update={"name": folder.name, "shards": shards_folder})
    folder.mkdir(parents=True)
    settings.to_yaml(folder / RECIPE_FILE)
    (folder / METRICS_FILE).write_text(METRICS)
    model = build_model(settings.model, vocab_size=manifest.vocab_size, seed=5)
    save_model(model, folder / "model", tokenizer=shards_folder / "tokenizer")
    RunManifest(
        name=f"train-{folder.name}",
        settings_hash=folder.name,
        inputs={"shards": manifest.digest},
        files=file_entries(folder, ["model/*"]) + file_entries(folder, ["*.csv", "*.yaml"], identity=False),
        seconds=75.0,
        steps=10,
        model_step=10,
        final_loss=2.5,
        losses={"coarse": 2.7, "fine1": 2.6, "fine2": 2.5},
        best_step=10,
        best_loss=2.5,
        samples_seen=80,
        frames_seen=240,
        label_tokens_seen=400,
        flops=1.5e9,
        params=sum(parameter.numel() for parameter in model.parameters()),
        resumed_from=[5],
    ).write(folder)
    return folder


def estimate(value: float, width: float = 0.02) -> Estimate:
    return Estimate(value=value, low=value - width, high=value + width, n=24, count=96)


def captions(cider_d: float) -> CaptionScores:
    others = {name: estimate(value) for name, value in (("bleu_1", 0.8), ("bleu_2", 0.7), ("bleu_3", 0.6), ("bleu_4", 0.543))}
    return CaptionScores(cider_d=estimate(cider_d), rouge_l=estimate(0.7), **others)


def evaluation(
    folder: Path,
    run_folder: Path,
    *,
    modes=("coarse_only", "coarse_fine", "autoregressive"),
    gain: float = 0.31,
) -> Path:
    """Results with recognisable numbers."""
    folder.mkdir(parents=True)
    (folder / "heatmaps").mkdir()
    rng = np.random.default_rng(0)
    for name in ("heatmaps/0.png", GAZE_PICTURE):
        imsave(folder / name, rng.random((60, 90, 3)), metadata={"Software": None})
    looks = len(modes) > 1
    scores = {mode: 1.8765 - 0.3 * number for number, mode in enumerate(modes)}
    gap = PairedTest(a="autoregressive", b="coarse_fine", metric="loss", difference=estimate(0.004))
    gained = PairedTest(a="coarse_only", b="coarse_fine", metric="loss", difference=estimate(gain))
    parts: dict[str, PartResult] = {
        "losses": LossResult(
            modes={
                mode: ModeLoss(loss=estimate(loss), by_source={"gaze_cell": estimate(loss + 0.1), "text": estimate(loss - 0.1)})
                for mode, loss in scores.items()
            },
            samples=48,
            train_inference_gap=gap if looks else None,
            foveation_gain=gained if looks else None,
        ),
        "captions": CaptionResult(
            modes=dict.fromkeys(modes, captions(3.21)),
            constant_caption="A red 5.",
            constant=captions(1.23),
            captions=24,
            examples=[
                CaptionExample(key="k", source="gaze_caption", reference="A <b>red</b> 3.", generated=dict.fromkeys(modes, "A red 5."))
            ],
            absent={"meteor": "no java"},
        ),
        "multiple_choice": ChoiceResult(
            modes=dict.fromkeys(
                modes,
                ChoiceScores(
                    accuracy=estimate(0.654),
                    by_task={"gaze_cell": estimate(0.654)},
                    predicted_positions=[5, 5, 5, 5],
                    shuffled_frames=estimate(0.321),
                ),
            ),
            baselines=ChoiceBaselines(
                chance=0.25, majority=0.26, blind=estimate(0.251), gold_positions=[5, 5, 5, 5], questions=20, clips=10
            ),
        ),
        "question_order": OrderResult(
            cells=[
                OrderCell(
                    order=order,
                    mode=mode,
                    accuracy=estimate(0.777 if (order, mode) != ("question_first", "coarse_only") else 0.222),
                    first_frame=estimate(0.7),
                    later_frames=estimate(0.912 if order == "question_first" else 0.233),
                    by_frame=[estimate(0.7), estimate(0.9)],
                    loss=estimate(0.5),
                    gaze_hit_rate=estimate(0.876) if mode != "coarse_only" else None,
                )
                for order in ORDERS
                for mode in modes
            ],
            constant=0.12,
            gaze_chance=1 / 9,
            questions=24,
        ),
        "latency": LatencyResult(
            device="cpu",
            threads=1,
            clips=4,
            frames=3,
            timings=12,
            modes={
                mode: ModeLatency(first_token=Times(median_ms=12.5, p95_ms=14), answer=Times(median_ms=20, p95_ms=22)) for mode in modes
            },
        ),
    }
    if looks:
        parts["gaze"] = GazeResult(
            entropy=dict.fromkeys(modes, estimate(0.432)),
            heatmaps=[HeatMap(file="heatmaps/0.png", key="k0", source="gaze_cell", question="Which digits?", answer="3 5 7")],
            composite=Figure(file=GAZE_PICTURE, caption="Where the model looks.", chart=False),
        )
    results = Results(
        run=run_folder.name,
        checkpoint=sha256_file(run_folder / "model" / "model.safetensors"),
        shards="d" * 64,
        seed=0,
        resamples=1000,
        frame_px=42,
        tokens_per_frame=1 if looks else 4,
        looks=looks,
        modes=list(modes),
        parts=parts,
    )
    timings = results.write(folder)
    EvalReport(
        name="evaluation",
        settings_hash="e",
        files=file_entries(folder, ["results.json", "*.png", "heatmaps/*"]) + file_entries(folder, timings, identity=False),
        seconds=20,
        model_step=10,
        verdict=verdict(results).line,
        headline=headline_table(results.headline()),
    ).write(folder)
    return folder


def full_job(folder: Path, **fields) -> ReleaseJob:
    """A release with every part; the speed phase is left out, so that something is missing."""
    shards(folder / "shards")
    stages = {name: run(folder / name, folder / "shards") for name in ("stage1", "stage2", "stage3")}
    grid = grid_job(folder / "grid", {name: SIZES[name] for name in ("xs", "s", "m")})
    study(grid)
    ablations = AblationJob(
        output=folder / "ablations",
        baseline="baseline",
        runs=[
            AblationRun(name="baseline", run=finished(folder / "a0", 2.0)),
            AblationRun(
                name="frozen",
                change="optimizer.lr_vision",
                value=0.0,
                run=finished(folder / "a1", 2.1357, changes={"optimizer.lr_vision": 0.0}),
            ),
        ],
    )
    compare(ablations)
    Manifest(name="clips", settings_hash="c", seconds=30).write(folder / "clips")
    phases = {"precompute": (50.0, ["clips", "shards"]), "ablations": (70.0, ["ablation-report", "a0", "a1"]), "train": (300.0, [*stages])}
    for name, (seconds, steps) in phases.items():
        record = PhaseRecord(name=name, settings_hash=name, seconds=seconds, steps=dict.fromkeys(steps))
        record.write(folder / "phases" / name)
    reports = {"clips": folder / "clips", "a0": folder / "a0", "a1": folder / "a1"}
    reports |= {"ablation-report": ablations.output, "scaling-report": grid.output}
    return ReleaseJob(
        output=folder / "release",
        name="fVLM-tiny",
        run=stages["stage3"],
        evaluation=evaluation(folder / "evaluation", stages["stage3"]),
        shards=folder / "shards",
        stages=stages,
        reports=reports,
        phases={name: folder / "phases" / name for name in phases},
        profile="ci",
        usd_per_hour=1.0,
        limitations=["Said by the job."],
        **fields,
    )
