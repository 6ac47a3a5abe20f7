"""The learning experiment of `benchmarks.foveation`: does a query learn where to open, if only full resolution can be read?

The worlds have G x G cells (`fvlm_core.data.cells_world`). The glance is the frame at a third of its side, or smaller with several levels
(`--zooms`). Training has three phases:

1. Pre-train the encoder at all resolutions.
2. Train with every patch open and weighted by p. Clutter rises as the loss falls.
3. Train with two chosen patches per query, Gumbel noise on the choice, and p distilled from the reader's own attention.

The evaluation on held-out digits compares glance only, ours with k = 1, 2, 4, an oracle that opens the right patch, and, trained for as
many steps, random openings and every patch open. "Right patch opened" refers to the patches of the glance.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fvlm_core.config import GlanceSettings, LLMSettings, LLMShape, LossSettings, ModelSettings, VisionSettings, VisionShape
from fvlm_core.data import cells_world
from fvlm_core.data.batch import IGNORE, PackedBatch, pack
from fvlm_core.data.cells_world import CHAT, World, vocabulary
from fvlm_core.data.gaze import CELL_PX
from fvlm_core.data.rows import Split
from fvlm_core.model.build import build_model
from fvlm_core.model.foveated import FoveatedVLM
from fvlm_core.model.glance import GlanceFeatures, downscale, most_likely, with_all_patches
from fvlm_core.model.inference import read_batch
from fvlm_core.model.names import Mode

ZOOM = 3
WIDTH, LAYERS, HEADS = 64, 2, 4
FRAMES, BATCH = 3, 64
PRETRAIN, WARMUP, LR = 900, 40, 2e-3
DIGITS, PLACES = 10, 3
"""Each patch is trained to name its own digit and those to its right and below, so that attention learns positions."""
SEES = 0.85
"""Accuracy of each of the three at which pre-training stops."""
LOSS = LossSettings(coarse=1.0, fine=[1.0, 1.0])
GATE, CLUTTER_STEP = 1.0, 0.03
"""Clutter rises by `CLUTTER_STEP` while the loss of the last pass, in nats per labelled token, is below `GATE`."""


@dataclass
class Run:
    """One seed on one grid: settings and model; logs a line every 20 steps."""

    grid: int
    seed: int
    say: Callable[[str], None] = print
    loss: LossSettings = LOSS
    gate: float = GATE
    zooms: Sequence[int] = (ZOOM,)
    """Zoom of each level. The side of the glance is the frame's divided by their product."""
    model: FoveatedVLM = field(init=False)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng([self.grid, self.seed])
        torch.manual_seed(self.seed)
        self.model = build_model(settings(self.grid, self.zooms), vocab_size=vocabulary(self.grid), seed=self.seed)
        start_positions(self.model, self.grid)

    def batch(self, split: Split, clips: int, clutter: float, rng: np.random.Generator | None = None) -> tuple[World, PackedBatch]:
        """Render and pack clips."""
        world = cells_world.render(rng or self.rng, split, grid=self.grid, clips=clips, frames=FRAMES, clutter=clutter)
        return world, pack(list(cells_world.samples(world)), CHAT)

    def use(self, **changes: object) -> None:
        """Change settings of the glance."""
        glance = self.model.settings.glance
        assert glance is not None
        self.model.settings = self.model.settings.model_copy(update={"glance": glance.model_copy(update=changes)})

    def pretrain(self, steps: int) -> None:
        """Pre-train the encoder, in place of DINOv2's own pre-training: digits on complete frames, and the presence of digits at each lower
        resolution."""
        encoder = self.model.encoder
        shrinks = [math.prod(self.zooms[level:]) for level in range(len(self.zooms))]
        fine, coarse = nn.Linear(WIDTH, PLACES * (DIGITS + 1)), nn.ModuleList(nn.Linear(WIDTH, times**2) for times in shrinks)
        parameters = [*encoder.parameters(), *fine.parameters(), *coarse.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=LR, betas=(0.9, 0.98), weight_decay=0.01)
        started = time.monotonic()
        for step in range(steps):
            schedule(optimizer, 1.5 * LR, step, None)
            world = cells_world.render(self.rng, "train", grid=self.grid, clips=12, frames=FRAMES, clutter=self.rng.uniform(0.5, 1))
            frames, digits = torch.from_numpy(world.frames).flatten(0, 1), torch.from_numpy(world.digits).flatten(0, 1)
            here = torch.where(digits < 0, DIGITS, digits)
            right, below = (F.pad(here, pad, value=IGNORE) for pad in ((0, 1), (0, 0, 0, 1)))
            targets = torch.stack([here, right[:, :, 1:], below[:, 1:]], -1).flatten(0, 2)
            seen = encoder.encode(frames, patches=True).patches
            assert seen is not None
            logits = fine(seen[:, 1:]).flatten(0, 1).unflatten(-1, (PLACES, -1))
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
            for head, times in zip(coarse, shrinks, strict=True):
                glimpsed = encoder.encode(downscale(frames, times), patches=True).patches
                assert glimpsed is not None
                loss = loss + F.binary_cross_entropy_with_logits(head(glimpsed[:, 1:]), tiles((digits >= 0).float(), times))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % 20 == 19:
                found = [(logits.argmax(-1) == targets)[:, n][targets[:, n] != IGNORE].float().mean().item() for n in range(PLACES)]
                said = " ".join(f"{share:.2f}" for share in found)
                self.say(f"pretrain {step + 1} loss {loss.item():.3f} own, right, below {said} ({time.monotonic() - started:.0f} s)")
                if min(found) > SEES:
                    break

    def train(self, steps: int, *, lr: float, clutter: float, until_full: int | None = None, decay: bool = True) -> tuple[float, int]:
        """Train with the current settings. With `until_full`, stop that many steps after clutter has reached 1.

        Returns the final clutter and the number of steps.
        """
        model, started = self.model.train(), time.monotonic()
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
        running, full, step = 2.0, 0, 0
        for step in range(steps):
            schedule(optimizer, lr, step, steps if decay else None)
            _, batch = self.batch("train", BATCH, clutter)
            losses = model(batch, self.loss)
            optimizer.zero_grad()
            (losses.objective / batch.n_labels).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            last = losses.sums[model.pass_names[-1]].item() / batch.n_labels
            running = 0.8 * running + 0.2 * last
            clutter = min(1.0, clutter + CLUTTER_STEP) if running < self.gate else clutter
            full += clutter >= 1.0
            if step % 20 == 19:
                self.say(f"train {step + 1} loss {running:.3f} clutter {clutter:.2f} ({time.monotonic() - started:.0f} s)")
            if until_full is not None and full >= until_full and running < self.gate:
                break
        model.eval()
        return clutter, step + 1

    @torch.no_grad()
    def accuracy(self, mode: Mode, *, everything: bool = False, opener: str = "ours", clips: int = 256) -> dict[str, float]:
        """Return the accuracy over all frames of clips with held-out digits, and the share of frames whose right patch was opened."""
        model, rng = self.model.eval(), np.random.default_rng([self.grid, 1])
        right = hits = total = opened = 0.0
        for _ in range(clips // BATCH):
            world, batch = self.batch("val", BATCH, 1.0, rng)
            wanted = [places.repeat_interleave(FRAMES) for places in self.parents(torch.from_numpy(world.cells))]
            model.chooser = {"ours": most_likely, "random": at_random, "oracle": partial(next_oracle, cycle(wanted))}[opener]
            features = model.encode(batch.frames)
            if everything:
                assert model.settings.glance is not None
                assert isinstance(features, GlanceFeatures)
                features = with_all_patches(model.encoder, features, model.settings.glance, model.connector.scale_embeddings)
            read = read_batch(model, batch, mode, features=features)
            said = model.llm.lm_head(read.hidden[torch.from_numpy(batch.labelled)]).argmax(-1)
            correct = (said == batch.labels[torch.from_numpy(batch.labelled)]).unflatten(0, (BATCH, FRAMES + 1))[:, :FRAMES]
            right, total = right + correct.sum().item(), total + correct.numel()
            if read.opened is not None:
                found = (read.opened[:, 0] == wanted[0][:, None]).any(1)
                hits, opened = hits + found.sum().item(), opened + len(found)
        model.chooser = most_likely
        return {"accuracy": right / total, "hit": hits / opened if opened else math.nan}

    def parents(self, cells: Tensor) -> Iterator[Tensor]:
        """Yield the patch to open at each level to read `cells` [B, 2]: int64 [B], a glance patch, then one of its children, ..."""
        columns = self.grid // math.prod(self.zooms)
        for level in range(len(self.zooms)):
            place = cells // math.prod(self.zooms[level:]) % columns
            yield place @ torch.tensor([columns, 1])
            columns = self.zooms[level]


def settings(grid: int, zooms: Sequence[int] = (ZOOM,)) -> ModelSettings:
    """Return the model settings: an encoder of 2 layers and width 64, a language model of 2 layers and width 96."""
    side = grid * CELL_PX
    return ModelSettings(
        vision=VisionSettings(shape=VisionShape(width=WIDTH, layers=LAYERS, heads=HEADS), frame_px=side),
        llm=LLMSettings(shape=LLMShape(width=96, layers=2, heads=4, kv_heads=4, mlp_width=256, context=64)),
        visual_scale=0.5,
        glance=GlanceSettings(px=side // math.prod(zooms), zoom=list(zooms), levels=len(zooms), open=2),
    )


@torch.no_grad()
def start_positions(model: FoveatedVLM, grid: int) -> None:
    """Initialize position embeddings and the question's tokens with the same sines and cosines, up to `grid` / 2 cycles per frame."""
    places = fourier((torch.arange(grid) + 0.5) / grid, grid)  # [G, 32]
    zero = torch.zeros_like(places)
    encoder, table = model.encoder, model.llm.model.embed_tokens.weight
    rows, columns = places[:, None].expand(-1, grid, -1), places[None].expand(grid, -1, -1)
    encoder.position_embeddings[0, 1:] = 2 * torch.cat([rows, columns], -1).flatten(0, 1)
    encoder.patches.weight *= 1 / 3  # otherwise patch content dominates the positions
    table *= 0.5 / table.std()
    first = cells_world.FIRST_PLACE
    table[first : first + grid, :WIDTH] = torch.cat([places, zero], -1) * 0.5
    table[first + grid :, :WIDTH] = torch.cat([zero, places], -1) * 0.5


def fourier(x: Tensor, grid: int) -> Tensor:
    """Fourier features of x [n] in 0..1: [n, WIDTH / 2], standard deviation 1."""
    frequencies = torch.linspace(0.5, grid / 2, WIDTH // 4)
    angles = 2 * math.pi * x[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], -1) * 2**0.5


def tiles(cells: Tensor, side: int) -> Tensor:
    """Group cells [F, G, G] by patches of `side` x `side` cells: [F, (G / side)^2, side^2]."""
    return cells.unflatten(1, (-1, side)).unflatten(3, (-1, side)).transpose(2, 3).flatten(3).flatten(1, 2)


def schedule(optimizer: torch.optim.Optimizer, lr: float, step: int, steps: int | None) -> None:
    """Set the learning rate: warm-up, then cosine decay to 5 %, or constant if `steps` is None."""
    rate = lr * min(1.0, (step + 1) / WARMUP)
    if steps is not None:
        rate *= 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps))
    for group in optimizer.param_groups:
        group["lr"] = rate


def at_random(log_p: Tensor, k: int) -> Tensor:
    """Choose k patches at random."""
    return torch.rand_like(log_p).topk(k).indices


def oracle(wanted: Tensor, log_p: Tensor, k: int) -> Tensor:
    """Choose the wanted patch and the likeliest others."""
    return log_p.scatter(1, wanted[:, None], math.inf).topk(k).indices


def next_oracle(wanted: Iterator[Tensor], log_p: Tensor, k: int) -> Tensor:
    """Call `oracle` with the wanted patch of the next level; levels are chosen in order."""
    return oracle(next(wanted), log_p, k)


def experiment(
    run: Run, out: Path, *, start: Path | None = None, pretrain: int = PRETRAIN, dense_steps: int = 500, chosen_steps: int = 100
) -> dict:
    """Train and compare as described at the top of this module. Writes weights and results to `out`."""
    out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    done: dict[str, Any] = {"grid": run.grid, "zooms": list(run.zooms), "seed": run.seed, "start": str(start) if start else None}
    dense_file = out / f"dense_{run.grid}_{run.seed}.pt"
    if dense_file.exists():
        run.model.load_state_dict(torch.load(dense_file))
    else:
        if start is not None:
            transfer(run.model, torch.load(start))
        run.pretrain(pretrain)
        run.use(train_on="all")
        clutter, done["dense_steps"] = run.train(dense_steps, lr=LR, clutter=0.0, until_full=60)
        done["clutter"] = clutter
        torch.save(run.model.state_dict(), dense_file)
    done["seconds_dense"] = time.monotonic() - started
    done["dense"] = run.accuracy("coarse_fine", everything=True)
    done["dense_autoregressive"] = run.accuracy("autoregressive", everything=True)
    run.use(open=1)
    done["dense_read_at_1"] = run.accuracy("coarse_fine")
    run.say(json.dumps(done))
    state = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    run.use(train_on="chosen", open=2)
    run.train(chosen_steps, lr=LR / 2, clutter=1.0)
    torch.save(run.model.state_dict(), out / f"chosen_{run.grid}_{run.seed}.pt")
    done["glance_only"] = run.accuracy("coarse_only")
    for k in (1, 2, 4):
        run.use(open=k)
        done[f"k{k}"] = run.accuracy("coarse_fine")
        done[f"k{k}_autoregressive"] = run.accuracy("autoregressive")
        done[f"oracle{k}"] = run.accuracy("coarse_fine", opener="oracle")
    run.use(open=2)
    done["random2_untrained"] = run.accuracy("coarse_fine", opener="random")
    run.say(json.dumps(done))
    run.model.load_state_dict(state)
    run.model.chooser = at_random
    run.train(chosen_steps, lr=LR / 2, clutter=1.0)
    for k in (1, 2):
        run.use(open=k)
        done[f"random{k}"] = run.accuracy("coarse_fine", opener="random")
    run.use(open=2)
    run.model.load_state_dict(state)
    run.model.chooser = most_likely
    run.use(train_on="all")
    run.train(chosen_steps, lr=LR / 2, clutter=1.0)
    done["dense_as_long"] = run.accuracy("coarse_fine", everything=True)
    done["seconds"] = time.monotonic() - started
    (out / f"world_{run.grid}_{run.seed}.json").write_text(json.dumps(done, indent=1))
    run.say(json.dumps(done))
    return done


def transfer(model: FoveatedVLM, state: dict[str, Tensor]) -> None:
    """Load the weights of a smaller world's model. Parameters that depend on the grid (positions, the question's tokens) keep their
    initial values."""
    own = model.state_dict()
    model.load_state_dict({name: tensor for name, tensor in state.items() if own[name].shape == tensor.shape}, strict=False)
    first = cells_world.FIRST_PLACE
    own["llm.model.embed_tokens.weight"][:first] = state["llm.model.embed_tokens.weight"][:first]


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--grid", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--zooms", type=int, nargs="+", default=[ZOOM], help="zoom of each level, the glance's first")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start", type=Path)
    parser.add_argument("--pretrain", type=int, default=PRETRAIN)
    parser.add_argument("--dense", type=int, default=500)
    parser.add_argument("--chosen", type=int, default=100)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    run = Run(chosen.grid, chosen.seed, say=lambda text: print(text, flush=True), zooms=chosen.zooms)
    experiment(run, chosen.out, dense_steps=chosen.dense, chosen_steps=chosen.chosen, start=chosen.start, pretrain=chosen.pretrain)
