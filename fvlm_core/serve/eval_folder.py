"""The output folder of `fvlm eval`: it belongs to one checkpoint and its settings, and collects the benchmarks of several runs."""

from pathlib import Path
from typing import Any

import yaml

from fvlm_core.dotted import differences
from fvlm_core.errors import FolderTakenError, UserError
from fvlm_core.eval.answerers.answerer import Answerer
from fvlm_core.eval.benchmark_result import BenchmarkResult
from fvlm_core.eval.jobs import CheckpointJob
from fvlm_core.eval.parts.benchmarks import BenchmarksResult
from fvlm_core.eval.results import FILE_NAME, Results, measuring_code
from fvlm_core.manifest import write_atomically
from fvlm_core.provenance import versions
from fvlm_core.settings import read_yaml

CLAIM_FILE = "evaluated.yaml"
"""Names the checkpoint and the settings of all results in the folder."""
FIX = "give another --output (output), or delete the folder"


def claim(job: CheckpointJob, answerer: Answerer) -> Results | None:
    """Reserve the output folder for this checkpoint and these settings; return the results of earlier runs in it, if any.

    Benchmarks, their data and the scoring method of the headline may differ from earlier runs: the results of other benchmarks are kept.

    Raises FolderTakenError if the folder holds the evaluation of another checkpoint, other settings or a pipeline, or benchmarks that this
    run leaves out and another version of the code measured.
    """
    folder = job.output
    mine = _identity(job, answerer)
    if (folder / CLAIM_FILE).is_file():
        theirs = read_yaml(folder / CLAIM_FILE)
        _check_same(theirs if isinstance(theirs, dict) else {}, mine, folder)
    elif (folder / FILE_NAME).is_file():
        raise FolderTakenError(
            f"the folder holds the evaluation of {_name(folder)} by the pipeline or an older version of fvlm", where=str(folder), fix=FIX
        )
    else:
        write_atomically(folder / CLAIM_FILE, yaml.safe_dump(mine, sort_keys=False).encode())
    earlier = Results.read(folder) if (folder / FILE_NAME).is_file() else None
    if earlier is not None:
        others = [name for name in benchmarks_of(earlier) if name not in job.benchmarks.run]
        if others and (earlier.code, earlier.versions) != (measuring_code(), versions()):
            raise FolderTakenError(
                f"another version of the code or of a library measured {', '.join(others)}, whose results are in the folder",
                where=str(folder),
                fix=f"name {', '.join(others)} in --benchmarks too, or {FIX}",
            )
    return earlier


def benchmarks_of(results: Results | None) -> dict[str, BenchmarkResult]:
    """The benchmarks in results, by name."""
    part = results.part(BenchmarksResult) if results is not None else None
    return dict(part.benchmarks) if part is not None else {}


def _identity(job: CheckpointJob, answerer: Answerer) -> dict[str, Any]:
    """Everything that results depend on, except what each benchmark says itself."""
    values = job.identity_values()
    benchmarks = {name: value for name, value in values["benchmarks"].items() if name not in ("run", "scorer")}
    rule = answerer.rule
    return {
        "name": answerer.name,
        "checkpoint": answerer.checkpoint,
        "frames": {"px": rule.frame_px, "fps": rule.fps, "most": rule.max_frames, "image_repeats": answerer.image_repeats},
        "settings": {"benchmarks": benchmarks, "resamples": values["resamples"], "seed": values["seed"]},
    }


def _check_same(theirs: dict[str, Any], mine: dict[str, Any], folder: Path) -> None:
    name = theirs.get("name", "another model")
    if theirs.get("checkpoint") != mine["checkpoint"]:
        raise FolderTakenError(
            f"the folder holds the evaluation of {name}, another checkpoint than {mine['name']}'s "
            f"({str(theirs.get('checkpoint'))[:12]}, not {mine['checkpoint'][:12]})",
            where=str(folder),
            fix=FIX,
        )
    changed = differences({k: theirs.get(k) for k in ("frames", "settings")}, {k: mine[k] for k in ("frames", "settings")})
    if changed:
        shown = ", ".join(f"{path} was {before!r} and is {now!r}" for path, (before, now) in changed.items())
        raise FolderTakenError(f"the folder holds the evaluation of {name} with other settings: {shown}", where=str(folder), fix=FIX)


def _name(folder: Path) -> str:
    """The name of the model whose results are in the folder."""
    try:
        return Results.read(folder).run
    except UserError:
        return "a model"
