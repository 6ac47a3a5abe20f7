"""A smoke test on RunPod itself: answers what its documentation leaves open, on two small CPU pods, for a few cents.

One pod runs a job through the pod's program (`pod.py`) and has to end itself with its own key. The command of the other pod simply ends,
each time that RunPod restarts it. Both write files to the volume, which are then read through its S3 API.
"""

import contextlib
import shlex
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from typing import TypeVar
from uuid import UUID, uuid4

from infra.budget import Budget
from infra.errors import InfraError
from infra.runpod.account import Account
from infra.runpod.client import RunPod
from infra.runpod.errors import RunPodError
from infra.runpod.models import CreatePod, GpuRequest, Pod, Volume
from infra.runpod.naming import PodName
from infra.runpod.poller import reading_logs
from infra.runpod.pool import RunPodConfiguration
from infra.runpod.rent import rent
from infra.s3 import S3Store

T = TypeVar("T")
PHASE = "smoke"
"""Phase of these pods in the ledger."""
FOLDER = "smoke"
MAX_RUNTIME_S = 900.0
PATIENCE_S = 420.0
"""Timeout of each wait, which includes the time to pull an image."""
LOOK_S = 2.0
WRITE = "import os,sys,time; os.makedirs(os.path.dirname(sys.argv[1]), exist_ok=True); open(sys.argv[1], 'w').write(str(time.time()))"
ENDS = "ends this pod:"
"""In the log of a pod that ends itself; it is followed by the result."""


@dataclass(frozen=True)
class Answer:
    """A question and its answer."""

    question: str
    answer: str


def most_usd(usd_per_hour: float) -> float:
    """Return the cost in USD of both pods if they run to their deadline."""
    return 2 * usd_per_hour * MAX_RUNTIME_S / 3600


def smoke(
    account: Account,
    bucket: S3Store,
    budget: Budget,
    configuration: RunPodConfiguration,
    *,
    say: Callable[[str], None],
    patience_s: float = PATIENCE_S,
) -> list[Answer]:
    """Run the smoke test. The pods are ended in any case; a question without an answer after `patience_s` seconds is reported as such."""
    configuration.check_image()
    run, volume, client = uuid4(), account.volume(), account.client
    place = f"{FOLDER}/{run.hex}"
    written, starts = (f"{configuration.mount_path}/{place}/{name}" for name in ("written", "starts"))
    job = configuration.model_copy(update={"command": shlex.join(["python3", "-c", WRITE, written]), "python": "python3", "code": None})
    again = f"mkdir -p {shlex.quote(str(written.rpartition('/')[0]))}; date +%s >> {shlex.quote(starts)}; sleep 3"
    lines: list[str] = []
    answers = [Answer("credit of the account", _balance(client))]
    with (
        ended(client, budget, run, say),
        rented(account, budget, job, run, say) as ending,
        rented(account, budget, configuration, run, say, args=shlex.join(["sh", "-c", again])) as repeating,
        reading_logs(client, ending.id, lines.append),
    ):
        answers.append(no_capacity(client, volume, run, configuration))
        answers += list(_s3(bucket, place, patience_s, say))
        answers.append(_restarts(client, bucket, f"{place}/starts", repeating, patience_s, say))
        answers.append(_self_end(client, ending, lines, patience_s, say))
    return answers


@contextlib.contextmanager
def ended(client: RunPod, budget: Budget, run: UUID, say: Callable[[str], None]) -> Generator[None]:
    """End all pods of the run that are left after the block, including pods whose create request was interrupted or got no response."""
    try:
        yield
    finally:
        try:
            for pod in client.pods():
                if (name := PodName.parse(pod.name)) and name.run == run:
                    say(f"pod {pod.id} was left, and is ended")
                    client.terminate(pod.id)
                    budget.ended(pod.name)
        except RunPodError:
            say("whether all pods have ended is not known: run `fvlm infra reap`, or look at RunPod's console")
            raise


@contextlib.contextmanager
def rented(
    account: Account, budget: Budget, configuration: RunPodConfiguration, run: UUID, say: Callable[[str], None], *, args: str = ""
) -> Generator[Pod]:
    """Rent a pod for the duration of the block. `args` is its command, instead of the pod's program."""
    volume, requirements = account.volume(), configuration.requirements
    pod, name = rent(
        account.client,
        replace(requirements, args=args) if args else requirements,
        budget,
        run=run,
        volume=volume,
        mount_path=configuration.mount_path,
        max_runtime_s=MAX_RUNTIME_S,
        phase=PHASE,
        say=say,
        environment=lambda deadline, machine: {"FVLM_POD_JOB": configuration.job(run, volume, deadline, machine)},
    )
    try:
        yield pod
    finally:
        account.client.terminate(pod.id)
        budget.ended(str(name))


def no_capacity(client: RunPod, volume: Volume, run: UUID, configuration: RunPodConfiguration) -> Answer:
    """Find out the response to a create request for a GPU that is out of stock in the volume's data centre. A created pod is ended."""
    question = "text of a create without capacity"
    stocks = {gpu.id: {one.id: one.availability for one in gpu.dataCenters} for gpu in client.gpus()}
    gone = [gpu for gpu, there in stocks.items() if there.get(volume.dataCenter, "NONE") == "NONE"]
    if not gone:
        return Answer(question, f"not tried: every GPU is in stock in {volume.dataCenter}")
    name = PodName.new(volume.id, time.time() + MAX_RUNTIME_S, run)
    wanted = CreatePod(
        name=str(name), image=configuration.image, args="sleep 60", gpu=GpuRequest(id=gone[0]), dataCenterIds=[volume.dataCenter]
    )
    try:
        pod = client.create_pod(wanted)
    except RunPodError as error:
        return Answer(question, f"{type(error).__name__}: {error.what}")
    client.terminate(pod.id)
    return Answer(question, f"{gone[0]} was free although the catalogue said none; it was ended at once")


def _balance(client: RunPod) -> str:
    try:
        usd = client.balance_usd()
    except RunPodError as error:
        return f"no answer: {error.what}"
    return "the service does not say" if usd is None else f"${usd:.2f}"


def _s3(bucket: S3Store, place: str, patience_s: float, say: Callable[[str], None]) -> Iterator[Answer]:
    say("waits for the first pod's file")
    key = f"{place}/written"
    content = _until(lambda: _quietly(lambda: bucket.read(key)), patience_s)
    if content is None:
        yield Answer("a pod's file, read by its key", f"not there after {patience_s:.0f} s")
        return
    since = float(content)
    yield Answer("a pod's file, read by its key", f"at most {max(0.0, time.time() - since):.0f} s after it was written")
    listed = _until(lambda: key in (_quietly(lambda: bucket.keys(f"{place}/")) or []), patience_s)
    after = f"{max(0.0, time.time() - since):.0f} s after it was written" if listed else f"not after {patience_s:.0f} s"
    yield Answer("a pod's file, listed", after)


def _restarts(client: RunPod, bucket: S3Store, key: str, pod: Pod, patience_s: float, say: Callable[[str], None]) -> Answer:
    say("waits for a container to be started again")
    question = "a container whose command ends"

    def twice() -> bool:
        return len((_quietly(lambda: bucket.read(key)) or b"").split()) > 1

    if not _until(twice, patience_s):
        now = next((one for one in client.pods() if one.id == pod.id), None)
        return Answer(question, f"was not started again in {patience_s:.0f} s; the pod is {now.status if now else 'gone'}")
    now = client.pod(pod.id)
    return Answer(question, f"is started again; the pod is {now.status} and costs ${now.cost:.2f}/h")


def _self_end(client: RunPod, pod: Pod, lines: list[str], patience_s: float, say: Callable[[str], None]) -> Answer:
    say("waits for a pod to end itself")
    question = "a pod ends itself with its own key"
    gone = _until(lambda: pod.id not in [one.id for one in client.pods()], patience_s)
    tries = "; ".join(line.partition(ENDS)[2].strip() for line in lines if ENDS in line) or "its log was cut off"
    return Answer(question, f"yes: {tries}" if gone else f"no: {tries}; it was ended from here")


def _until(look: Callable[[], T], patience_s: float) -> T | None:
    """Call `look` until it returns something true. Returns None after `patience_s` seconds."""
    deadline = time.monotonic() + patience_s
    while not (found := look()) and time.monotonic() < deadline:
        time.sleep(LOOK_S)
    return found or None


def _quietly(read: Callable[[], T]) -> T | None:
    """Call `read`. Returns None if it fails."""
    try:
        return read()
    except InfraError:
        return None
