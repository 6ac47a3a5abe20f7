"""The sources that a profile's mixtures name, checked against those there are: a wrong name is refused before anything is trained."""

from collections.abc import Collection, Iterator, Mapping

from fvlm_core.config import DataSettings, SourceShare
from fvlm_core.data.jobs import ShardManifest
from fvlm_core.data.rows import SPLITS, Split
from fvlm_core.data.sources.record import Record
from fvlm_core.errors import UserError
from tasks.config import PipelineConfig
from tasks.recipes import OWN_DATA


def known_sources(config: PipelineConfig, records: Mapping[str, Record]) -> set[str]:
    """The sources that precompute makes, and those that the rows of its recorded sources are of."""
    return config.precompute.made_names.union(*(record.sources for record in records.values()))


def check_names(config: PipelineConfig, known: Collection[str]) -> None:
    """Every source that a mixture names is one of `known`. Raises UserError."""
    _check(config, dict.fromkeys(SPLITS, known))


def check_shards(config: PipelineConfig, shards: ShardManifest) -> None:
    """Every mixture has samples to train and to validate on. Raises UserError."""
    _check(config, {split: shards.names(split) for split in SPLITS})


def _check(config: PipelineConfig, known: Mapping[Split, Collection[str]]) -> None:
    for where, split, mixture in mixtures(config):
        if missing := sorted({part.source for part in mixture if part.share} - set(known[split])):
            there = ", ".join(sorted(known[split])) or "none"
            raise UserError(
                f"there are no {split} samples of {', '.join(map(repr, missing))}",
                where=f"{where} of the profile {config.name}",
                fix=f"correct the name, or add the source to precompute; with {split} samples there are: {there}",
            )


def mixtures(config: PipelineConfig) -> Iterator[tuple[str, Split, list[SourceShare]]]:
    """Where each is, what it takes samples of, and its shares."""
    stages = {f"stages.{name}": stage.data for name, stage in config.stages.present.items()}
    parts: dict[str, DataSettings] = {"base": config.base.data, **stages}
    for where, data in parts.items():
        yield f"{where}.data.mixture", "train", data.mixture
        yield f"{where}.data.{'validation.' if data.validation else ''}mixture", "val", data.held_out.mixture
    for ablation in config.ablations:
        if ablation.path == OWN_DATA:
            mixture = DataSettings.model_validate({"mixture": ablation.change[OWN_DATA]}).mixture
            yield f"ablations, {ablation.name}", "train", mixture
            if config.base.data.validation is None:
                yield f"ablations, {ablation.name}", "val", mixture
