"""The foveated model: a language model that says where to look, an encoder that is looked at, one token per frame.

Training runs P passes over a packed batch whose frames are encoded once: the coarse pass (every frame read with
`q_static`), then each fine pass, whose queries come from the hidden states of the pass before (frame t's from the token of
frame t-1). Every pass can carry a loss; a pass runs only over the tokens that its loss or the next pass's queries need.
Text-only samples are the same in all passes and run once. How a model is made, loaded and saved: `fvlm_core.model.build`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fvlm_core.config import LossSettings, ModelSettings
from fvlm_core.data.batch import PackedBatch
from fvlm_core.model.attention import PackedLayout, send
from fvlm_core.model.casts import Casts
from fvlm_core.model.connector import RANDOM_QUERIES, Connector
from fvlm_core.model.encoder import Encoder, FrameFeatures
from fvlm_core.model.glance import Chooser, GlanceFeatures, foveate, likeliest, look, with_everything
from fvlm_core.model.llama import LayerWeights, Llama
from fvlm_core.model.names import MODES, Mode, Role

_QUERY_PARAMETERS = {"q_static", "q_init", "q_slot"}
_POSITION_PARAMETERS = {"cls_token", "position_embeddings", "scale_embeddings"}


@dataclass(frozen=True)
class PassLosses:
    """What the training forward returns."""

    objective: Tensor
    """Scalar: the passes' sums of cross-entropy, weighted (weights add up to 1). Divide by the labels of the global batch."""
    sums: dict[str, Tensor]
    """Per pass (`coarse`, `fine1`, ...) the sum of cross-entropy over labelled positions, detached; weightless ones are left out.
    By sample: one sum for each, [N], with its gradient."""
    entropy: Tensor
    """Mean entropy of the last pass's attention over a frame, in nats; 0 without frames."""


@dataclass(frozen=True)
class Read:
    """What the shown frames became: V frames of k tokens."""

    tokens: Tensor
    """[V, k, llm width]."""
    weights: Tensor | None
    """Attention of the last layer, [V, heads, k, N], where asked for; None for pooled patches. With a glance, N is the glance's."""
    opened: Tensor | None = None
    """int64 [V, k, open]: the glance patches that each query opened, where it did."""
    selection_loss: Tensor | None = None
    """Scalar: sum over queries of what teaches the glance where they looked, when training on chosen patches."""


class FoveatedVLM(nn.Module):
    """Encoder, connector and language model. Build with `build_model` or `load_model`."""

    def __init__(self, settings: ModelSettings, encoder: Encoder, llm: Llama) -> None:
        super().__init__()
        self.settings = settings
        self.encoder = encoder
        self.llm = llm
        self.chooser: Chooser = likeliest
        """Which patches a query opens, with a glance; another one for controls."""
        self.cross_entropy = CrossEntropy()
        self.casts = Casts()
        self.connector = Connector(settings, encoder.config.hidden_size, encoder.config.num_attention_heads, llm.config.hidden_size)

    # the parts that the three modes share

    @property
    def modes(self) -> tuple[Mode, ...]:
        """The modes this model has: pooled patches are not queried, so only coarse."""
        return ("coarse_only",) if self.settings.query == "pooled" else MODES

    @property
    def gaze_px(self) -> int:
        """Side of the squares of a frame that attention maps are over: the patches, or those of the glance."""
        return self.encoder.patch_px * (1 if self.settings.glance is None else self.settings.glance.shrink)

    def encode(self, frames: Tensor) -> FrameFeatures:
        """Encode frames uint8 [F, H, W, 3]; with a glance, their glance, and the rest too where training reads all of it."""
        if self.settings.glance is not None:
            small = look(self.encoder, frames, self.settings.glance)
            if not self.training or self.settings.glance.train_on == "chosen":
                return small
            return with_everything(self.encoder, small, self.settings.glance, self.connector.scale_embeddings)
        passes = len(self.pass_names) if self.settings.query in ("deep", "random") and torch.is_grad_enabled() else 0
        queries = None
        if passes and self.encoder.has_tickets and self.settings.query == "deep" and self.connector.temperature == 1.0:
            queries = self.connector.query_input_proj(self.connector.q_static).expand(len(frames), -1, -1)
        features = self.encoder.encode(
            frames,
            patches=self.settings.query in ("pooled", "shallow"),
            passes=passes,
            queries=queries,
            weights=self.encoder.cast(self.casts),
        )
        return features if self.connector.shallow is None else self.connector.shallow.keys_values(features)

    def read_coarse(self, features: FrameFeatures, batch: PackedBatch, *, weights: bool = False, number: int | None = None) -> Read:
        """Tokens of every shown frame, read with `q_static` (or pooled): a frame shown often is read once. `number` as in `read`."""
        if self.settings.query == "pooled":
            pooled = self._pool(features)
            return Read(self.connector.tokens(pooled, pooled)[batch.shown_frames], None)
        n_frames = len(features.keys[0])
        queries = self.connector.q_static.expand(n_frames, -1, -1)
        if features.read is not None and not weights:
            return Read(self.connector.tokens(features.read, queries).index_select(0, batch.shown_frames), None)
        read = self.read(features, queries, weights=weights, opening=False, number=number)
        attended = None if read.weights is None else read.weights.index_select(0, batch.shown_frames)
        return Read(read.tokens.index_select(0, batch.shown_frames), attended)

    def read_fine(
        self, features: FrameFeatures, queries: Tensor, batch: PackedBatch, *, weights: bool = False, number: int | None = None
    ) -> Read:
        """Tokens of every shown frame, each read with its own queries [V, k, D]; `number` as in `read`."""
        k = self.settings.tokens_per_frame
        tokens, attended, places, opened, losses = [], [], [], [], []
        for group in batch.showings:
            times = group.shown.shape[1]
            picked = queries[group.shown.flatten()].unflatten(0, (-1, times)).flatten(1, 2)  # [f, m * k, D]
            part = features if len(group.frames) == len(features.keys[0]) else features.select(group.frames)
            read = self.read(part, picked, weights=weights, number=number)
            tokens.append(read.tokens.unflatten(1, (times, k)).flatten(0, 1))
            if read.weights is not None:
                attended.append(read.weights.unflatten(2, (times, k)).transpose(1, 2).flatten(0, 1))
            if read.opened is not None:
                opened.append(read.opened.unflatten(1, (times, k)).flatten(0, 1))
            if read.selection_loss is not None:
                losses.append(read.selection_loss)
            places.append(group.shown.flatten())
        order = torch.cat(places).argsort()
        return Read(
            torch.cat(tokens)[order],
            torch.cat(attended)[order] if attended else None,
            torch.cat(opened)[order] if opened else None,
            torch.stack(losses).sum() if losses else None,
        )

    def read(
        self, features: FrameFeatures, queries: Tensor, *, weights: bool = False, opening: bool = True, number: int | None = None
    ) -> Read:
        """Read f frames with queries [f, Q, D] -> tokens [f, Q, llm width], and weights [f, heads, Q, N] where asked for.

        `opening`: with a glance, patches are opened; without, only the glance is read. `number`: of the training
        pass, each of which reads a frame once.
        """
        projected = self.connector.query_input_proj(queries)
        temperature = self.connector.temperature
        if opening and isinstance(features, GlanceFeatures):
            return self._open(features, queries, projected, weights=weights)
        if self.connector.shallow is not None:
            read = self.connector.shallow(features, projected, temperature)
            attended = self.connector.shallow.attention(features, projected, temperature) if weights else None
        else:
            read, entering = self.encoder.query(features, projected, temperature, number)
            attended = self.encoder.attention(features, entering, temperature) if weights else None
        return Read(self.connector.tokens(read, queries), attended)

    def queries(self, hidden: Tensor, batch: PackedBatch) -> Tensor:
        """Queries [V, k, D] of every shown frame, given the hidden states [S, llm width] of the pass before."""
        if self.settings.query == "random":
            return self.connector.random_queries[batch.position_ids[batch.visual_positions[:, 0]] % RANDOM_QUERIES]
        made = self.connector.next_queries(hidden[batch.query_sources.clamp(min=0)])
        return torch.where((batch.query_sources >= 0)[..., None], made, self.connector.q_init.to(made.dtype))

    def embed(self, input_ids: Tensor) -> Tensor:
        """Text embeddings [S, llm width]."""
        return self.llm.model.embed_tokens(input_ids)

    def contextualise(
        self, embeddings: Tensor, position_ids: Tensor, layout: PackedLayout, weights: list[LayerWeights] | None = None
    ) -> Tensor:
        """The language model's last hidden states [S, llm width] of packed embeddings [S, llm width]; `weights` as in `Llama.forward`."""
        hidden = self.llm(embeddings, position_ids, layout, weights)
        if layout.cache is not None:
            layout.cache.advance(layout)
        return hidden

    # training

    def forward(self, batch: PackedBatch, loss: LossSettings, *, by_sample: bool = False) -> PassLosses:
        """The training passes of one micro-batch; a micro-batch without frames or without labels is fine.

        `by_sample` returns every sample's own sums, for losses that are not linear in them.
        """
        sample_of = None
        if by_sample:
            sample_of = send(torch.from_numpy(np.arange(batch.n_samples).repeat(batch.lengths)), batch.input_ids.device)
        weights = dict(zip(self.pass_names, [loss.coarse, *loss.fine], strict=True))
        total_weight = sum(weights.values())
        visual = [n for n, count in enumerate(batch.shown_counts) if count]
        cast, text_embeddings = self.llm.cast(self.casts), self.embed(batch.input_ids)
        of_layers, head = (None, self.llm.lm_head.weight) if cast is None else cast
        features = self.encode(batch.frames) if visual else None
        objective = text_embeddings.new_zeros((), dtype=torch.float32)
        sums: dict[str, Tensor] = {}
        text_sum = objective.detach() if sample_of is None else objective.detach().expand(batch.n_samples)
        hidden, entropy = text_embeddings, objective.detach()
        text_only = [n for n, count in enumerate(batch.shown_counts) if not count and batch.label_prefix[n]]
        if text_only:
            kept = _Kept.of(batch, {n: batch.label_prefix[n] for n in text_only})
            states = self.contextualise(text_embeddings[kept.index], batch.position_ids[kept.index], kept.layout, of_layers)
            text_sum = self._cross_entropy(states, head, batch, kept, sample_of)
            objective = objective + text_sum.sum()  # equal in every pass, and the weights add up to 1
        for number, (name, weight) in enumerate(weights.items()):
            last = number == len(weights) - 1
            # random queries depend on no pass before theirs
            if features is None or not (weight or last or self.settings.query != "random"):
                continue
            if number == 0:
                read = self.read_coarse(features, batch, weights=last, number=number)
            else:
                read = self.read_fine(features, self.queries(hidden, batch), batch, weights=last, number=number)
            needed = {n: max(0 if last else batch.query_prefix[n], batch.label_prefix[n] if weight else 0) for n in visual}
            kept = _Kept.of(batch, {n: length for n, length in needed.items() if length})
            visual_tokens = read.tokens.flatten(0, 1).to(text_embeddings.dtype)
            embeddings = text_embeddings.index_copy(0, batch.visual_positions.flatten(), visual_tokens)[kept.index]
            states = embeddings
            if len(embeddings):
                states = self.contextualise(embeddings, batch.position_ids[kept.index], kept.layout, of_layers)
            hidden = torch.zeros_like(text_embeddings, dtype=states.dtype).index_copy(0, kept.index, states)
            if weight:
                sums[name] = self._cross_entropy(states, head, batch, kept, sample_of)
                objective = objective + sums[name].sum() * (weight / total_weight)
            if weight and read.selection_loss is not None and self.settings.glance is not None:
                objective = objective + read.selection_loss.float() * (self.settings.glance.distill * weight / total_weight)
            if read.weights is not None:
                entropy = _entropy(read.weights)
        reported = {name: sums.get(name, 0.0) + text_sum for name, weight in weights.items() if weight}
        if not by_sample:
            reported = {name: total.detach() for name, total in reported.items()}
        return PassLosses(self._touch(objective, batch), reported, entropy)

    @property
    def pass_names(self) -> list[str]:
        """`coarse`, `fine1`, `fine2`, ..."""
        return ["coarse", *(f"fine{n + 1}" for n in range(self.settings.fine_iterations))]

    def logits_losses(self, hidden: Tensor, batch: PackedBatch) -> Tensor:
        """Cross-entropy [n labelled] fp32 of a batch's hidden states [S, D] at their labelled positions, in order."""
        kept = send(torch.from_numpy(batch.labelled), hidden.device)
        logits = F.linear(hidden[kept].float(), self.llm.lm_head.weight.float())
        return F.cross_entropy(logits, batch.labels[kept], reduction="none")

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        """Recompute activations layer by layer in the backward pass."""
        self.encoder.gradient_checkpointing = enabled
        self.llm.model.gradient_checkpointing = enabled

    # parameters

    def role(self, name: str) -> Role:
        """The learning-rate group of a parameter."""
        return {"encoder": "vision", "connector": "connector", "llm": "llm"}[name.split(".", 1)[0]]

    def no_decay(self, name: str) -> bool:
        """Whether weight decay leaves a parameter alone: norms, biases, layer scales, queries, positions."""
        leaf = name.rsplit(".", 1)[-1]
        return self.get_parameter(name).ndim < 2 or leaf in _QUERY_PARAMETERS | _POSITION_PARAMETERS

    def weights(self, gather: Callable[[Tensor], Tensor] = Tensor.detach) -> dict[str, Tensor]:
        """The state dict on CPU, contiguous, without the output embedding where it is tied.

        `gather` makes complete tensors of those of the state dict, where ranks hold parts.
        """
        state = {name: gather(tensor).cpu().contiguous() for name, tensor in self.state_dict().items()}
        if self.llm.config.tie_word_embeddings:
            del state["llm.lm_head.weight"]
        return state

    # the rest is detail

    def _open(self, features: GlanceFeatures, queries: Tensor, projected: Tensor, *, weights: bool) -> Read:
        """`read` with patches opened; training explores and teaches the glance."""
        chosen = self.settings.glance
        assert chosen is not None
        choosing = self.training and chosen.train_on == "chosen"
        found = foveate(
            self.encoder,
            features,
            projected,
            chosen,
            self.connector.scale_embeddings,
            self.connector.temperature,
            chooser=self.chooser,
            explore=chosen.explore if choosing else 0.0,
            weights=weights,
            teach=choosing and chosen.distill > 0,
        )
        return Read(self.connector.tokens(found.read, queries), found.weights, found.opened, found.selection_loss)

    def _pool(self, features: FrameFeatures) -> Tensor:
        """Average-pooled patches [F, k, D]."""
        assert features.patches is not None
        side = int(self.settings.tokens_per_frame**0.5)
        square = features.patches[:, 1:].transpose(1, 2).unflatten(2, features.grid)
        return F.adaptive_avg_pool2d(square, side).flatten(2).transpose(1, 2)

    def _cross_entropy(self, hidden: Tensor, weight: Tensor, batch: PackedBatch, kept: "_Kept", sample_of: Tensor | None) -> Tensor:
        """Sum of cross-entropy over the labelled positions of hidden states [s, D]: logits of the others are not made.

        `weight`: the output layer's. The states are those of `kept`. With `sample_of` [S], the sample of every position, it is a sum per
        sample, [N].
        """
        if not kept.n_labels:
            none = hidden.sum() * 0.0
            return none if sample_of is None else none.expand(batch.n_samples)
        dtype = torch.get_autocast_dtype(hidden.device.type) if torch.is_autocast_enabled(hidden.device.type) else weight.dtype
        targets = batch.labels[kept.labelled]
        states = hidden[kept.rows].to(dtype)
        if sample_of is None:
            return self.cross_entropy(states, weight.to(dtype), targets, "sum").float()
        losses = self.cross_entropy(states, weight.to(dtype), targets, "none").float()
        return torch.zeros(batch.n_samples, device=hidden.device).index_add(0, sample_of[kept.labelled], losses)

    def _touch(self, objective: Tensor, batch: PackedBatch) -> Tensor:
        """Give parameters a batch does not use (no frames, no labels, no `q_init`) a zero gradient: DDP waits for them all."""
        unused: list[nn.Module] = [self.connector]
        unused += [self.encoder] if not len(batch.frames) else []
        unused += [self.llm] if not any(batch.label_prefix) else []
        for parameter in (p for module in unused for p in module.parameters() if p.requires_grad):
            objective = objective + parameter.sum().float() * 0.0
        return objective


class CrossEntropy(nn.Module):
    """Output layer and loss as a module, so that they are compiled together: logits are then read twice instead of eleven times."""

    def forward(self, states: Tensor, weight: Tensor, targets: Tensor, reduction: str) -> Tensor:
        """Of states [n, D] and output weights [vocabulary, D], against targets int64 [n]; reduced to a sum, or [n]."""
        return F.cross_entropy(F.linear(states, weight), targets, reduction=reduction)


@dataclass(frozen=True)
class _Kept:
    """The positions of a packed batch that a pass runs over: the first tokens of some samples."""

    index: Tensor
    layout: PackedLayout
    n_labels: int
    labelled: Tensor
    """int64 [n_labels]: those of them with a label, as positions in the batch."""
    rows: Tensor
    """int64 [n_labels]: the same, counted among the kept ones."""

    @classmethod
    def of(cls, batch: PackedBatch, lengths: dict[int, int]) -> "_Kept":
        starts, layout = PackedLayout(batch.lengths).offsets, PackedLayout(list(lengths.values()))
        index, labelled, rows = [], [], []
        for (n, length), offset in zip(lengths.items(), layout.offsets, strict=False):
            first, last = np.searchsorted(batch.labelled, (starts[n], starts[n] + length))
            index.append(np.arange(starts[n], starts[n] + length))
            labelled.append(batch.labelled[first:last])
            rows.append(batch.labelled[first:last] - starts[n] + offset)
        none = np.zeros(0, np.int64)
        parts = [torch.from_numpy(np.concatenate([none, *part])) for part in (index, labelled, rows)]
        sent = [send(part, batch.input_ids.device) for part in parts]
        return cls(sent[0], layout, len(parts[1]), sent[1], sent[2])


def _entropy(weights: Tensor) -> Tensor:
    """Mean entropy in nats of attention weights [..., N]."""
    return torch.special.entr(weights).sum(-1).mean()
