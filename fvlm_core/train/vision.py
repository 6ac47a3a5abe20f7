"""A small vision encoder that has learned to see, for a machine that reaches no hub: stands in for DINOv2 at laptop size.

`python -m fvlm_core.train.vision job.yaml` trains a DINOv2-shaped encoder on rendered digit grids and leaves a transformers
checkpoint, which the model then loads by path as it would load `facebook/dinov2-small` by name. Each patch predicts its own
digit and those to its right and below: the neighbours make the encoder's attention carry *where* something is, without which
queries never learn to look (own digits alone are not enough).
"""

import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fvlm_core.cli import run_job
from fvlm_core.config import VisionSettings
from fvlm_core.data import gaze
from fvlm_core.data.rows import Split
from fvlm_core.manifest import Manifest, file_entries
from fvlm_core.model.build import build_encoder
from fvlm_core.model.encoder import Encoder
from fvlm_core.progress import Progress
from fvlm_core.train.jobs import VisionJob
from fvlm_core.train.schedules import learning_rates

TARGETS = 3
"""Predictions per patch: its own digit, its right neighbour's, its lower neighbour's."""
IGNORE = -100


def train_vision(job: VisionJob) -> Manifest:
    """Train and write the checkpoint; the manifest's counts hold the accuracy per mille on held-out digits."""
    started = time.monotonic()
    torch.set_num_threads(job.threads)
    torch.manual_seed(job.seed)
    rng = np.random.default_rng(job.seed)
    encoder = build_encoder(VisionSettings(shape=job.shape, frame_px=gaze.FRAME_PX))
    head = nn.Linear(job.shape.width, TARGETS * 10)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=job.optimizer.lr_vision, fused=True)
    progress = Progress(job.output, job.steps)
    for step in range(job.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rates(job.optimizer, step, job.steps)["vision"]
        frames, targets = _batch(rng, "train", job.batch_frames)
        loss = F.cross_entropy(_logits(encoder, head, frames), targets, ignore_index=IGNORE)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        progress.update(step + 1, loss=loss.item())
    with torch.no_grad():
        frames, targets = _batch(rng, "val", 256)
        right = _logits(encoder, head, frames).argmax(1) == targets
    accuracy = {
        f"{name}_per_mille": int(1000 * right[:, n][targets[:, n] != IGNORE].float().mean())
        for n, name in enumerate(("own", "right", "below"))
    }
    encoder.to_dinov2().save_pretrained(job.output)
    return Manifest(
        name="vision",
        settings_hash=job.hash(exclude={"output"}),
        counts={"steps": job.steps, **accuracy},
        files=file_entries(job.output, ["config.json", "model.safetensors"]),
        seconds=time.monotonic() - started,
    ).write(job.output)


def _logits(encoder: Encoder, head: nn.Linear, frames: Tensor) -> Tensor:
    """Frames uint8 [F, H, W, 3] -> logits [F x patches, 10, TARGETS]."""
    patches = encoder.encode(frames, patches=True).patches
    assert patches is not None
    return head(patches[:, 1:]).unflatten(-1, (10, TARGETS)).flatten(0, 1)


def _batch(rng: np.random.Generator, split: Split, frames: int) -> tuple[Tensor, Tensor]:
    """Full grids uint8 [frames, H, W, 3] and targets int64 [frames x patches, TARGETS], IGNORE past the edges."""
    clip = gaze.render(rng, split, frames=frames)
    targets = np.full((*clip.digits.shape, TARGETS), IGNORE)
    targets[..., 0] = clip.digits
    targets[:, :, :-1, 1] = clip.digits[:, :, 1:]
    targets[:, :-1, :, 2] = clip.digits[:, 1:]
    return torch.from_numpy(clip.frames), torch.from_numpy(targets).flatten(0, 2)


if __name__ == "__main__":
    run_job(VisionJob, train_vision)
