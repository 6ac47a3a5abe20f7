"""The fault table of the data: `python -m tests.campaign.data_faults --copies 10 --kills 20`.

Every fault that `tests.data.test_faults` knows is struck several times, all clips in one download through video2dataset, half of them over
HTTP; damaged shards at random places, each in a copy of its own; kills as in `tests.campaign.precompute_kills`. A row says how often a
fault was struck, how often everything was as it has to be (a sample with all its frames, or a loss with its reason; damage that is named),
what was lost without a word, what is there twice, and what is said.
"""

import argparse
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console

from fvlm_core.data.jobs import INDEX_FILE, ShardJob, ShardManifest
from fvlm_core.data.rows import SPLITS
from fvlm_core.data.shard_set import ShardSet
from fvlm_core.data.verify import verify
from fvlm_core.errors import UserError
from fvlm_core.tables import Table
from tests.campaign.precompute_kills import campaign
from tests.data.test_faults import FILES, FRAMES, REASONS, change_text, corrupt_jpeg, shards_of_every_case, truncate
from tests.tiny import tiny_shards

Row = dict[str, Any]
NAMES = {
    "html-as.mp4": "HTML as mp4",
    "truncated.mp4": "truncated mp4",
    "zero-frames.mp4": "zero frames",
    "audio-only.mp4": "audio only",
    "short.mp4": "0.3 s",
    "hours.mp4": "3 h",
    "pixels.mp4": "8x8 pixels",
    "eight-k.mp4": "8K",
    "plain.mp4": "nothing wrong",
    "dead.mp4": "dead URL",
    "missing.mp4": "404 page",
}
"""Of the cases of `tests.data.test_faults`."""


def row(fault: str, struck: int, right: int, *, lost: int = 0, twice: int = 0, said: str = "") -> Row:
    """A line of the table."""
    return {"fault": fault, "struck": struck, "as it has to be": right, "lost silently": lost, "twice": twice, "what is said": said}


def clips(folder: Path, copies: int) -> list[Row]:
    """Files that are no good videos, or good ones of an odd kind, and addresses that give none."""
    rows = []
    manifest = shards_of_every_case(folder, copies)
    shards = ShardSet(folder / "shards")
    records = [shards.record(int(number)) for split in SPLITS for number in shards.rows(split).index]
    for name in [*FILES, *sorted(set(REASONS) - set(FILES))]:
        made = [record for record in records if record["origin"].endswith(f"-{name}")]
        left_out = [clip.reason for clip in manifest.bad if clip.url.endswith(f"-{name}")]
        if name in FRAMES:
            right = sum(record["num_frames"] == FRAMES[name] for record in made)
            said = f"a sample with all its frames: {FRAMES[name]}"
        else:
            right = sum(re.search(REASONS[name], reason) is not None for reason in left_out)
            said = min(left_out, default="").partition(": HTTPConnectionPool")[0]
        twice = sum(number > 1 for number in Counter(record["origin"] for record in made).values())
        rows.append(row(NAMES[name], copies, right, lost=copies - len(made) - len(left_out), twice=twice, said=said))
    return rows


def damaged_shards(folder: Path, copies: int, rng: random.Random) -> Iterator[Row]:
    """A copy of a folder of shards for each damage, at a random sample."""
    intact = tiny_shards(folder / "intact", clips=4)
    rows = pd.read_parquet(intact / INDEX_FILE)
    rows = rows[rows["n_frames"] > 0]

    def no_shard(tar: Path, _row: Any) -> None:
        tar.unlink()

    ways: dict[str, Callable[[Path, Any], None]] = {
        "corrupt JPEG in a shard": corrupt_jpeg,
        "truncated tar": truncate,
        "changed shard (digest)": change_text,
        "missing shard": no_shard,
    }
    for name, damage in ways.items():
        named, said = 0, ""
        for _ in range(copies):
            copy = Path(shutil.copytree(intact, folder / "copy"))
            chosen = rows.iloc[rng.randrange(len(rows))]
            damage(copy / chosen["shard"], chosen)
            problems = verify(copy).problems
            named += bool(problems) and all(chosen["shard"] in problem for problem in problems)
            said = problems[0] if problems else ""
            shutil.rmtree(copy)
        yield row(name, copies, named, lost=copies - named, said=said)
    (intact / INDEX_FILE).unlink()
    try:
        ShardSet(intact)
        yield row("missing index", 1, 0, lost=1)
    except UserError as error:
        yield row("missing index", 1, 1, said=error.what.replace(str(intact), ""))


def full_disk(disk: Path, downloaded: Path) -> Row:
    """The shards of a download on a disk of 600 kB, and the same command again when it is larger; needs root, to mount it."""
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o"]
    if os.geteuid() or subprocess.run([*mount, "size=600k", "tmpfs", disk], capture_output=True).returncode:
        return row("full disk", 0, 0, said="not tried: a small disk can be mounted by root only")
    try:
        (disk / "other").write_bytes(bytes(400_000))
        job = ShardJob(output=disk / "shards", downloads=[downloaded / "download"], vocab_size=300)
        job.to_yaml(downloaded / "job.yaml")
        command = [sys.executable, "-m", "fvlm_core.data.shards", str(downloaded / "job.yaml")]
        refused = subprocess.run(command, capture_output=True, text=True)
        said = next((line for line in refused.stderr.splitlines() if "disk is full" in line), "")
        (disk / "other").unlink()
        subprocess.run([*mount, "remount,size=64m", "tmpfs", disk], check=True)
        subprocess.run(command, check=True, capture_output=True)
        same = ShardManifest.read(disk / "shards").digest == ShardManifest.read(downloaded / "shards").digest
        return row("full disk", 1, int(refused.returncode == 2 and same), lost=int(not same), said=f"{said}; then the same command goes on")
    finally:
        subprocess.run(["umount", disk], check=True)


def kills(folder: Path, number: int, seed: int) -> Row:
    """kill -9 at random moments."""
    found = campaign(folder, number, seed)
    said = f"the same bytes as never killed, {found.remade} finished parts made again" if found.same_bytes else "other bytes"
    return row("kill -9 at random moments", found.kills, found.kills * found.same_bytes, lost=found.lost, twice=found.twice, said=said)


def main() -> int:
    """Print the table; 1 where anything is not as it has to be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--copies", type=int, default=10)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fvlm-faults-") as temporary:
        places = {name: Path(temporary) / name for name in ("clips", "shards", "kills")}
        for place in places.values():
            place.mkdir()
        rows = clips(places["clips"], asked.copies)
        rows += damaged_shards(places["shards"], asked.copies, random.Random(asked.seed))
        rows.append(full_disk(Path(temporary) / "disk", places["clips"]))
        if asked.kills:
            rows.append(kills(places["kills"], asked.kills, asked.seed))
    Console(width=180).print(Table.of(rows, title="Faults").terminal())
    return int(any(one["struck"] != one["as it has to be"] or one["lost silently"] or one["twice"] for one in rows))


if __name__ == "__main__":
    sys.exit(main())
