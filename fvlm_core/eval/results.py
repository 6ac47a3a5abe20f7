"""The schema of `results.json`, the single source of every number in tables, cards and reports; and the manifest of the evaluation step.

This module does not import torch. The parts and their result classes are in `parts/`.
"""

import json
from pathlib import Path
from typing import Any, Self, TypeVar, cast

from pydantic import Field, SerializeAsAny, ValidationError, field_validator

from fvlm_core import provenance
from fvlm_core.errors import UserError
from fvlm_core.eval.estimates import Metric
from fvlm_core.eval.part import PartResult
from fvlm_core.eval.parts import RESULTS
from fvlm_core.figures import Figure
from fvlm_core.manifest import Manifest, write_atomically
from fvlm_core.model.names import Mode
from fvlm_core.settings import Settings, hash_json
from fvlm_core.tables import Table

FILE_NAME = "results.json"
TIMINGS_FILE = "timings.json"
"""Results of the parts that measure time, by name; excluded from the evaluation's identity."""
TABLES_FILE = "tables.md"

AnyResult = TypeVar("AnyResult", bound=PartResult)


class Results(Settings):
    """`results.json`: the same for the same checkpoint, shards, external files, job and code. In memory it also holds the timings."""

    run: str
    """Name of the training run's recipe, or of the checkpoint."""
    checkpoint: str
    """sha256 of the model's `model.safetensors`."""
    shards: str = ""
    """Digest of the shards' manifest; empty if no shards were read."""
    code: str = ""
    """Digest of the evaluation code."""
    versions: dict[str, str] = {}
    """Versions of Python and of the libraries that a number can depend on."""
    outside: dict[str, str] = {}
    """Digests of the external files, by `PART.NAME`."""
    seed: int
    resamples: int
    """Number of bootstrap resamples behind each interval."""
    frame_px: int
    tokens_per_frame: int
    looks: bool
    """Whether the model has queries; a model that pools its patches does not."""
    modes: list[Mode]
    """The evaluated modes, in the order of `MODES`."""
    parts: dict[str, SerializeAsAny[PartResult]] = Field(default_factory=dict)
    """Results by part, in the order of the registry."""
    absent: dict[str, str] = {}
    """Parts that were not measured, with the reasons."""

    @field_validator("parts", mode="before")
    @classmethod
    def _typed(cls, parts: dict[str, Any]) -> dict[str, Any]:
        if unknown := [name for name in parts if name not in RESULTS]:
            raise ValueError(f"parts that this version does not know: {', '.join(unknown)}; it knows {', '.join(RESULTS)}")
        given = {name: (kind, parts[name]) for name, kind in RESULTS.items() if name in parts}
        return {name: one if isinstance(one, PartResult) else kind.model_validate(one) for name, (kind, one) in given.items()}

    def part(self, kind: type[AnyResult]) -> AnyResult | None:
        """The result of exactly this class; None if it was not measured."""
        return cast(AnyResult | None, next((part for part in self.parts.values() if type(part) is kind), None))

    def headline(self) -> list[Metric]:
        """The rows of the result table, of all parts."""
        return [metric for part in self.parts.values() for metric in part.headline()]

    def tables(self) -> list[Table]:
        """The tables of all parts."""
        return [table for part in self.parts.values() for table in part.tables()]

    def figures(self) -> list[Figure]:
        """The figures of all parts."""
        return [figure for part in self.parts.values() for figure in part.figures()]

    def not_measured(self) -> dict[str, str]:
        """The reasons why parts, or measurements within parts, are missing, by name."""
        within = {what: why for part in self.parts.values() for what, why in part.absent.items()}
        return self.absent | within

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read `folder/results.json` and the timings beside it.

        Raises UserError if the file is missing, does not match the schema, or has parts that this version does not know.
        """
        path, timings = folder / FILE_NAME, folder / TIMINGS_FILE
        try:
            values = json.loads(path.read_bytes())
            if timings.is_file():
                values["parts"] |= json.loads(timings.read_bytes())
            return cls.model_validate(values)
        except FileNotFoundError as error:
            raise UserError("no evaluation results", where=str(path), fix="run `python -m fvlm_core.eval` first") from error
        except (ValidationError, ValueError, TypeError, KeyError) as error:
            fix = "evaluate again, or read it with the version of fVLM that wrote it (see manifest.json)"
            raise UserError(f"the results cannot be read: {error}", where=str(path), fix=fix) from error

    def write(self, folder: Path) -> list[str]:
        """Write `folder/results.json` and, if there are any, the timings, each atomically; return the name of the timings file, if any."""
        values = self.model_dump(mode="json")
        timed = {name: values["parts"].pop(name) for name, part in self.parts.items() if part.timing}
        write_atomically(folder / FILE_NAME, json.dumps(values, indent=2, ensure_ascii=False).encode())
        if timed:
            write_atomically(folder / TIMINGS_FILE, json.dumps(timed, indent=2).encode())
        else:
            (folder / TIMINGS_FILE).unlink(missing_ok=True)  # left by an earlier evaluation
        return [TIMINGS_FILE] if timed else []


def measuring_code() -> str:
    """Digest of all files of this package that the evaluation imports, independent of the program that runs it."""
    return hash_json([[path, provenance.digest(path)] for path in provenance.imported_files("fvlm_core.eval.evaluate")])[:16]


class EvalReport(Manifest):
    """Manifest of the evaluation step: `results.json` and figures; `timings.json` and `tables.md` are excluded from its identity."""

    model_step: int
    """Training step of the evaluated model."""
    verdict: str
    """One line that says whether looking helps."""
    headline: Table
    """The result table, for display; take exact numbers from `results.json`."""
