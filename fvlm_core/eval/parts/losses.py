"""Validation loss in every mode, by source, and its differences between modes: does looking help, and how large is the inference gap?"""

import numpy as np

from fvlm_core.config import Positive
from fvlm_core.eval.estimates import Estimate, Metric, PairedTest
from fvlm_core.eval.part import Context, Part, PartResult
from fvlm_core.eval.stats import Bootstrap
from fvlm_core.eval.tables import by_mode, paired_table
from fvlm_core.model.names import Mode
from fvlm_core.settings import Settings
from fvlm_core.tables import Table


class ModeLoss(Settings):
    """Cross-entropy in one mode, in nats per labelled token."""

    loss: Estimate
    """Loss over all sources."""
    by_source: dict[str, Estimate]


class LossResult(PartResult):
    """Losses of every mode on the same samples."""

    title = "Validation loss"

    modes: dict[Mode, ModeLoss]
    samples: int
    train_inference_gap: PairedTest | None = None
    """Loss in mode autoregressive minus loss in coarse->fine; None unless both were evaluated."""
    foveation_gain: PairedTest | None = None
    """Loss in mode coarse-only minus loss in coarse->fine: above 0, looking helps. None unless both were evaluated."""

    @property
    def differences(self) -> list[PairedTest]:
        """The differences that were measured."""
        return [test for test in (self.foveation_gain, self.train_inference_gap) if test]

    @property
    def sources(self) -> list[str]:
        """The measured sources, sorted."""
        return sorted({source for result in self.modes.values() for source in result.by_source})

    def count(self) -> int:
        """Number of samples."""
        return self.samples

    def headline(self) -> list[Metric]:
        """The loss over all sources."""
        return [Metric(name="loss (nats/token)", values={mode: one.loss for mode, one in self.modes.items()}, hub_type="loss")]

    def tables(self) -> list[Table]:
        """Loss by source, and differences between modes."""
        rows = {source: {mode: one.by_source.get(source) for mode, one in self.modes.items()} for source in self.sources}
        tables = [by_mode("Validation loss by source", "source", list(self.modes), rows)]
        return tables + ([paired_table("Validation loss between modes", self.differences)] if self.differences else [])


class Losses(Part):
    """Validation loss."""

    result = LossResult

    samples: Positive = 256
    """Number of samples, in equal shares from all sources of the validation split."""

    def measure(self, context: Context) -> LossResult:
        """Measure the loss of the same samples in every mode."""
        subject, modes, bootstrap = context.subject, context.modes, context.bootstrap
        parts: dict[Mode, list[np.ndarray]] = {mode: [] for mode in modes}
        sources: list[str] = []
        clips: list[str] = []
        tokens_per_frame = subject.model.settings.tokens_per_frame
        for batch in context.split.loss_batches(self.samples, tokens_per_frame=tokens_per_frame, batch_samples=subject.batch_samples):
            for mode, sums in subject.losses(batch.to(subject.device), modes).items():
                parts[mode].append(sums)
            sources.extend(batch.sources)
            clips.extend(batch.keys)
        losses: dict[Mode, np.ndarray] = {mode: np.concatenate(sums) for mode, sums in parts.items()}
        return LossResult(
            modes={
                mode: ModeLoss(loss=bootstrap.weighted_mean(sums, clips), by_source=_by_source(sums, sources, clips, bootstrap))
                for mode, sums in losses.items()
            },
            samples=len(clips),
            train_inference_gap=_difference("autoregressive", "coarse_fine", losses, clips, bootstrap),
            foveation_gain=_difference("coarse_only", "coarse_fine", losses, clips, bootstrap),
        )


def _by_source(losses: np.ndarray, sources: list[str], clips: list[str], bootstrap: Bootstrap) -> dict[str, Estimate]:
    """Mean loss per token by source; `losses` holds (sum, tokens) per sample, [N, 2]."""
    of_source, of_clip = np.array(sources), np.array(clips)
    return {
        source: bootstrap.weighted_mean(losses[of_source == source], of_clip[of_source == source].tolist())
        for source in sorted(set(sources))
    }


def _difference(a: Mode, b: Mode, losses: dict[Mode, np.ndarray], clips: list[str], bootstrap: Bootstrap) -> PairedTest | None:
    """Loss in mode `a` minus loss in mode `b`, per labelled token; None unless both were evaluated."""
    if a not in losses or b not in losses:
        return None
    rows = np.stack([losses[a][:, 0] - losses[b][:, 0], losses[a][:, 1]], 1)
    return PairedTest(a=a, b=b, metric="loss", difference=bootstrap.weighted_mean(rows, clips))
