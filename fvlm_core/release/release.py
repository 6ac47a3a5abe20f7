"""The release: package the model, verify it, write its report and card, and push it if requested."""

import shutil
import time

from fvlm_core.data.shard_set import ShardSet
from fvlm_core.eval.parts.gaze import GAZE_PICTURE
from fvlm_core.eval.results import FILE_NAME as RESULTS_FILE
from fvlm_core.figures import Figure
from fvlm_core.manifest import file_entries, write_atomically
from fvlm_core.model.build import load_model
from fvlm_core.progress import Progress
from fvlm_core.release.blog import blog
from fvlm_core.release.card import card, hub_results
from fvlm_core.release.evidence import Evidence
from fvlm_core.release.figures import FOLDER as FIGURES_FOLDER
from fvlm_core.release.figures import Figures
from fvlm_core.release.html import html
from fvlm_core.release.hub_folder import write_hub_folder
from fvlm_core.release.jobs import (
    BLOG,
    CARD_FILE,
    HUB_FOLDER,
    PUSH_PLAN,
    REPORT_HTML,
    REPORT_JSON,
    REPORT_TEXT,
    ReleaseJob,
    ReleaseManifest,
)
from fvlm_core.release.names import EVAL_RESULTS_FILE
from fvlm_core.release.push import plan, send
from fvlm_core.release.sections import build
from fvlm_core.release.verify import verify
from fvlm_core.train.jobs import MODEL_FOLDER

STEPS = 4
LOOKS = Figure(file=GAZE_PICTURE, caption="Where the model looks in a clip of the validation set.", chart=False)


def release(job: ReleaseJob, *, token: str | None = None, endpoint: str | None = None) -> ReleaseManifest:
    """Make the release. Pushes it only if the job has `push_to` and `push`, and `token` is given.

    Raises UserError if an input is missing or damaged, the evaluation is of another checkpoint, or the released folder does not give the
    same logits in a clean process; in the last case `model/` is removed.
    """
    started = time.monotonic()
    evidence = Evidence.read(job)
    report = build(evidence, Figures(job.output))
    progress = Progress(job.output, STEPS)
    folder, shards = job.output / HUB_FOLDER, ShardSet(job.shards)
    model = load_model(job.run / MODEL_FOLDER).eval()
    shutil.rmtree(folder, ignore_errors=True)
    write_hub_folder(folder, model, job.run / MODEL_FOLDER, evidence.recipe, evidence.shards)
    progress.update(1, note="packaged")
    try:
        verified = verify(folder, model, shards, evidence.recipe, job.verify_samples)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    progress.update(2, note="verified in a clean process")
    write_atomically(job.output / REPORT_JSON, report.model_dump_json(indent=2).encode())
    write_atomically(job.output / REPORT_TEXT, report.markdown().encode())
    write_atomically(job.output / REPORT_HTML, html(report, job.output).encode())
    write_atomically(job.output / BLOG, blog(evidence, report).encode())
    looks = job.evaluation / LOOKS.file
    if looks.is_file():
        shutil.copyfile(looks, folder / LOOKS.file)
    text = card(evidence, report.verdict, picture=LOOKS if looks.is_file() else None)
    write_atomically(job.output / CARD_FILE, text.encode())
    shutil.copyfile(job.evaluation / RESULTS_FILE, folder / RESULTS_FILE)
    if entries := hub_results(evidence):
        (folder / EVAL_RESULTS_FILE).parent.mkdir()
        write_atomically(folder / EVAL_RESULTS_FILE, entries.encode())
    progress.update(3, note="report and card written")
    pushed_to = None
    if job.push_to is not None:
        push = plan(folder, job.push_to)
        write_atomically(job.output / PUSH_PLAN, f"{push.text}\n".encode())
        if job.push and token:
            pushed_to = send(push, token=token, endpoint=endpoint, message=f"{job.name}, {push.tag}")
    progress.update(STEPS, note=f"pushed to {pushed_to}" if pushed_to else "not pushed: HF_TOKEN is not set" if job.push else "done")
    reports = [REPORT_JSON, REPORT_TEXT, REPORT_HTML, BLOG, f"{FIGURES_FOLDER}/*.png"]
    packaged = [f"{HUB_FOLDER}/*", f"{HUB_FOLDER}/{EVAL_RESULTS_FILE}"]
    return ReleaseManifest(
        name="release",
        settings_hash=job.hash(exclude={"output"}),
        inputs=evidence.inputs,
        counts={"verified_logits": sum(verified.values())},
        files=file_entries(job.output, packaged) + file_entries(job.output, reports, identity=False),
        seconds=time.monotonic() - started,
        verdict=report.verdict,
        outputs={"model": HUB_FOLDER, "report": REPORT_HTML},
        verified=verified,
        pushed_to=pushed_to,
        missing=[section.title for section in report.sections if section.missing],
    ).write(job.output)
