"""The foveated model: the language model predicts a query per frame, and the encoder answers it with one or a few tokens.

Training encodes the frames of a packed batch once and runs several passes over it: the coarse pass, which reads every frame with the
learned static query `q_static`, then the fine passes, whose queries are predicted from the hidden states of the previous pass (those of
frame t from the token of frame t-1). Each pass may have a loss, and only runs over the tokens that its loss or the next pass's queries
depend on. Text-only samples are equal in all passes and run once. See `fvlm_core.model.build` for building, loading and saving models.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fvlm_core.config import LossSettings, ModelSettings
from fvlm_core.data.batch import PackedBatch
from fvlm_core.model.attention import PackedLayout, to_device_async
from fvlm_core.model.casts import Casts
from fvlm_core.model.connector import RANDOM_QUERIES, Connector
from fvlm_core.model.encoder import Encoder, FrameFeatures
from fvlm_core.model.glance import Chooser, GlanceFeatures, encode_glance, most_likely, read_with_glance, with_all_patches
from fvlm_core.model.llama import LayerWeights, Llama
from fvlm_core.model.names import MODES, Mode, Role

_QUERY_PARAMETERS = {"q_static", "q_init", "q_slot"}
_POSITION_PARAMETERS = {"cls_token", "position_embeddings", "scale_embeddings"}


@dataclass(frozen=True)
class PassLosses:
    """Losses of a micro-batch, returned by `FoveatedVLM.forward`."""

    objective: Tensor
    """Scalar: weighted sum of the passes' summed cross-entropies (weights normalised to add up to 1), plus the weighted selection loss if
    there is one. Divide it by the number of labels in the global batch."""
    sums: dict[str, Tensor]
    """Per pass (`coarse`, `fine1`, ...) the summed cross-entropy over labelled positions, detached; passes of weight 0 are omitted.
    With `by_sample`: one sum per sample, [N], with gradients."""
    entropy: Tensor
    """Mean entropy, in nats, of the last pass's attention over a frame; 0 without frames."""


@dataclass(frozen=True)
class Read:
    """Result of reading V shown frames as k tokens each."""

    tokens: Tensor
    """[V, k, llm width]."""
    weights: Tensor | None
    """Attention weights of the last layer, [V, heads, k, N], if requested; None for pooled patches. With a glance, N counts its tokens."""
    opened: Tensor | None = None
    """int64 [V, k, open]: the glance patches that each query opened; None if none were chosen."""
    selection_loss: Tensor | None = None
    """Scalar: summed over queries, the loss that distils the queries' attention to opened patches into p (`GlanceRead.selection_loss`)."""


class FoveatedVLM(nn.Module):
    """Encoder, connector and language model. Create with `build_model` or `load_model`."""

    def __init__(self, settings: ModelSettings, encoder: Encoder, llm: Llama) -> None:
        super().__init__()
        self.settings = settings
        self.encoder = encoder
        self.llm = llm
        self.chooser: Chooser = most_likely
        """With a glance: chooses the patches that a query opens. Replaced in control experiments."""
        self.cross_entropy = CrossEntropy()
        self.casts = Casts()
        self.connector = Connector(settings, encoder.config.hidden_size, encoder.config.num_attention_heads, llm.config.hidden_size)

    # shared by the three inference modes and training

    @property
    def modes(self) -> tuple[Mode, ...]:
        """The inference modes that this model supports. Pooled patches are not queried, so only `coarse_only` applies to them."""
        return ("coarse_only",) if self.settings.query == "pooled" else MODES

    @property
    def gaze_px(self) -> int:
        """Pixels per side of one cell of an attention map: an encoder patch, or the part of the frame under a glance patch."""
        return self.encoder.patch_px * (1 if self.settings.glance is None else self.settings.glance.shrink)

    def encode(self, frames: Tensor) -> FrameFeatures:
        """Encode frames uint8 [F, H, W, 3]. With a glance, encode only that; in training with `train_on: all`, also all other patches."""
        if self.settings.glance is not None:
            small = encode_glance(self.encoder, frames, self.settings.glance)
            if not self.training or self.settings.glance.train_on == "chosen":
                return small
            return with_all_patches(self.encoder, small, self.settings.glance, self.connector.scale_embeddings)
        passes = len(self.pass_names) if self.settings.query in ("deep", "random") and torch.is_grad_enabled() else 0
        queries = None
        if passes and self.encoder.factored_gradients and self.settings.query == "deep" and self.connector.temperature == 1.0:
            queries = self.connector.query_input_proj(self.connector.q_static).expand(len(frames), -1, -1)
        features = self.encoder.encode(
            frames,
            patches=self.settings.query in ("pooled", "shallow"),
            passes=passes,
            queries=queries,
            weights=self.encoder.cast(self.casts),
        )
        return features if self.connector.shallow is None else self.connector.shallow.keys_values(features)

    def read_coarse(self, features: FrameFeatures, batch: PackedBatch, *, weights: bool = False, pass_index: int | None = None) -> Read:
        """Read every shown frame with `q_static` (or pool its patches). A repeated frame is read once. `pass_index` as in `read`."""
        if self.settings.query == "pooled":
            pooled = self._pool(features)
            return Read(self.connector.tokens(pooled, pooled)[batch.shown_frames], None)
        n_frames = len(features.keys[0])
        queries = self.connector.q_static.expand(n_frames, -1, -1)
        if features.read is not None and not weights:
            return Read(self.connector.tokens(features.read, queries).index_select(0, batch.shown_frames), None)
        read = self.read(features, queries, weights=weights, opening=False, pass_index=pass_index)
        attended = None if read.weights is None else read.weights.index_select(0, batch.shown_frames)
        return Read(read.tokens.index_select(0, batch.shown_frames), attended)

    def read_fine(
        self, features: FrameFeatures, queries: Tensor, batch: PackedBatch, *, weights: bool = False, pass_index: int | None = None
    ) -> Read:
        """Read every shown frame with its own queries [V, k, D]. `pass_index` as in `read`."""
        k = self.settings.tokens_per_frame
        tokens, attended, places, opened, losses = [], [], [], [], []
        for group in batch.showings:
            times = group.shown.shape[1]
            picked = queries[group.shown.flatten()].unflatten(0, (-1, times)).flatten(1, 2)  # [f, m * k, D]
            part = features if len(group.frames) == len(features.keys[0]) else features.select(group.frames)
            read = self.read(part, picked, weights=weights, pass_index=pass_index)
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
        self, features: FrameFeatures, queries: Tensor, *, weights: bool = False, opening: bool = True, pass_index: int | None = None
    ) -> Read:
        """Read f frames with queries [f, Q, D] -> tokens [f, Q, llm width] and, with `weights`, attention weights [f, heads, Q, N].

        `opening`: for a model with a glance, whether queries open patches or only read the glance. `pass_index`: index of the training
        pass, as in `Encoder.query`.
        """
        projected = self.connector.query_input_proj(queries)
        temperature = self.connector.temperature
        if opening and isinstance(features, GlanceFeatures):
            return self._open(features, queries, projected, weights=weights)
        if self.connector.shallow is not None:
            read = self.connector.shallow(features, projected, temperature)
            attended = self.connector.shallow.attention(features, projected, temperature) if weights else None
        else:
            read, entering = self.encoder.query(features, projected, temperature, pass_index)
            attended = self.encoder.attention(features, entering, temperature) if weights else None
        return Read(self.connector.tokens(read, queries), attended)

    def queries(self, hidden: Tensor, batch: PackedBatch) -> Tensor:
        """Predict queries [V, k, D] of every shown frame from the previous pass's hidden states [S, llm width]."""
        if self.settings.query == "random":
            return self.connector.random_queries[batch.position_ids[batch.visual_positions[:, 0]] % RANDOM_QUERIES]
        made = self.connector.next_queries(hidden[batch.query_sources.clamp(min=0)])
        return torch.where((batch.query_sources >= 0)[..., None], made, self.connector.q_init.to(made.dtype))

    def embed(self, input_ids: Tensor) -> Tensor:
        """Text embeddings [S, llm width]."""
        return self.llm.model.embed_tokens(input_ids)

    def run_llm(self, embeddings: Tensor, position_ids: Tensor, layout: PackedLayout, weights: list[LayerWeights] | None = None) -> Tensor:
        """Run the language model: packed embeddings [S, llm width] -> last hidden states [S, llm width]. Advances the layout's cache.

        `weights` as in `Llama.forward`.
        """
        hidden = self.llm(embeddings, position_ids, layout, weights)
        if layout.cache is not None:
            layout.cache.advance(layout)
        return hidden

    # training

    def forward(self, batch: PackedBatch, loss: LossSettings, *, by_sample: bool = False) -> PassLosses:
        """Run the training passes on a micro-batch, which may have no frames or no labels.

        `by_sample`: return a differentiable sum per sample in `PassLosses.sums`, for losses that are not linear in them (DPO).
        """
        sample_of = None
        if by_sample:
            sample_of = to_device_async(torch.from_numpy(np.arange(batch.n_samples).repeat(batch.lengths)), batch.input_ids.device)
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
            kept = _PassPositions.of(batch, {n: batch.label_prefix[n] for n in text_only})
            states = self.run_llm(text_embeddings[kept.index], batch.position_ids[kept.index], kept.layout, of_layers)
            text_sum = self._cross_entropy(states, head, batch, kept, sample_of)
            objective = objective + text_sum.sum()  # equal in every pass, and the weights add up to 1
        for number, (name, weight) in enumerate(weights.items()):
            last = number == len(weights) - 1
            # random queries do not depend on an earlier pass
            if features is None or not (weight or last or self.settings.query != "random"):
                continue
            if number == 0:
                read = self.read_coarse(features, batch, weights=last, pass_index=number)
            else:
                read = self.read_fine(features, self.queries(hidden, batch), batch, weights=last, pass_index=number)
            needed = {n: max(0 if last else batch.query_prefix[n], batch.label_prefix[n] if weight else 0) for n in visual}
            kept = _PassPositions.of(batch, {n: length for n, length in needed.items() if length})
            visual_tokens = read.tokens.flatten(0, 1).to(text_embeddings.dtype)
            embeddings = text_embeddings.index_copy(0, batch.visual_positions.flatten(), visual_tokens)[kept.index]
            states = embeddings
            if len(embeddings):
                states = self.run_llm(embeddings, batch.position_ids[kept.index], kept.layout, of_layers)
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
        return PassLosses(self._add_zero_gradients(objective, batch), reported, entropy)

    @property
    def pass_names(self) -> list[str]:
        """`coarse`, `fine1`, `fine2`, ..."""
        return ["coarse", *(f"fine{n + 1}" for n in range(self.settings.fine_iterations))]

    def label_losses(self, hidden: Tensor, batch: PackedBatch) -> Tensor:
        """Cross-entropy [n labelled], fp32, at the labelled positions of a batch, in order, from its hidden states [S, D]."""
        kept = to_device_async(torch.from_numpy(batch.labelled), hidden.device)
        logits = F.linear(hidden[kept].float(), self.llm.lm_head.weight.float())
        return F.cross_entropy(logits, batch.labels[kept], reduction="none")

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        """Enable or disable gradient checkpointing: recompute the activations of each layer in the backward pass."""
        self.encoder.gradient_checkpointing = enabled
        self.llm.model.gradient_checkpointing = enabled

    # parameters

    def role(self, name: str) -> Role:
        """The learning-rate group of a parameter."""
        return {"encoder": "vision", "connector": "connector", "llm": "llm"}[name.split(".", 1)[0]]

    def no_decay(self, name: str) -> bool:
        """Whether a parameter is excluded from weight decay: norms, biases, layer scales, queries, position embeddings."""
        leaf = name.rsplit(".", 1)[-1]
        return self.get_parameter(name).ndim < 2 or leaf in _QUERY_PARAMETERS | _POSITION_PARAMETERS

    def weights(self, gather: Callable[[Tensor], Tensor] = Tensor.detach) -> dict[str, Tensor]:
        """Return the state dict on CPU, contiguous, without a tied output embedding.

        `gather` turns each tensor into a complete one if ranks hold shards.
        """
        state = {name: gather(tensor).cpu().contiguous() for name, tensor in self.state_dict().items()}
        if self.llm.config.tie_word_embeddings:
            del state["llm.lm_head.weight"]
        return state

    # implementation details

    def _open(self, features: GlanceFeatures, queries: Tensor, projected: Tensor, *, weights: bool) -> Read:
        """`read` with opened patches. When training on chosen patches, add exploration noise and compute the selection loss."""
        chosen = self.settings.glance
        assert chosen is not None
        choosing = self.training and chosen.train_on == "chosen"
        found = read_with_glance(
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
        """Average-pool the patches of each frame to [F, k, D]."""
        assert features.patches is not None
        side = int(self.settings.tokens_per_frame**0.5)
        square = features.patches[:, 1:].transpose(1, 2).unflatten(2, features.grid)
        return F.adaptive_avg_pool2d(square, side).flatten(2).transpose(1, 2)

    def _cross_entropy(
        self, hidden: Tensor, weight: Tensor, batch: PackedBatch, kept: "_PassPositions", sample_of: Tensor | None
    ) -> Tensor:
        """Sum of the cross-entropy over labelled positions, from the hidden states [s, D] of `kept`. Other positions get no logits.

        `weight`: output layer weight. `sample_of` [S]: the sample of every position; if given, return one sum per sample, [N].
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

    def _add_zero_gradients(self, objective: Tensor, batch: PackedBatch) -> Tensor:
        """Give parameters that this batch does not use (no frames, labels or `q_init`) a zero gradient: DDP waits for all gradients."""
        unused: list[nn.Module] = [self.connector]
        unused += [self.encoder] if not len(batch.frames) else []
        unused += [self.llm] if not any(batch.label_prefix) else []
        for parameter in (p for module in unused for p in module.parameters() if p.requires_grad):
            objective = objective + parameter.sum().float() * 0.0
        return objective


class CrossEntropy(nn.Module):
    """Output layer and loss in one module, so that they are compiled together: logits are then read twice instead of eleven times."""

    def forward(self, states: Tensor, weight: Tensor, targets: Tensor, reduction: str) -> Tensor:
        """Hidden states [n, D], output weight [vocabulary, D], targets int64 [n] -> a scalar or, with reduction "none", [n]."""
        return F.cross_entropy(F.linear(states, weight), targets, reduction=reduction)


@dataclass(frozen=True)
class _PassPositions:
    """The positions of a packed batch that a pass runs over: prefixes of some samples."""

    index: Tensor
    layout: PackedLayout
    n_labels: int
    labelled: Tensor
    """int64 [n_labels]: the labelled ones, as positions in the batch."""
    rows: Tensor
    """int64 [n_labels]: the same positions as indices into `index`."""

    @classmethod
    def of(cls, batch: PackedBatch, lengths: dict[int, int]) -> "_PassPositions":
        starts, layout = PackedLayout(batch.lengths).offsets, PackedLayout(list(lengths.values()))
        index, labelled, rows = [], [], []
        for (n, length), offset in zip(lengths.items(), layout.offsets, strict=False):
            first, last = np.searchsorted(batch.labelled, (starts[n], starts[n] + length))
            index.append(np.arange(starts[n], starts[n] + length))
            labelled.append(batch.labelled[first:last])
            rows.append(batch.labelled[first:last] - starts[n] + offset)
        none = np.zeros(0, np.int64)
        parts = [torch.from_numpy(np.concatenate([none, *part])) for part in (index, labelled, rows)]
        sent = [to_device_async(part, batch.input_ids.device) for part in parts]
        return cls(sent[0], layout, len(parts[1]), sent[1], sent[2])


def _entropy(weights: Tensor) -> Tensor:
    """Mean entropy in nats of attention weights [..., N]."""
    return torch.special.entr(weights).sum(-1).mean()
