"""Finds or creates the network volume, in a data centre with an S3 API and GPUs in stock, and marks it as ours."""

import json
from collections.abc import Sequence

from infra.errors import RefusedError
from infra.runpod.client import RunPod
from infra.runpod.models import CreateVolume, Volume
from infra.runpod.pod import IDENTITY
from infra.runpod.rent import STOCK
from infra.s3 import DATA_CENTERS
from infra.store import Store


def find_or_create_volume(
    client: RunPod, name: str, *, size_gb: int, data_centers: Sequence[str], gpus: Sequence[str], gpu_count: int
) -> Volume:
    """Return the volume of this name; create it, if needed, in the data centre with the best stock of the wanted GPUs.

    Raises RefusedError if the existing volume is elsewhere or too small, or if no data centre is suitable.
    """
    if found := next((one for one in client.volumes() if name in (one.name, one.id)), None):
        if found.dataCenter not in data_centers:
            raise RefusedError(
                f"the volume {found.name} is in {found.dataCenter}, and pods are wanted in {', '.join(data_centers)}",
                where="machine.rental.data_centers",
                fix=f"add {found.dataCenter} where its GPUs will do, or give another machine.rental.volume",
            )
        if found.size < size_gb:
            raise RefusedError(
                f"the volume {found.name} has {found.size} GB, and {size_gb} GB are wanted",
                where="machine.rental.volume_gb",
                fix=f"make it larger at https://console.runpod.io/user/storage, or set machine.rental.volume_gb to {found.size}",
            )
        return found
    places = choose(client, data_centers, gpus, gpu_count)
    return client.create_volume(CreateVolume(name=name, size=size_gb, dataCenter=places[0]))


def choose(client: RunPod, data_centers: Sequence[str], gpus: Sequence[str], gpu_count: int) -> list[str]:
    """Return the data centres for a volume, best first: by stock of the most wanted GPU, then of the next, then in the given order."""
    if unreachable := [place for place in data_centers if place not in DATA_CENTERS]:
        raise RefusedError(
            f"volumes in {', '.join(unreachable)} have no S3 API",
            where="machine.rental.data_centers",
            fix=f"choose among {', '.join(sorted(DATA_CENTERS))} (upper case)",
        )
    there = {one.id: one for one in client.data_centers()}
    known = [place for place in data_centers if place in there and there[place].networkVolumeTypes]
    if not known:
        raise RefusedError(
            f"none of {', '.join(data_centers)} takes network volumes now",
            where="machine.rental.data_centers",
            fix=f"one of {', '.join(there)}",
        )
    stocks = {gpu.id: {one.id: one.availability for one in gpu.dataCenters} for gpu in client.gpus(count=gpu_count)}
    return sorted(known, key=lambda place: [STOCK.get(stocks.get(gpu, {}).get(place, "NONE"), 3) for gpu in gpus])


def mark(store: Store, volume: Volume) -> None:
    """Write the volume's id and name to the volume, so that a pod can check that it has the right one."""
    content = json.dumps({"id": volume.id, "name": volume.name}).encode()
    if store.read(IDENTITY) != content:
        store.write(IDENTITY, content)
