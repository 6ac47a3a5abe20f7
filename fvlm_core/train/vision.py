"""A small vision encoder that has learned to see, for a machine that reaches no hub: stands in for DINOv2 at laptop size.

`python -m fvlm_core.train.vision job.yaml` trains a DINOv2-shaped encoder on rendered digit grids and leaves a transformers
checkpoint, which the model then loads by path as it would load `facebook/dinov2-small` by name. Each patch predicts its own
digit and those to its right and below (and its digit's colour where asked for): the neighbours make the encoder's attention carry
*where* something is, without which queries never learn to look (own digits alone are not enough).
"""

import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fvlm_core.cli import run_job
from fvlm_core.config import VisionSettings, VisionShape
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
COLOUR = "colour"
CLASSES = 11
"""Ten digits, and the cross where there is one."""
IGNORE = -100


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
    """An encoder of a shape after its training, and its accuracy on held-out digits by target.

    `each_step` is called with the number of steps done and the last one's loss.
    """
    torch.manual_seed(settings.seed)
    rng = np.random.default_rng(settings.seed)
    encoder = build_encoder(VisionSettings(shape=shape, frame_px=gaze.FRAME_PX))
    targets = (*TARGETS, *([COLOUR] if settings.colours else []))
    head = nn.Linear(shape.width, len(targets) * (CLASSES if settings.crosses else CLASSES - 1))
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=settings.optimizer.lr_vision, fused=True)
    for step in range(settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rates(settings.optimizer, step, settings.steps)["vision"]
        frames, wanted = _batch(rng, "train", settings, settings.batch_frames)
        loss = F.cross_entropy(_logits(encoder, head, frames, len(targets)), wanted, ignore_index=IGNORE)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if each_step is not None:
            each_step(step + 1, loss.item())
    with torch.no_grad():
        frames, wanted = _batch(rng, "val", settings, 256)
        right = _logits(encoder, head, frames, len(targets)).argmax(1) == wanted
    accuracy = {name: right[:, n][wanted[:, n] != IGNORE].float().mean().item() for n, name in enumerate(targets)}
    return encoder, accuracy


def _logits(encoder: Encoder, head: nn.Linear, frames: Tensor, targets: int) -> Tensor:
    """Frames uint8 [F, H, W, 3] -> logits [F x patches, classes, targets]."""
    patches = encoder.encode(frames, patches=True).patches
    assert patches is not None
    return head(patches[:, 1:]).unflatten(-1, (-1, targets)).flatten(0, 1)


def _batch(rng: np.random.Generator, split: Split, settings: VisionTrainingSettings, frames: int) -> tuple[Tensor, Tensor]:
    """Full grids uint8 [frames, H, W, 3] and targets int64 [frames x patches, targets], IGNORE past the edges."""
    copies = settings.copies if split == "train" else 0
    clip = gaze.render(rng, split, task="hunt" if settings.crosses else "cell", frames=frames, copies=copies)
    digits = np.where(clip.digits == gaze.CROSS, CLASSES - 1, clip.digits)
    targets = np.full((*digits.shape, len(TARGETS) + settings.colours), IGNORE)
    targets[..., 0] = digits
    targets[:, :, :-1, 1] = digits[:, :, 1:]
    targets[:, :-1, :, 2] = digits[:, 1:]
    if settings.colours:
        targets[..., 3] = np.where(clip.digits == gaze.CROSS, IGNORE, clip.colours)
    return torch.from_numpy(clip.frames), torch.from_numpy(targets).flatten(0, 2)


if __name__ == "__main__":
    run_job(VisionJob, train_vision)
