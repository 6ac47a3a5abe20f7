"""What is checked before anything starts: each failure is a UserError that says what to do."""

import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fvlm_core.errors import UserError
from infra.stack import REPOSITORY
from tasks.config import PipelineConfig
from tasks.outside import local_path, natural_clips, read_urls

PROFILES = REPOSITORY / "deployments" / "profiles"
GB = 10**9
PROBED_URLS = 16
PROBE_TIMEOUT_S = 10
CODECS = "import av, sys; sys.exit(0 if {'libx264', 'h264'} <= av.codecs_available else 3)"


def load_profile(profile: str) -> PipelineConfig:
    """A profile by name (`ci`, `laptop`, `runpod`) or by the path of a YAML file. Raises UserError."""
    path = Path(profile) if Path(profile).suffix in (".yaml", ".yml") else PROFILES / f"{profile}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in PROFILES.glob("*.yaml")))
        raise UserError(f"there is no profile {profile!r}", where=str(path), fix=f"use one of {known}, or give a YAML file")
    return PipelineConfig.from_yaml(path)


def check_phase(name: str) -> None:
    """There is a phase of that name."""
    from flows.registry import PHASES  # imports Prefect: a second that only this needs

    if name not in PHASES:
        raise UserError(f"there is no phase {name!r}", where="fvlm run", fix=f"use one of {', '.join(PHASES)}")


def check_volume(volume: Path, config: PipelineConfig) -> None:
    """The volume can be made, written to, and has room."""
    try:
        volume.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=volume):
            pass
    except OSError as error:
        raise UserError(f"the volume cannot be written: {error}", where=str(volume), fix="give another --volume, or its rights") from error
    free, needed = shutil.disk_usage(volume).free / GB, config.machine.min_free_gb
    if free < needed:
        raise UserError(
            f"the volume is nearly full: {free:.1f} GB free, {needed:.1f} GB needed (machine.min_free_gb)",
            where=str(volume),
            fix="free some space, or give another --volume",
        )


def check_programs(config: PipelineConfig) -> None:
    """H.264 can be written here and read in video2dataset's environment (both through PyAV's own ffmpeg)."""
    other = config.machine.video2dataset_python
    fix = {Path(sys.executable): "run ./setup.sh", other: "run ./infra/video2dataset_env.sh"}
    for python in fix:
        try:
            status = subprocess.run([python, "-c", CODECS], capture_output=True, text=True, check=False)
        except OSError as error:
            raise UserError("video2dataset's environment is missing", where=str(python), fix=fix[python]) from error
        if status.returncode:
            reason = (status.stderr.strip().splitlines() or ["its ffmpeg has no H.264"])[-1]
            raise UserError(f"ffmpeg (PyAV) is missing or cannot do H.264: {reason}", where=str(python), fix=fix[python])
    if config.precompute.natural:
        natural_clips()


def check_videos(table: Path, max_bad_share: float) -> None:
    """The table of videos is readable and not too much of it is dead: all local files, and a sample of the addresses."""
    urls = read_urls(table)
    local = [path for url in urls if (path := local_path(url, table)) is not None]
    missing = [str(path) for path in local if not path.is_file()]
    if len(missing) > max_bad_share * len(urls):
        raise UserError(
            f"{len(missing)} of {len(urls)} videos are missing, e.g. {missing[0]}",
            where=str(table),
            fix=f"correct the paths (relative ones start at the table's folder); up to {max_bad_share:.0%} may be missing",
        )
    remote = [url for url in urls if local_path(url, table) is None]
    probed = _evenly(remote, PROBED_URLS)
    with ThreadPoolExecutor(max_workers=PROBED_URLS) as pool:
        reasons = list(pool.map(_dead, probed))
    if probed and all(reasons) and not local:
        raise UserError(
            f"no video can be reached: {len(probed)} of {len(remote)} addresses were tried, e.g. {probed[0]}: {reasons[0]}",
            where=str(table),
            fix="correct the addresses, or check the network",
        )
    if len(set(urls)) < 2:
        raise UserError("there is only one video", where=str(table), fix="add another one: one of them is held out for validation")


def _dead(url: str) -> str | None:
    """Why the address gives nothing, or None where it answers."""
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "fvlm", "Range": "bytes=0-0"})
        with urllib.request.urlopen(request, timeout=PROBE_TIMEOUT_S):
            return None
    except (urllib.error.URLError, OSError, ValueError) as error:
        return str(error)


def _evenly(items: Sequence[str], count: int) -> list[str]:
    """At most `count` of the items, evenly spread."""
    return [items[index * len(items) // count] for index in range(count)] if len(items) > count else list(items)
