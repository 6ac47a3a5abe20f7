"""Checks the sources in a profile's mixtures against those that exist, so that a wrong name is refused before anything is trained."""

from collections.abc import Collection, Iterator, Mapping

from fvlm_core.config import DataSettings, SourceShare
from fvlm_core.data.jobs import ShardManifest
from fvlm_core.data.rows import SPLITS, Split
from fvlm_core.data.sources.record import Record
from fvlm_core.errors import UserError
from tasks.config import PipelineConfig
from tasks.precompute import NATURAL
from tasks.recipes import OWN_DATA

VALIDATION = "data.validation.mixture"
"""The path that an ablation changes to be validated on other samples."""

Known = Mapping[Split, Collection[str]]
"""The sources that have samples in each split."""


def known_sources(config: PipelineConfig, records: Mapping[str, Record]) -> Known:
    """Return the sources that precompute will have: those that it makes, and those in the rows of its recorded sources."""
    precompute = config.precompute
    known: dict[Split, set[str]] = {"train": set(), "val": set()}
    for name, made in [*precompute.clips.sources.items(), *((one.name, one) for one in [precompute.shards.exercises] if one)]:
        known["train"] |= {name} if made.train else set()
        known["val"] |= {name} if made.val else set()
    if precompute.natural:
        known["train"].add(NATURAL)
        known["val"].add(NATURAL)
    own = [source for source in precompute.sources if source.val_share is not None and source.name in records]
    shares = {name: source.val_share for source in own for name in records[source.name].sources}
    for count in (count for record in records.values() for count in record.counts):
        undecided = not count.split
        if count.split == "train" or undecided:
            known["train"].add(count.source)
        if count.split == "val" or (undecided and shares.get(count.source, precompute.shards.val_share)):
            known["val"].add(count.source)
    return known


def check_names(config: PipelineConfig, known: Known) -> None:
    """Check that every source in a mixture has samples of the mixture's split. Raises UserError if not."""
    _check(config, known)


def check_shards(config: PipelineConfig, shards: ShardManifest) -> None:
    """Check that the shards have the training and validation samples of every mixture. Raises UserError if not."""
    _check(config, {split: shards.names(split) for split in SPLITS})


def _check(config: PipelineConfig, known: Known) -> None:
    for where, split, mixture in mixtures(config):
        if missing := sorted({part.source for part in mixture if part.share} - set(known[split])):
            there = ", ".join(sorted(known[split])) or "none"
            raise UserError(
                f"there are no {split} samples of {', '.join(map(repr, missing))}",
                where=f"{where} of the profile {config.name}",
                fix=f"correct the name, or add the source to precompute; with {split} samples there are: {there}",
            )


def mixtures(config: PipelineConfig) -> Iterator[tuple[str, Split, list[SourceShare]]]:
    """Yield each mixture: where it is in the profile, the split that it samples, and its shares."""
    stages = {f"stages.{name}": stage.data for name, stage in config.stages.present.items()}
    parts: dict[str, DataSettings] = {"base": config.base.data, **stages}
    for where, data in parts.items():
        yield f"{where}.data.mixture", "train", data.mixture
        yield f"{where}.data.{'validation.' if data.validation else ''}mixture", "val", data.held_out.mixture
    for ablation in config.ablations:
        if ablation.path == VALIDATION:
            yield f"ablations, {ablation.name}", "val", DataSettings.model_validate({"mixture": ablation.change[VALIDATION]}).mixture
        if ablation.path == OWN_DATA:
            mixture = DataSettings.model_validate({"mixture": ablation.change[OWN_DATA]}).mixture
            yield f"ablations, {ablation.name}", "train", mixture
            if config.base.data.validation is None:
                yield f"ablations, {ablation.name}", "val", mixture
