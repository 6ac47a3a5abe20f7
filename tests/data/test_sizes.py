"""What a plan says of sources before their files are there."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from deployments.checks import load_profile
from deployments.cli import plan
from fvlm_core.data.archives import joined
from fvlm_core.data.jobs import Source
from fvlm_core.data.mixture import BLOCK_SAMPLES, Mixture
from fvlm_core.data.sources import ADAPTERS
from fvlm_core.data.sources.sizes import missing_files, sources_table, too_large
from tasks.mixtures import mixtures
from tests.data.published import PUBLISHED
from tests.tiny import PROFILE

RUNPOD = load_profile("runpod")


def source(name: str, *files: str, **settings: Any) -> Source:
    return Source.model_validate({"name": "mine", "format": name, "files": files, **settings})


@pytest.mark.parametrize(
    ("chosen", "samples"),
    [
        (source("cauldron", "x/ai2d/train-*.parquet", "x/vsr/train-*.parquet"), 2434 + 2157),
        (source("cauldron", "x/*/train-*.parquet"), 1_880_981),
        (source("cauldron", "x/ai2d/train-*.parquet", limit=100), 100),
        (source("llava_video", "x/*/*_mc_*.json", every=10), 19_620),
        (source("webvid", "x.csv"), 10_727_582),
    ],
)
def test_published_samples_are_those_of_the_files_that_are_named(chosen: Source, samples: int) -> None:
    assert chosen.published is not None
    assert chosen.published.samples == samples


def test_hours_follow_the_rows_and_bytes_the_files() -> None:
    complete, some = source("openvid", "x.csv").published, source("openvid", "x.csv", every=2, limit=1000).published
    assert complete is not None
    assert some is not None
    assert (some.gigabytes, complete.gigabytes) == (6976.0, 6976.0)
    assert complete.hours is not None
    assert some.hours == pytest.approx(complete.hours * 1000 / complete.samples)


def test_the_configurations_of_the_cauldron_are_fifty_and_cover_its_published_size() -> None:
    known = ADAPTERS["cauldron"].published
    assert known is not None
    assert len(known.parts) == 50
    assert sum(known.parts.values()) == known.samples


def test_a_volume_that_cannot_hold_the_sources_is_said() -> None:
    rental = RUNPOD.machine.rental
    assert rental is not None
    assert too_large(RUNPOD.precompute.sources, 700) is None
    said = too_large(RUNPOD.precompute.sources, rental.volume_gb)
    assert said is not None
    assert "cauldron, cauldron_multi, finevideo, smoltalk take 693 GB, and vript, sharegpt4video, llava_video, vista," in said, (
        "openvid's are on the web"
    )


def test_files_that_are_there_are_said_to_be(tmp_path: Path) -> None:
    made = Source.model_validate({"name": "openvid", "format": "openvid"} | PUBLISHED["openvid"](tmp_path))
    assert missing_files(made) == []
    gone = made.model_copy(update={"archives": [tmp_path / "no*.zip"]})
    assert missing_files(gone) == [tmp_path / "no*.zip"]
    rows = sources_table([made, gone, source("user", "a.csv")]).records()
    assert [row["files"] for row in rows] == ["there", "not there", "not there", ""]
    assert [row["samples"] for row in rows] == ["1,019,957", "1,019,957", "", "2,039,914"]


def test_the_production_profile_is_planned_without_its_files(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert plan(profile="runpod", volume=tmp_path) == 0
    shown = capsys.readouterr().out
    for one in RUNPOD.precompute.sources:
        assert one.published is not None
        (line,) = [line for line in shown.splitlines() if line.startswith(f"{one.name} ") and ADAPTERS[one.format].title in line]
        assert f"{one.published.samples:,}" in line
        assert "not there" in line
    assert "not here, so assumed: the file does not exist" in shown
    assert "Plan in dollars" in shown


def test_files_that_a_plan_needs_are_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert plan(profile=str(PROFILE), videos=tmp_path / "none.csv", volume=tmp_path / "volume") == 0
    shown = capsys.readouterr().out
    assert f"videos: {tmp_path / 'none.csv'}" in shown
    assert "A table of one's own" in shown


def test_the_production_profile_takes_openvids_videos_out_of_its_archives_on_the_web(tmp_path: Path) -> None:
    """All 186, of which 16 are published in two pieces."""
    (openvid,) = [one for one in RUNPOD.precompute.sources if one.format == "openvid"]
    archives = {Path(parts[0]).name: len(parts) for parts in joined(openvid.web_archive_addresses)}
    assert set(archives) == {name for n in range(186) for name in (f"OpenVid_part{n}.zip", f"OpenVid_part{n}_partaa")} & set(archives)
    assert len(archives) == 186
    assert Counter(archives.values()) == {1: 170, 2: 16}
    (row,) = sources_table([openvid]).records()
    assert row["files"] == "not there; 202 archives on the web"
    assert (row["samples"], row["GB"], row["hours of video"]) == ("1,019,957", "6,976", "2,051")


def test_the_production_profile_has_what_its_stages_read() -> None:
    known = {one.name: one.published.samples for one in RUNPOD.precompute.sources if one.published}
    assert 3.2e6 < sum(known.values()) < 3.4e6
    assert {part.source for _, _, mixture in mixtures(RUNPOD) for part in mixture} <= set(known)
    for stage in RUNPOD.stages.present.values():
        assert stage.run.steps
        for part in stage.data.mixture:
            read = stage.run.steps * stage.run.batch_samples * part.share
            assert read < 1.25 * known[part.source], f"{part.source} would be read {read / known[part.source]:.2f} times"


def test_the_third_stage_has_its_shares_in_every_thousand() -> None:
    parts = RUNPOD.stages.stage3.data.mixture
    mixture = Mixture([part.source for part in parts], [part.share for part in parts], [[10**5]] * len(parts), seed=0)
    counts = dict(zip(mixture.names, mixture.counts, strict=True))
    video = counts["llava_video"] + counts["vista"] + counts["finevideo"]
    assert (video, counts["cauldron"], counts["smoltalk"], counts["cauldron_multi"]) == (330, 345, 202, 123)
    assert sum(counts.values()) == BLOCK_SAMPLES
