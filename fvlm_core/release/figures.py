"""The pictures of a report: a folder beside it, where sections put their own."""

import shutil
from pathlib import Path

from fvlm_core.figures import Figure

FOLDER = "figures"


class Figures:
    """The folder `figures` of a release, emptied first."""

    def __init__(self, output: Path) -> None:
        self.output = output
        shutil.rmtree(output / FOLDER, ignore_errors=True)
        (output / FOLDER).mkdir(parents=True)

    def copy(self, folder: Path, *figures: Figure) -> list[Figure]:
        """Copies of a step's figures, as the report shows them; those that the step did not draw are left out."""
        return [self._copy(folder / figure.file, figure) for figure in figures if (folder / figure.file).is_file()]

    def place(self, file: str) -> Path:
        """Where a section draws a picture of its own, to be shown as `FOLDER/file`."""
        return self.output / FOLDER / file

    def _copy(self, source: Path, figure: Figure) -> Figure:
        name = figure.file.replace("/", "-")
        shutil.copyfile(source, self.place(name))
        return figure.model_copy(update={"file": f"{FOLDER}/{name}"})
