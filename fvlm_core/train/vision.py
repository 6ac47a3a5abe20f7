"""Train a small stand-in for the pre-trained DINOv2, for laptops and machines without access to the hub.

`python -m fvlm_core.train.vision job.yaml` trains a DINOv2-shaped encoder on rendered digit grids and writes a transformers checkpoint,
which is loaded by path as `facebook/dinov2-small` is loaded by name. Each patch predicts its own digit and those to its right and below
(and, optionally, its digit's colour). Predicting neighbours makes the encoder's attention depend on positions; with own digits alone,
queries never learn where to look. If frames have a cross, the last layer's values of every patch also encode the cross's cell: the single
token of such a frame has to tell both a digit and where to look in the next frame.
"""

import time
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from itertools import repeat

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fvlm_core.cli import run_job
from fvlm_core.config import OptimizerSettings, VisionSettings, VisionShape
from fvlm_core.data import gaze
from fvlm_core.data.generate import generate
from fvlm_core.data.rows import Split
from fvlm_core.manifest import Manifest, file_entries
from fvlm_core.model.build import build_encoder
from fvlm_core.model.encoder import Encoder
from fvlm_core.progress import Progress
from fvlm_core.train.jobs import VisionJob, VisionTrainingSettings
from fvlm_core.train.schedules import learning_rates

TARGETS = ("own", "right", "below")
"""Digits that every patch predicts: its own, and those of its right and lower neighbours."""
COLOUR, CROSS = "colour", "cross"
CLASSES = 11
"""Ten digits and, in frames with a cross, the cross."""
CROSS_WEIGHT = 0.3
"""Weight of the loss for the cross's cell. At 1, the accuracy of neighbours after 2,000 steps is .62 to .71 instead of .87 to .91."""
IGNORE = -100
CPU = torch.device("cpu")
PROBE_STEPS, PROBE_RATE = 300, 1e-2
"""Steps and learning rate of the heads in `probe_accuracy`."""


def train_vision(job: VisionJob) -> Manifest:
    """Train an encoder and write its checkpoint. The manifest's counts hold the accuracy on held-out digits, in per mille."""
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
    settings: VisionTrainingSettings,
    shape: VisionShape,
    each_step: Callable[[int, float], None] | None = None,
    *,
    frame_px: int = gaze.FRAME_PX,
    device: torch.device = CPU,
    workers: int = 0,
) -> tuple[Encoder, dict[str, float]]:
    """Train an encoder of a given shape. Return it, and its accuracy on frames of held-out digits by target.

    `each_step`: called with the number of steps done and the last step's loss. `workers`: number of processes that draw frames.
    """
    torch.manual_seed(settings.seed)
    encoder = build_encoder(VisionSettings(shape=shape, frame_px=frame_px)).to(device)
    return encoder, _train_probes(encoder, settings, each_step, workers)


def probe_accuracy(encoder: Encoder, settings: VisionTrainingSettings, workers: int = 0) -> dict[str, float]:
    """Return the accuracy by target of new linear heads on the frozen encoder: how much it still encodes after further training."""
    torch.manual_seed(settings.seed)
    probe = {"steps": PROBE_STEPS, "optimizer": OptimizerSettings(lr_vision=PROBE_RATE, warmup_steps=10)}
    return _train_probes(deepcopy(encoder).requires_grad_(False), settings.model_copy(update=probe), workers=workers)


def _train_probes(
    encoder: Encoder, settings: VisionTrainingSettings, each_step: Callable[[int, float], None] | None = None, workers: int = 0
) -> dict[str, float]:
    """Train linear heads, and the encoder if it is trainable. Return the accuracy on frames of held-out digits by target."""
    rng = np.random.default_rng(settings.seed)
    probes = _Probes(settings, encoder.config.hidden_size).to(encoder.cls_token.device)
    trained = [one for one in (*encoder.parameters(), *probes.parameters()) if one.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.optimizer.lr_vision, fused=True)
    make = partial(_frames, split="train", settings=settings, frame_px=encoder.image_px)
    for step, clip in enumerate(generate(make, repeat(settings.batch_frames, settings.steps), rng, workers)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rates(settings.optimizer, step, settings.steps)["vision"]
        loss = probes.loss(encoder, clip)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if each_step is not None:
            each_step(step + 1, loss.item())
    return probes.accuracy(encoder, _frames(rng, 256, split="val", settings=settings, frame_px=encoder.image_px))


def _frames(rng: np.random.Generator, frames: int, *, split: Split, settings: VisionTrainingSettings, frame_px: int) -> gaze.GazeClip:
    """Render frames with a digit or cross in every cell."""
    copies = settings.copies if split == "train" else 0
    task = "hunt" if settings.crosses else "cell"
    return gaze.render_to_fit(rng, split, frame_px, task=task, frames=frames, copies=copies, colours=settings.colours)


class _Probes(nn.Module):
    """Linear heads that predict the targets of every patch; discarded after training."""

    def __init__(self, settings: VisionTrainingSettings, width: int) -> None:
        super().__init__()
        self.targets = (*TARGETS, *([COLOUR] if settings.colours else []))
        self.of_output = nn.Linear(width, len(self.targets) * (CLASSES if settings.crosses else CLASSES - 1))
        self.of_values = nn.Linear(width, gaze.GRID**2) if settings.crosses else None
        """Predicts the cross's cell from the last layer's values, because queries receive nothing else from that layer's patches."""

    def loss(self, encoder: Encoder, clip: gaze.GazeClip) -> Tensor:
        """Mean cross-entropy of the targets, plus the weighted one of the cross's cell."""
        logits, of_cross = self(encoder, clip)
        answers, crosses = self._answers(encoder, clip)
        loss = F.cross_entropy(logits, answers, ignore_index=IGNORE)
        return loss if of_cross is None else loss + CROSS_WEIGHT * F.cross_entropy(of_cross, crosses)

    @torch.no_grad()
    def accuracy(self, encoder: Encoder, clip: gaze.GazeClip) -> dict[str, float]:
        """Accuracy by target."""
        logits, of_cross = self(encoder, clip)
        wanted, crosses = self._answers(encoder, clip)
        right = logits.argmax(1) == wanted
        found = {name: right[:, n][wanted[:, n] != IGNORE].float().mean().item() for n, name in enumerate(self.targets)}
        return found if of_cross is None else found | {CROSS: (of_cross.argmax(1) == crosses).float().mean().item()}

    def forward(self, encoder: Encoder, clip: gaze.GazeClip) -> tuple[Tensor, Tensor | None]:
        """Return logits [frames x patches, classes, targets] and, with crosses, those of the cross's cell [frames x patches, cells]."""
        device = encoder.cls_token.device
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            features = encoder.encode(torch.from_numpy(clip.frames).to(device), patches=True)
        assert features.patches is not None
        logits = self.of_output(features.patches[:, 1:].float()).unflatten(-1, (-1, len(self.targets))).flatten(0, 1)
        if self.of_values is None:
            return logits, None
        return logits, self.of_values(features.values[-1].transpose(1, 2).flatten(2)[:, 1:].float()).flatten(0, 1)

    def _answers(self, encoder: Encoder, clip: gaze.GazeClip) -> tuple[Tensor, Tensor]:
        """Return the targets int64 [frames x patches, targets], IGNORE beyond the edges, and the cross's cell int64 [frames x patches]."""
        digits = np.where(clip.digits == gaze.CROSS, CLASSES - 1, clip.digits)
        answers = np.full((*digits.shape, len(self.targets)), IGNORE)
        answers[..., 0] = digits
        answers[:, :, :-1, 1] = digits[:, :, 1:]
        answers[:, :-1, :, 2] = digits[:, 1:]
        if COLOUR in self.targets:
            answers[..., 3] = np.where(clip.digits == gaze.CROSS, IGNORE, clip.colours)
        cells, device = gaze.cells_of_patches(encoder.image_px // encoder.patch_px), encoder.cls_token.device
        of_patches = torch.from_numpy(answers[:, cells][:, :, cells]).flatten(0, 2)
        crosses = torch.from_numpy(clip.crosses).repeat_interleave(len(cells) ** 2)
        return of_patches.to(device), crosses.to(device)


if __name__ == "__main__":
    run_job(VisionJob, train_vision)
