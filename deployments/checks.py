"""Checks before anything starts; each failure is a UserError that says what to do."""

import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fvlm_core.data.jobs import Source
from fvlm_core.data.sources.record import Record
from fvlm_core.errors import UserError
from fvlm_core.settings import read_yaml
from infra.stack import REPOSITORY
from tasks.config import PipelineConfig
from tasks.external_inputs import natural_clips, record_sources

PROFILES = REPOSITORY / "deployments" / "profiles"
GB = 10**9
PROBES = 16
PROBE_TIMEOUT_S = 10
CODECS = "import av, sys; sys.exit(0 if {'libx264', 'h264'} <= av.codecs_available else 3)"


def load_profile(profile: str) -> PipelineConfig:
    """Load a profile by name (`ci`, `laptop`, `runpod`) or from a YAML file, whose relative paths start at its folder. Raises UserError."""
    path = Path(profile) if Path(profile).suffix in (".yaml", ".yml") else PROFILES / f"{profile}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in PROFILES.glob("*.yaml")))
        raise UserError(f"there is no profile {profile!r}", where=str(path), fix=f"use one of {known}, or give a YAML file")
    return PipelineConfig.from_values(read_yaml(path), where=str(path), folder=path.absolute().parent)


def check_phase(name: str) -> None:
    """Check that there is a phase of that name."""
    from flows.registry import PHASES  # imports Prefect, which takes a second and is needed only here

    if name not in PHASES:
        raise UserError(f"there is no phase {name!r}", where="fvlm run", fix=f"use one of {', '.join(PHASES)}")


def check_volume(volume: Path, config: PipelineConfig) -> None:
    """Check that the volume can be created and written to, and has enough free space."""
    try:
        volume.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=volume):
            pass
    except OSError as error:
        raise UserError(
            f"the volume cannot be written: {error}", where=str(volume), fix="give another --volume, or correct its permissions"
        ) from error
    free, needed = shutil.disk_usage(volume).free / GB, config.machine.min_free_gb
    if free < needed:
        raise UserError(
            f"the volume is nearly full: {free:.1f} GB free, {needed:.1f} GB needed (machine.min_free_gb)",
            where=str(volume),
            fix="free some space, or give another --volume",
        )


def check_programs(config: PipelineConfig) -> None:
    """Check for H.264 support here and in video2dataset's environment (both use PyAV's own ffmpeg)."""
    other = config.machine.video2dataset_python
    fix = {Path(sys.executable): "run ./setup.sh", other: "run ./infra/video2dataset_env.sh"}
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda python: _check_codecs(python, fix[python]), fix))
    if config.precompute.natural:
        natural_clips()


def _check_codecs(python: Path, fix: str) -> None:
    try:
        status = subprocess.run([python, "-c", CODECS], capture_output=True, text=True, check=False)
    except OSError as error:
        raise UserError("video2dataset's environment is missing", where=str(python), fix=fix) from error
    if status.returncode:
        reason = (status.stderr.strip().splitlines() or ["its ffmpeg has no H.264"])[-1]
        raise UserError(f"ffmpeg (PyAV) is missing or cannot do H.264: {reason}", where=str(python), fix=fix)


def check_sources(config: PipelineConfig, volume: Path) -> dict[str, Record]:
    """Check that every source can be read, and that not too many of its videos are missing: all local files, and a sample of the addresses.

    Returns the sources' records, by name.
    """
    records = record_sources(config, volume)
    for source in config.precompute.video_sources:
        _check_videos(source, records[source.name], config.precompute.download.max_bad_share)
    return records


def _check_videos(source: Source, record: Record, max_bad_share: float) -> None:
    where = f"source {source.name}: {', '.join(map(str, source.files))}"
    if record.missing > max_bad_share * record.rows:
        raise UserError(
            f"{record.missing} of {record.rows} videos are missing, e.g. {record.missing_examples[0]}",
            where=where,
            fix=f"correct the paths (relative ones start at `media`, or at the table's folder); up to {max_bad_share:.0%} may be missing",
        )
    with ThreadPoolExecutor(max_workers=PROBES) as pool:
        reasons = list(pool.map(_dead, record.probe))
    if reasons and all(reasons) and not record.local:
        raise UserError(
            f"no video can be reached: {len(reasons)} of {record.remote} addresses were tried, e.g. {record.probe[0]}: {reasons[0]}",
            where=where,
            fix="correct the addresses, or check the network",
        )
    if record.distinct < 2:
        raise UserError("there is only one video", where=where, fix="add another one: one of them is held out for validation")


def _dead(url: str) -> str | None:
    """Why an address cannot be fetched, or None if it can. Object stores are not checked here, since they need credentials."""
    if not url.lower().startswith("http"):
        return None
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "fvlm", "Range": "bytes=0-0"})
        with urllib.request.urlopen(request, timeout=PROBE_TIMEOUT_S):
            return None
    except (urllib.error.URLError, OSError, ValueError) as error:
        return str(error)
