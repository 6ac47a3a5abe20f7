"""What a volume knows of itself."""

import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import psutil
import pytest

from infra import volume
from infra.volume import database_folder, is_network_file_system, known_volume_id, password, volume_id

Partition = namedtuple("Partition", "device mountpoint fstype opts")


def test_ids_and_passwords_are_random_and_stay(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert known_volume_id(one) is None
    assert volume_id(one) == volume_id(one) == known_volume_id(one)
    assert password(one) == password(one)
    assert volume_id(one) != volume_id(two)
    assert password(one) != password(two)
    one.rename(tmp_path / "moved")
    assert known_volume_id(tmp_path / "moved") not in (None, volume_id(two))
    assert (two / "prefect" / "password").stat().st_mode & 0o777 == 0o600


def test_processes_that_ask_at_once_get_the_same(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from infra.volume import volume_id; print(volume_id(Path(sys.argv[1])))"
    asking = [subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True) for _ in range(6)]
    assert len({process.communicate()[0] for process in asking}) == 1


@pytest.mark.parametrize(
    ("kind", "network"),
    [("ext4", False), ("nfs4", True), ("cifs", True), ("fuse.sshfs", True), ("fuseblk", False), ("fuse.fuse-overlayfs", False)],
)
def test_a_database_is_kept_off_network_file_systems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, network: bool) -> None:
    mounted = [Partition("a", "/", "ext4", ""), Partition("b", str(tmp_path / "net"), kind, ""), Partition("c", "/elsewhere", "nfs", "")]
    monkeypatch.setattr(psutil, "disk_partitions", lambda **_: mounted)
    there, state = tmp_path / "net" / "volume", tmp_path / "state"
    assert is_network_file_system(there) is network
    assert not is_network_file_system(tmp_path / "network"), "only its name begins alike"
    assert database_folder(there, state) == (state / "fvlm" / volume_id(there) if network else there / volume.HOME)


@pytest.mark.parametrize("kinds", [("ext4", "nfs4"), ("nfs4", "ext4")])
def test_the_last_of_two_mounts_on_one_mount_point_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kinds: tuple[str, str]) -> None:
    mounted = [Partition("a", "/", "ext4", ""), *(Partition(kind, str(tmp_path), kind, "") for kind in kinds)]
    monkeypatch.setattr(psutil, "disk_partitions", lambda **_: mounted)
    assert is_network_file_system(tmp_path / "volume") is (kinds[-1] == "nfs4")
