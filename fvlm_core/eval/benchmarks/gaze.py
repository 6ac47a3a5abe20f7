"""The generated gaze benchmark (`fvlm_core.data.gaze`): which digits appear in one cell of a grid that is redrawn in every frame?

A model that does not look at the asked cell cannot tell the nine cells apart. The digits come from the validation split, which is never
used in training; nothing has to be downloaded.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fvlm_core.eval.benchmarks.benchmark import Benchmark, groups
from fvlm_core.eval.items import Item
from fvlm_core.eval.media import Rendered

if TYPE_CHECKING:  # it needs scikit-learn
    from fvlm_core.data.gaze import GazeClip

QUESTIONS = 576
"""Number of questions without a limit: 64 clips with nine questions each."""
FRAMES = 3
SEED = 20_261


def items(_folder: Path | None, limit: int) -> Iterator[Item]:
    """Generate `limit` questions (0: `QUESTIONS`), nine about each clip."""
    from fvlm_core.data import gaze

    made = 0
    for number in range(QUESTIONS):
        clip = clip_of(number)
        rng = np.random.default_rng([SEED, number, 1])
        conversations, probes = gaze.questions(clip, rng)
        media = Rendered(f"gaze-{number}", partial(_frames, number))
        for [turn], probe in zip(conversations, probes, strict=True):
            assert probe is not None
            if made == (limit or QUESTIONS):
                return
            yield Item(
                id=f"gaze-{number}/{made}",
                media=media,
                question=turn["question"],
                choices=probe["choices"],
                gold=probe["answer_index"],
                groups=groups(media.key, "cell"),
            )
            made += 1


def clip_of(number: int, *, scale: int = 1) -> "GazeClip":
    """Render a clip of the benchmark at `scale` times 42 px."""
    from fvlm_core.data import gaze

    return gaze.render(np.random.default_rng([SEED, number]), "val", frames=FRAMES, scale=scale)


def _frames(number: int, side: int) -> np.ndarray:
    """The frames of `clip_of` at any side length: uint8 [T, side, side, 3]."""
    from fvlm_core.data import gaze

    return gaze.render_to_fit(np.random.default_rng([SEED, number]), "val", side, frames=FRAMES).frames


BENCHMARK = Benchmark(name="gaze", title="Gaze", generate=items, needs_folder=False, split="generated", scorer="mean")
