"""The folder with a report's pictures."""

import shutil
from pathlib import Path

from fvlm_core.figures import Figure

FOLDER = "figures"


class Figures:
    """The folder `figures` of a release; creating it removes earlier pictures."""

    def __init__(self, output: Path) -> None:
        self.output = output
        shutil.rmtree(output / FOLDER, ignore_errors=True)
        (output / FOLDER).mkdir(parents=True)

    def copy(self, folder: Path, *figures: Figure) -> list[Figure]:
        """Copy a step's figures, and return them with their new paths; figures that the step did not draw are skipped."""
        return [self._copy(folder / figure.file, figure) for figure in figures if (folder / figure.file).is_file()]

    def place(self, file: str) -> Path:
        """Path for a picture that a section draws itself; the report refers to it as `FOLDER/file`."""
        return self.output / FOLDER / file

    def _copy(self, source: Path, figure: Figure) -> Figure:
        name = figure.file.replace("/", "-")
        shutil.copyfile(source, self.place(name))
        return figure.model_copy(update={"file": f"{FOLDER}/{name}"})
