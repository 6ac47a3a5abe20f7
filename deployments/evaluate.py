"""`fvlm eval`: benchmarks on any checkpoint, with a progress bar, ending in the table."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fvlm_core.errors import UserError
from fvlm_core.eval.benchmarks import NAMES, benchmark
from fvlm_core.eval.benchmarks.benchmark import Scorer
from fvlm_core.eval.generation import Method
from fvlm_core.model.names import MODES, SHORT_MODES

ALL = "all"


def evaluate(
    *,
    checkpoint: Path,
    benchmarks: str = "gaze",
    data: Path | None = None,
    mode: Annotated[
        str, Parameter(help=f"`{ALL}`, or some of {', '.join(dict.fromkeys([*SHORT_MODES, *MODES]))}, with commas between them.")
    ] = ALL,
    output: Path = Path("evaluation"),
    limit: int = 0,
    scorer: Scorer | None = None,
    generate: Annotated[bool, Parameter(negative="")] = False,
    method: Method = "greedy",
    temperature: float = 1.0,
    top_p: float = 1.0,
    beams: int = 4,
    seed: int = 0,
    max_missing_share: float = 0.01,
    latency_clips: int = 4,
    vision: str | None = None,
    llm: str | None = None,
    frame_px: int | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    batch_samples: int = 64,
) -> int:
    """Ask a checkpoint the questions of benchmarks, in every mode, with all controls. Run it again to go on where it was stopped.

    Parameters
    ----------
    checkpoint
        A released folder, a finished run or a model folder of ours, a checkpoint of the original fVLM (with --vision and --llm), a
        SmolVLM2 folder, or the hub name of a released model.
    benchmarks
        Names with commas between them; docs/benchmarks.md lists them.
    data
        Folder that holds a folder NAME of each benchmark as it is published; `gaze` needs none.
    output
        Folder for results.json, tables.md and the answers; what is finished there is not asked again.
    limit
        Most questions of each benchmark, evenly over its rows; 0 is all.
    scorer
        How the table's choices are read off, where that is not to be each benchmark's own way: the likelihood of their letters, or of their
        texts. A model that was never trained on letters is read by `mean`. tables.md has all ways.
    generate
        Generate answers to multiple-choice questions too, and read the choice from them.
    method
        How answers are generated: always the likeliest token, draws, or beam search.
    temperature
        Of draws: above 1 they are bolder.
    top_p
        Of draws: from the likeliest tokens whose probabilities add up to that.
    beams
        Answers that beam search follows at a time.
    seed
        Of draws, shuffled frames, random queries and intervals.
    max_missing_share
        Share of a benchmark's items that may lack their media or be unreadable.
    latency_clips
        Clips on which time and memory of an answer are measured in every mode, at the end; 0 leaves that out.
    vision
        Hub name or folder of the DINOv2 that a checkpoint of the original was built with.
    llm
        Hub name or folder of its SmolLM2.
    frame_px
        Side of its frames: 224 px where it is not given.
    device
        Where to compute.
    batch_samples
        Sequences at a time.
    """
    names = [name for part in benchmarks.split(",") if (name := part.strip())]
    for name in names:
        benchmark(name)
    if not names:
        raise UserError("no benchmark is named", where="--benchmarks", fix=f"name some of {', '.join(NAMES)}")
    if data is None and (lacking := [name for name in names if benchmark(name).needs_folder]):
        fix = f"give the folder that holds {', '.join(f'{name}/' for name in lacking)} as published"
        raise UserError(f"the data of {', '.join(lacking)} are not given", where="--data", fix=fix)
    modes = None if mode == ALL else [SHORT_MODES.get(name := part.strip(), name) for part in mode.split(",")]
    generation = {"method": method, "temperature": temperature, "top_p": top_p, "beams": beams, "seed": seed}
    job_values = {
        "output": output,
        "checkpoint": checkpoint,
        "original": {"vision": vision, "llm": llm, "frame_px": frame_px},
        "benchmarks": {
            "run": names,
            "data": {} if data is None else {name: data / name for name in names if benchmark(name).needs_folder},
            "limit": limit,
            "scorer": scorer,
            "ask": {"modes": modes, "generate": generate, "generation": generation},
            "max_missing_share": max_missing_share,
        },
        "latency": {"clips": latency_clips},
        "seed": seed,
        "device": device,
        "batch_samples": batch_samples,
    }
    from fvlm_core.eval.jobs import CheckpointJob
    from fvlm_core.eval.tables import headline_table
    from fvlm_core.serve.evaluate import evaluate_checkpoint  # takes seconds

    job = CheckpointJob.from_values(job_values, where="the command's options")
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("questions", total=None)
        results = evaluate_checkpoint(
            job,
            start=lambda items: progress.update(bar, total=items),
            done=lambda items: progress.advance(bar, items),
            note=lambda text: progress.update(bar, description=text),
        )
    assert results is not None
    console.print(headline_table(results.headline(), compact=True).terminal())
    console.print(f"all numbers: {output / 'results.json'}, {output / 'tables.md'}", highlight=False, markup=False)
    return 0
