"""An emulated RunPod, and a client whose every word is checked against the OpenAPI document."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.runpod.client import RunPod
from infra.runpod.emulator.cloud import Delays
from infra.runpod.emulator.server import Emulator
from infra.runpod.models import CreateVolume, Volume
from tests.infra.runpod.contract import Witness

KEY = "rpa_planted-account-key"
QUICK = Delays(provision_s=0.05, start_s=0.05, restart_s=0.05)


@pytest.fixture
def emulator(tmp_path: Path) -> Iterator[Emulator]:
    with Emulator(tmp_path / "cloud", key=KEY, delays=QUICK) as emulator:
        yield emulator


@pytest.fixture
def witness() -> Witness:
    return Witness()


@pytest.fixture
def waits() -> list[float]:
    """Seconds that the client waited, one after the other; it does not wait for them here."""
    return []


@pytest.fixture
def client(emulator: Emulator, witness: Witness, waits: list[float]) -> Iterator[RunPod]:
    with RunPod(KEY, emulator.url, sleep=waits.append) as client:
        client._http.event_hooks = witness.hooks
        yield client
    assert witness.problems == []


@pytest.fixture
def volume(client: RunPod) -> Volume:
    return client.create_volume(CreateVolume(name="fvlm", size=100, dataCenter="US-KS-2"))
