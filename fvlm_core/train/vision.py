"""A small vision encoder that has learned to see, for a machine that reaches no hub: stands in for DINOv2 at laptop size.

`python -m fvlm_core.train.vision job.yaml` trains a DINOv2-shaped encoder on rendered digit grids and leaves a transformers
checkpoint, which the model then loads by path as it would load `facebook/dinov2-small` by name. Each patch predicts its own
digit and those to its right and below (and its digit's colour where asked for): the neighbours make the encoder's attention carry
*where* something is, without which queries never learn to look (own digits alone are not enough). Where frames have a cross, what a
query reads of any patch says where it is: the one token of such a frame has to tell a digit, and where to look in the next.
"""

import time
from collections.abc import Callable
from copy import deepcopy

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fvlm_core.cli import run_job
from fvlm_core.config import OptimizerSettings, VisionSettings, VisionShape
from fvlm_core.data import gaze
from fvlm_core.data.rows import Split
from fvlm_core.manifest import Manifest, file_entries
from fvlm_core.model.build import build_encoder
from fvlm_core.model.encoder import Encoder
from fvlm_core.progress import Progress
from fvlm_core.train.jobs import VisionJob, VisionTrainingSettings
from fvlm_core.train.schedules import learning_rates

TARGETS = ("own", "right", "below")
"""Digits that every patch predicts: its own, its right neighbour's, its lower neighbour's."""
COLOUR, CROSS = "colour", "cross"
CLASSES = 11
"""Ten digits, and the cross where there is one."""
CROSS_WEIGHT = 0.3
"""Of the loss about the cross's cell beside the digits'. At 1, neighbours are known in .62 to .71 after 2,000 steps, not in .87 to .91."""
IGNORE = -100
PROBE_STEPS, PROBE_RATE = 300, 1e-2
"""Of the heads of `still_known`."""


def train_vision(job: VisionJob) -> Manifest:
    """Train and write the checkpoint; the manifest's counts hold the accuracy per mille on held-out digits."""
    started = time.monotonic()
    torch.set_num_threads(job.threads)
    progress = Progress(job.output, job.steps)
    encoder, accuracy = pretrained(job, job.shape, lambda step, loss: progress.update(step, loss=loss))
    encoder.to_dinov2().save_pretrained(job.output)
    return Manifest(
        name="vision",
        settings_hash=job.hash(exclude={"output"}),
        counts={"steps": job.steps, **{f"{name}_per_mille": int(1000 * share) for name, share in accuracy.items()}},
        files=file_entries(job.output, ["config.json", "model.safetensors"]),
        seconds=time.monotonic() - started,
    ).write(job.output)


def pretrained(
    settings: VisionTrainingSettings, shape: VisionShape, each_step: Callable[[int, float], None] | None = None
) -> tuple[Encoder, dict[str, float]]:
    """An encoder of a shape after its training, and its accuracy on frames of held-out digits by what was asked.

    `each_step` is called with the number of steps done and the last one's loss.
    """
    torch.manual_seed(settings.seed)
    encoder = build_encoder(VisionSettings(shape=shape, frame_px=gaze.FRAME_PX))
    return encoder, _taught(encoder, settings, each_step)


def still_known(encoder: Encoder, settings: VisionTrainingSettings) -> dict[str, float]:
    """What new linear heads read off an encoder that stays as it is, as `pretrained` tells it: what a training after its own has left."""
    torch.manual_seed(settings.seed)
    probe = {"steps": PROBE_STEPS, "optimizer": OptimizerSettings(lr_vision=PROBE_RATE, warmup_steps=10)}
    return _taught(deepcopy(encoder).requires_grad_(False), settings.model_copy(update=probe))


def _taught(encoder: Encoder, settings: VisionTrainingSettings, each_step: Callable[[int, float], None] | None = None) -> dict[str, float]:
    """Train heads, and the encoder where it is trainable; accuracy on frames of held-out digits by what was asked."""
    rng = np.random.default_rng(settings.seed)
    asked = _Questions(settings, encoder.config.hidden_size)
    trained = [one for one in (*encoder.parameters(), *asked.parameters()) if one.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.optimizer.lr_vision, fused=True)
    for step in range(settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rates(settings.optimizer, step, settings.steps)["vision"]
        loss = asked.loss(encoder, _frames(rng, "train", settings, settings.batch_frames))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if each_step is not None:
            each_step(step + 1, loss.item())
    return asked.accuracy(encoder, _frames(rng, "val", settings, 256))


def _frames(rng: np.random.Generator, split: Split, settings: VisionTrainingSettings, frames: int) -> gaze.GazeClip:
    """Frames with something in every cell."""
    copies = settings.copies if split == "train" else 0
    task = "hunt" if settings.crosses else "cell"
    return gaze.render(rng, split, task=task, frames=frames, copies=copies, colours=settings.colours)


class _Questions(nn.Module):
    """What every patch is asked: linear heads, which are thrown away after the training."""

    def __init__(self, settings: VisionTrainingSettings, width: int) -> None:
        super().__init__()
        self.targets = (*TARGETS, *([COLOUR] if settings.colours else []))
        self.of_output = nn.Linear(width, len(self.targets) * (CLASSES if settings.crosses else CLASSES - 1))
        self.of_values = nn.Linear(width, gaze.GRID**2) if settings.crosses else None
        """Asks for the cross's cell. Of the last layer's values, because those are all that a query gets of a patch there."""

    def loss(self, encoder: Encoder, clip: gaze.GazeClip) -> Tensor:
        """Nats per answer, and those about the cross at their weight."""
        logits, of_cross = self(encoder, clip)
        loss = F.cross_entropy(logits, self._answers(clip), ignore_index=IGNORE)
        return loss if of_cross is None else loss + CROSS_WEIGHT * F.cross_entropy(of_cross, _crosses(clip))

    @torch.no_grad()
    def accuracy(self, encoder: Encoder, clip: gaze.GazeClip) -> dict[str, float]:
        """Share of right answers by target."""
        logits, of_cross = self(encoder, clip)
        wanted = self._answers(clip)
        right = logits.argmax(1) == wanted
        found = {name: right[:, n][wanted[:, n] != IGNORE].float().mean().item() for n, name in enumerate(self.targets)}
        return found if of_cross is None else found | {CROSS: (of_cross.argmax(1) == _crosses(clip)).float().mean().item()}

    def forward(self, encoder: Encoder, clip: gaze.GazeClip) -> tuple[Tensor, Tensor | None]:
        """Logits [frames x patches, classes, targets], and those of the cross's cell [frames x patches, cells]."""
        features = encoder.encode(torch.from_numpy(clip.frames), patches=True)
        assert features.patches is not None
        logits = self.of_output(features.patches[:, 1:]).unflatten(-1, (-1, len(self.targets))).flatten(0, 1)
        if self.of_values is None:
            return logits, None
        return logits, self.of_values(features.values[-1].transpose(1, 2).flatten(2)[:, 1:]).flatten(0, 1)

    def _answers(self, clip: gaze.GazeClip) -> Tensor:
        """int64 [frames x patches, targets], IGNORE past the edges."""
        digits = np.where(clip.digits == gaze.CROSS, CLASSES - 1, clip.digits)
        answers = np.full((*digits.shape, len(self.targets)), IGNORE)
        answers[..., 0] = digits
        answers[:, :, :-1, 1] = digits[:, :, 1:]
        answers[:, :-1, :, 2] = digits[:, 1:]
        if COLOUR in self.targets:
            answers[..., 3] = np.where(clip.digits == gaze.CROSS, IGNORE, clip.colours)
        return torch.from_numpy(answers).flatten(0, 2)


def _crosses(clip: gaze.GazeClip) -> Tensor:
    """The cell of the frame's cross, for each of its patches: int64 [frames x patches]."""
    return torch.from_numpy(clip.crosses).repeat_interleave(gaze.GRID**2)


if __name__ == "__main__":
    run_job(VisionJob, train_vision)
