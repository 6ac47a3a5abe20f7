"""`fvlm eval`: run benchmarks on any checkpoint, with a progress bar and a table of results."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fvlm_core.errors import UserError
from fvlm_core.eval.benchmarks import NAMES, benchmark
from fvlm_core.eval.benchmarks.benchmark import Scorer
from fvlm_core.eval.generation import Method
from fvlm_core.eval.parts.benchmarks import VALIDATION
from fvlm_core.model.names import MODES, SHORT_MODES

ALL = "all"


def evaluate(
    *,
    checkpoint: Path,
    benchmarks: str = "gaze",
    data: Path | None = None,
    mode: Annotated[
        str, Parameter(help=f"`{ALL}`, or a comma-separated list of {', '.join(dict.fromkeys([*SHORT_MODES, *MODES]))}.")
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
    """Evaluate a checkpoint on benchmarks, in every mode and with all controls. Run it again to resume.

    Parameters
    ----------
    checkpoint
        A released folder, a finished run or its model folder, a checkpoint of the original fVLM (with --vision and --llm), a SmolVLM2
        folder, or the hub name of a released model.
    benchmarks
        Comma-separated names; docs/benchmarks.md lists them.
    data
        Folder with a subfolder NAME for each benchmark, as published; `gaze` needs none, and `validation` of a run reads the run's shards.
    output
        Folder for results.json, tables.md and the answers; finished items are not asked again.
    limit
        Most questions per benchmark, evenly spaced over its rows; 0 means all.
    scorer
        How the table scores multiple-choice questions: by the likelihood of the options' letters, or of their texts; by default each
        benchmark's own way. Use `mean` for a model that was never trained on letters. tables.md lists all scorers.
    generate
        Also generate answers to multiple-choice questions, and parse the choice from them.
    method
        How answers are generated: greedy decoding, sampling, or beam search.
    temperature
        Sampling temperature.
    top_p
        Nucleus sampling: sample from the likeliest tokens whose probabilities add up to this.
    beams
        Number of beams in beam search.
    seed
        Seed of sampling, shuffled frames, random queries and confidence intervals.
    max_missing_share
        Largest share of a benchmark's items that may lack their media or be unreadable.
    latency_clips
        Number of clips on which latency and memory are measured in every mode, at the end; 0 skips this.
    vision
        Hub name or folder of the DINOv2 with which a checkpoint of the original was built.
    llm
        Hub name or folder of the SmolLM2 with which a checkpoint of the original was built.
    frame_px
        Side of the frames of a checkpoint of the original; by default 224 px.
    device
        Device to run on.
    batch_samples
        Sequences per batch.
    """
    names = [name for part in benchmarks.split(",") if (name := part.strip())]
    for name in names:
        benchmark(name)
    if not names:
        raise UserError("no benchmark is named", where="--benchmarks", fix=f"name some of {', '.join(NAMES)}")
    folders = _folders(names, data)
    modes = None if mode == ALL else [SHORT_MODES.get(name := part.strip(), name) for part in mode.split(",")]
    generation = {"method": method, "temperature": temperature, "top_p": top_p, "beams": beams, "seed": seed}
    job_values = {
        "output": output,
        "checkpoint": checkpoint,
        "original": {"vision": vision, "llm": llm, "frame_px": frame_px},
        "benchmarks": {
            "run": names,
            "data": folders,
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


def _folders(names: list[str], data: Path | None) -> dict[str, Path]:
    """The folder of each benchmark that needs one, absolute. Raises UserError if one is missing.

    `validation` may have none: the run's own shards are read then.
    """
    needed = [name for name in names if benchmark(name).needs_folder]
    if data is None:
        if lacking := [name for name in needed if name != VALIDATION]:
            fix = f"give the folder that holds {', '.join(f'{name}/' for name in lacking)} as published"
            raise UserError(f"the data of {', '.join(lacking)} are not given", where="--data", fix=fix)
        return {}
    # absolute: a relative `DIR/NAME` would pass for the name of a dataset on the hub
    folders = {name: (data / name).absolute() for name in needed if name != VALIDATION or (data / name).is_dir()}
    for name, folder in folders.items():
        if not folder.is_dir():
            fix = f"correct --data: it is the folder that holds {name}/ as published"
            raise UserError(f"{name}: folder not found", where=str(data / name), fix=fix)
    return folders
