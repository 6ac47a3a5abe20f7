"""The program of a pod, from its first second to its end. It is one file that uses only the standard library, because it is passed in the
pod's environment and runs before anything is installed.

A pod costs money until it is terminated, and RunPod never does that itself: it restarts a container whose command ends. So this program

1. starts a watchdog that terminates the pod at an absolute deadline, which a restarted container finds in its environment again;
2. refuses to run its job twice: a second start of the container only terminates the pod;
3. checks the machine and the shards before anything is installed or downloaded (preflight);
4. creates the Python environment on the volume, once per lock file, and tests an NCCL all-reduce if there are several GPUs;
5. runs the job with all caches, packages and temporary files on the volume;
6. writes how the job ended (`outcome.json`, atomically), and terminates the pod, trying several ways until one works.
"""

import base64
import contextlib
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Generator, Mapping
from typing import IO

JOB_VARIABLE = "FVLM_POD_JOB"
URL_VARIABLE = "FVLM_RUNPOD_URL"
SHARED_VARIABLE = "FVLM_SHARED_VOLUME"
"""Tells the job that other hosts also use the volume."""
DISK_VARIABLE = "FVLM_POD_DISK"
"""Names a folder on the pod's own, temporary disk, for files that cannot be on a network file system."""
EMULATED_VARIABLE = "FVLM_EMULATED"
"""Set by an emulator, whose GPUs cannot communicate."""
SHARDS = "shards"
"""Link on the volume to the newest shards."""
HASHED_BYTES = 16 * 2**20
"""The preflight hashes files up to this size; of larger ones it only checks the size."""
ALL_REDUCE_TIMEOUT_S = 180.0
ALL_REDUCE_PROGRAM = """
import datetime, sys, torch, torch.distributed as group
rank, ranks, port, backend = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
if backend == "nccl":
    torch.cuda.set_device(device)
where, limit = "tcp://127.0.0.1:" + port, datetime.timedelta(seconds=60)
group.init_process_group(backend, init_method=where, rank=rank, world_size=ranks, timeout=limit)
numbers = torch.full((1 << 20,), rank + 1.0, device=device)
group.all_reduce(numbers)
assert float(numbers.min()) == float(numbers.max()) == ranks * (ranks + 1) / 2, "the sum is wrong"
group.destroy_process_group()
"""
"""Program of each rank in an all-reduce over all GPUs."""
PODS, CODE, ENVIRONMENTS = "pods", "code", "environments"
"""Folders of the volume: the files of each pod, the code of each commit, and one environment per lock file."""
STARTED, OUTCOME, LOG = "started", "outcome.json", "log.txt"
IDENTITY = "fvlm-volume.json"
"""File on every volume that `fvlm infra setup` has set up. A pod without it has no volume, whatever is at the path."""
GRACE_S = 60.0
"""Time before the end that the job has to save its state, unless the job states another."""
END_S = 15.0
"""Time before the deadline to kill processes that have not ended, and to write the outcome."""
LEASE_S = 120.0
"""A lease that was not renewed for this long has expired: its owner is assumed dead."""
BEATS = 8
"""Renewals within the duration of a lease."""
USER_AGENT = "fvlm/0.1 pod"
PROGRAM_SAYS = "[pod]"
"""Prefix of this program's lines in the container's log."""
SETTING_UP = "setting up"
"""Prefix, after `PROGRAM_SAYS`, of the lines that tell the worker that the environment is still being installed."""
SETUP_SAY_S, SETUP_S = 60.0, 3600.0
"""Interval of these lines, and how long they are printed: an installation that hangs must not keep the pod."""
GB = 10**9


class PreflightError(Exception):
    """The job was not started: the machine is not the requested one or, if there is a `fix`, every other machine would be refused as well.

    With a `fix`, the text has the form of `fvlm_core.errors.UserError`, which tells a pipeline not to rent another pod.
    """

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        super().__init__(f"{what}\n  where: {where}\n  fix:   {fix}" if fix else what)


class Pod:
    """This pod and its job."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment = dict(environment)
        self.job = json.loads(environment[JOB_VARIABLE])
        self.id = environment.get("RUNPOD_POD_ID", socket.gethostname())
        self.deadline = float(self.job["deadline"])
        self.volume = self.job["mount_path"]
        self.folder = os.path.join(self.volume, PODS, self.id)
        self.key = environment.get("RUNPOD_API_KEY", "")
        self.url = environment.get(URL_VARIABLE, "https://api.runpod.io").rstrip("/")
        self.stopping: str | None = None
        """Why the job was told to stop; None until then."""
        self.ending = False

    def run(self) -> tuple[int, str]:
        """Run the job. Returns its exit status and a description of how it ended."""
        os.makedirs(self.folder, exist_ok=True)
        if not self.first_start():
            return 1, "the container was started again: its first start did not end the pod"
        try:
            self.preflight()
            code = self.unpack_code()
            python = self.python(code)
            self.check_all_reduce(python)
            command = [python if word == "{python}" else word for word in self.job["command"]]
            return self.run_job(command, code, python)
        except PreflightError as error:
            return 2, f"preflight: {error}"
        except subprocess.CalledProcessError as error:
            return 1, f"the environment could not be made: {error}"
        except OSError as error:
            return 1, f"the pod could not be set up: {error}"

    def first_start(self) -> bool:
        """Record that this container has started. Returns whether it is the first time."""
        try:
            with open(os.path.join(self.folder, STARTED), "x") as stream:
                stream.write(str(time.time()))
                os.fsync(stream.fileno())
            return True
        except FileExistsError:
            return False

    def preflight(self) -> None:
        """Raise PreflightError if the machine is not the requested one, or if volume, shards or network are not as they should be."""
        wanted = self.job.get("gpu")
        if self.deadline - time.time() < self.job.get("least_s", 0):
            raise PreflightError("the pod came so late that its time is nearly over")
        identity = os.path.join(self.volume, IDENTITY)
        if not os.path.isfile(identity):
            raise PreflightError(f"there is no volume: {IDENTITY} is not there", where=self.volume, fix="run `fvlm infra setup`")
        with open(identity) as stream:
            found = json.load(stream)["id"]
        if found != self.job["volume"]:
            fix = "name the volume by its id, and run `fvlm infra setup`"
            raise PreflightError(f"the volume is {found}, not {self.job['volume']}", where=self.volume, fix=fix)
        for place, least_gb in ((self.volume, self.job["free_volume_gb"]), (os.environ.get("TMPDIR", "/tmp"), self.job["free_disk_gb"])):
            free = shutil.disk_usage(place).free / GB
            if free < least_gb:
                fix = "delete what is not needed on the volume, or give more room: machine.rental.volume_gb, disk_gb of the pool"
                raise PreflightError(f"{free:.1f} GB free at {place}, {least_gb:.1f} GB needed", where=place, fix=fix)
        probe = os.path.join(self.folder, ".probe")
        with open(probe, "wb") as stream:
            stream.write(b"0" * 65536)
            os.fsync(stream.fileno())
        os.unlink(probe)
        if wanted:
            self.check_gpus(wanted["id"], wanted["count"])
            self.check_shards()
        self.check_network()
        self.say("preflight: the machine is what was asked for")

    def check_gpus(self, kind: str, count: int) -> None:
        """Check the number and the model of the GPUs."""
        asked = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader,nounits"]
        try:
            lines = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=60).stdout.strip().splitlines()
        except (OSError, subprocess.SubprocessError) as error:
            raise PreflightError(f"no GPU answers: {error}") from error
        names = [line.split(",")[0].strip() for line in lines]
        if len(names) != count:
            raise PreflightError(f"{len(names)} GPUs, {count} asked for")
        if any(words(kind) - words(name) and words(name) - words(kind) for name in names):
            raise PreflightError(f"the GPUs are {', '.join(sorted(set(names)))}, asked for was {kind}")
        self.say(f"preflight: {count} x {lines[0]}")

    def check_shards(self) -> None:
        """Check the files that the manifest of the newest shards lists. Does nothing if there are no shards yet."""
        folder = os.path.realpath(os.path.join(self.volume, SHARDS))
        try:
            with open(os.path.join(folder, "manifest.json")) as stream:
                files = json.load(stream)["files"]
        except FileNotFoundError:
            return
        for entry in files:
            path = os.path.join(folder, entry["path"])
            size = os.path.getsize(path) if os.path.isfile(path) else None
            if size is None or size != entry["bytes"]:
                found = "is missing" if size is None else f"has {size} bytes and not {entry['bytes']}"
                raise PreflightError(f"the shards are damaged: {entry['path']} {found}", where=folder, fix="run the precompute again")
            if size <= HASHED_BYTES:
                with open(path, "rb") as stream:
                    if hashlib.sha256(stream.read()).hexdigest() != entry["sha256"]:
                        # its size is right, and a precompute with `verify: sizes` checks nothing else
                        fix = f"run the precompute once with machine.verify: sha256, or delete {folder} and run it again"
                        raise PreflightError(f"the shards are damaged: {entry['path']} is not what was made", where=folder, fix=fix)
        self.say(f"preflight: the {len(files)} files of the shards are there")

    def check_all_reduce(self, python: str) -> None:
        """Check that an all-reduce over several GPUs works: training depends on it, and some machines are not set up for it."""
        count = (self.job.get("gpu") or {}).get("count", 0)
        if count < 2:
            return
        backend = "gloo" if self.environment.get(EMULATED_VARIABLE) else "nccl"
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        parts = [
            subprocess.Popen(
                [python, "-c", ALL_REDUCE_PROGRAM, str(rank), str(count), str(port), backend],
                env=self.job_environment(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(count)
        ]
        problems = []
        for rank, part in enumerate(parts):
            try:
                errors = part.communicate(timeout=ALL_REDUCE_TIMEOUT_S)[1].strip().splitlines()
            except subprocess.TimeoutExpired:
                part.kill()
                errors = [f"no answer in {ALL_REDUCE_TIMEOUT_S:.0f} s"]
                part.communicate()
            if part.returncode:
                problems.append(f"GPU {rank}: {errors[-1] if errors else f'status {part.returncode}'}")
        if problems:
            raise PreflightError(f"the GPUs cannot exchange numbers by {backend}: {'; '.join(problems)}")
        self.say(f"preflight: {count} GPUs add up by {backend}")

    def check_network(self) -> None:
        """Check that the Prefect server that the job reports to answers."""
        url = self.environment.get("PREFECT_API_URL")
        if not url:
            return
        problem, headers = "", {"User-Agent": USER_AGENT}
        if auth := self.environment.get("PREFECT_API_AUTH_STRING"):
            headers["Authorization"] = f"Basic {base64.b64encode(auth.encode()).decode()}"
        elif key := self.environment.get("PREFECT_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        for _ in range(5):
            try:
                with urllib.request.urlopen(urllib.request.Request(f"{url}/health", headers=headers), timeout=10):
                    return
            except (urllib.error.URLError, OSError, ValueError) as error:
                if isinstance(error, urllib.error.HTTPError) and error.code in (401, 403):
                    what, fix = f"the Prefect API refuses the pod's key or password: {error}", "start the worker with the right one"
                    raise PreflightError(what, where=url, fix=fix) from error
                problem = str(error)
                time.sleep(self.job.get("retry_s", 3.0))
        raise PreflightError(f"the Prefect API at {url} cannot be reached from the pod: {problem}")

    def unpack_code(self) -> str:
        """Return the folder of the job's code, which is unpacked on the volume once per commit."""
        name = self.job.get("code")
        if not name:
            return self.job.get("code_folder") or os.getcwd()
        folder = os.path.join(self.volume, CODE, name)
        if not os.path.isdir(folder):
            arriving = f"{folder}.{self.id}"
            with tarfile.open(f"{folder}.tar.gz") as archive:
                archive.extractall(arriving, filter="data")
            try:
                os.rename(arriving, folder)
            except OSError:  # another pod was faster
                shutil.rmtree(arriving)
        return folder

    def python(self, code: str) -> str:
        """Return the interpreter that runs the job; create its environment if needed."""
        if self.job.get("python"):
            return self.job["python"]
        lock = os.path.join(code, self.job["lock"])
        with open(lock, "rb") as stream:
            version = f"{sys.version_info.major}.{sys.version_info.minor}"
            name = hashlib.sha256(stream.read() + version.encode()).hexdigest()[:16]
        folder = os.path.join(self.volume, ENVIRONMENTS, name)
        python = os.path.join(folder, "bin", "python")
        with self.reporting_setup():
            while not os.path.exists(os.path.join(folder, "complete")):
                with lease(f"{folder}.lease", self.id) as mine:
                    if mine and not os.path.exists(os.path.join(folder, "complete")):
                        self.make_environment(folder, lock, python)
                if not mine:
                    time.sleep(self.job.get("retry_s", 3.0))
        return python

    @contextlib.contextmanager
    def reporting_setup(self) -> Generator[None]:
        """During the block, print a line each minute: the worker ends a pod that is silent, and installing packages takes minutes."""
        over, began = threading.Event(), time.monotonic()

        def beat() -> None:
            while not over.wait(self.job.get("setup_say_s", SETUP_SAY_S)) and time.monotonic() - began < SETUP_S:
                self.say(f"{SETTING_UP}: this or another pod has been installing packages for {time.monotonic() - began:.0f} s")

        threading.Thread(target=beat, name="setup", daemon=True).start()
        try:
            yield
        finally:
            over.set()

    def make_environment(self, folder: str, lock: str, python: str) -> None:
        """Create an environment with the packages of the lock file, using this Python."""
        self.say(f"making the environment {os.path.basename(folder)}; pods with the same lock file find it")
        began = time.time()
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True, env=self.job_environment())
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", lock]
        subprocess.run(pip, check=True, env=self.job_environment())
        write(os.path.join(folder, "complete"), f"{time.time() - began:.0f} s\n")

    def job_environment(self) -> dict[str, str]:
        """Return the environment variables, with caches and temporary files on the volume: the pod's own disk is small and temporary."""
        home, caches = os.path.join(self.volume, "home"), os.path.join(self.volume, "caches")
        scratch = os.path.join(self.volume, "tmp", self.id)
        moved = {
            "HOME": home,
            "TMPDIR": scratch,
            "XDG_CACHE_HOME": caches,
            "PIP_CACHE_DIR": os.path.join(caches, "pip"),
            "UV_CACHE_DIR": os.path.join(caches, "uv"),
            "HF_HOME": os.path.join(caches, "huggingface"),
            "TORCH_HOME": os.path.join(caches, "torch"),
            "TORCHINDUCTOR_CACHE_DIR": os.path.join(caches, "inductor"),
            "TRITON_CACHE_DIR": os.path.join(caches, "triton"),
            "PREFECT_HOME": os.path.join(scratch, "prefect"),
        }
        for folder in moved.values():
            os.makedirs(folder, exist_ok=True)
        hidden = (JOB_VARIABLE, "RUNPOD_API_KEY", "FVLM_POD_PROGRAM")
        kept = {name: value for name, value in self.environment.items() if name not in hidden}
        return kept | moved | {SHARED_VARIABLE: "1", DISK_VARIABLE: self.environment.get("TMPDIR", "/tmp")}

    def run_job(self, command: list[str], code: str, python: str) -> tuple[int, str]:
        """Run the command until it ends or its time is over. Returns its exit status and a description of how it ended."""
        environment = self.job_environment()
        environment["PATH"] = os.pathsep.join([os.path.dirname(python), environment.get("PATH", os.defpath)])
        environment["PYTHONPATH"] = code
        self.say(f"runs {' '.join(command)}")
        with open(os.path.join(self.folder, LOG), "ab") as log:
            process = subprocess.Popen(
                command,
                cwd=code,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
            assert process.stdout is not None
            reader = threading.Thread(target=copy, args=(process.stdout, log), daemon=True)
            reader.start()
            stop_asked, grace_s = None, self.job.get("grace_s", GRACE_S)
            while process.poll() is None:
                if self.stopping is None and time.time() > self.deadline - grace_s - END_S:
                    self.stopping = "its time was over"
                if self.stopping and stop_asked is None:
                    stop_asked = time.time()
                    signal_group(process, signal.SIGTERM)
                if stop_asked is not None and time.time() - stop_asked > grace_s:
                    signal_group(process, signal.SIGKILL)
                time.sleep(0.1)
            signal_group(process, signal.SIGKILL)  # what it left behind
            reader.join(5)
        status = process.returncode
        ended = f"the command ended with status {status}"
        return (status or 1, f"{ended}: {self.stopping}") if self.stopping else (status, ended)

    def write_outcome(self, status: int, reason: str) -> None:
        """Write to the volume how the job ended, because RunPod does not report exit statuses."""
        path = os.path.join(self.folder, OUTCOME)
        if not os.path.exists(path):  # a second start does not overwrite the outcome of the first
            write(path, json.dumps({"pod": self.id, "run": self.job.get("run"), "status": status, "reason": reason, "ended": time.time()}))
        with contextlib.suppress(OSError):
            shutil.rmtree(os.path.join(self.volume, "tmp", self.id))

    def end(self) -> None:
        """Terminate this pod, trying several ways until one works. Returns only if the pod has no key, as outside of RunPod."""
        if not self.key:
            return
        self.ending = True
        ways = (self._terminate, self._delete, self._command)
        attempt = 0
        while True:
            problem = ways[attempt % len(ways)]()
            self.say(f"ends this pod: {problem or 'accepted'}")
            attempt += 1
            time.sleep(min(60.0, self.job.get("retry_s", 3.0) * attempt))

    def _terminate(self) -> str:
        return self._ask("POST", f"/v2/pods/{self.id}/action", b'{"action": "terminate"}')

    def _delete(self) -> str:
        return self._ask("DELETE", f"/v2/pods/{self.id}", None)

    def _command(self) -> str:
        """Terminate the pod with RunPod's own program, which is in its images. Its syntax has changed between versions."""
        program = shutil.which("runpodctl", path=self.environment.get("PATH"))
        if program is None:
            return "there is no runpodctl"
        problem = ""
        for words in (["pod", "delete", self.id], ["remove", "pod", self.id]):
            try:
                done = subprocess.run([program, *words], capture_output=True, timeout=60, check=False)
            except (OSError, subprocess.SubprocessError) as error:  # nothing may end the loop of `end`
                problem = f"runpodctl: {error}"
                continue
            if done.returncode == 0:
                return ""
            problem = f"runpodctl: status {done.returncode}"
        return problem

    def _ask(self, method: str, path: str, body: bytes | None) -> str:
        """Send a request. Returns what went wrong, or an empty string."""
        headers = {"Authorization": f"Bearer {self.key}", "User-Agent": USER_AGENT, "Content-Type": "application/json"}
        try:
            with urllib.request.urlopen(urllib.request.Request(self.url + path, body, headers, method=method), timeout=20):
                return ""
        except (urllib.error.URLError, OSError, ValueError) as error:
            return f"{method} {path}: {error}"

    def watch(self) -> None:
        """The watchdog: terminate the pod at its deadline. It uses no file, so that a hanging volume cannot block it."""
        while (left := self.deadline - time.time()) > 0:
            time.sleep(min(left, 60.0))
        self.say("watchdog: the pod's time is over")
        self.end()

    def say(self, text: str) -> None:
        """Print a line to the container's log."""
        print(f"{PROGRAM_SAYS} {text}", flush=True)


@contextlib.contextmanager
def lease(path: str, owner: str, lease_s: float = LEASE_S, lost: Callable[[], None] = lambda: None) -> Generator[bool]:
    """Try to take a lease on `path`, which excludes other hosts, and renew it during the block. Yields whether it was taken.

    `owner` must be unique. `lost` is called, once and from another thread, if another owner takes the lease because it was not renewed for
    `lease_s` seconds.
    """
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if not take(path, owner, lease_s):
        yield False
        return
    over = threading.Event()

    def beat() -> None:
        while not over.wait(lease_s / BEATS):
            try:
                with open(path) as stream:
                    mine = stream.read() == owner
                if mine:
                    os.utime(path)
            except FileNotFoundError:
                mine = False
            except OSError:  # the file system does not answer: the lease may still be renewed in time
                continue
            if not mine and not over.is_set():
                lost()
                return

    threading.Thread(target=beat, daemon=True).start()
    try:
        yield True
    finally:
        over.set()
        with contextlib.suppress(OSError), open(path) as stream:
            if stream.read() == owner:
                os.unlink(path)


def take(path: str, owner: str, lease_s: float) -> bool:
    """Create the file of a lease, replacing an expired one. Returns whether that succeeded."""
    try:
        with contextlib.suppress(FileNotFoundError):
            if age(path) > lease_s:
                stale = f"{path}.{owner}.stale"
                os.rename(path, stale)  # of several processes that try, one succeeds
                if age(stale) <= lease_s:  # it was another owner's new lease: put it back
                    with contextlib.suppress(FileExistsError):
                        os.link(stale, path)
                    os.unlink(stale)
                    return False
                os.unlink(stale)
        with open(path, "x") as stream:
            stream.write(owner)
            stream.flush()
            os.fsync(stream.fileno())
        return True
    except OSError:
        return False


def age(path: str) -> float:
    """Return the seconds since the last renewal, by the file system's clock, because the clocks of hosts differ."""
    probe = f"{path}.clock.{os.getpid()}.{threading.get_ident()}"
    with open(probe, "w") as stream:
        now = os.fstat(stream.fileno()).st_mtime
    os.unlink(probe)
    return now - os.stat(path).st_mtime


def copy(source: IO[bytes], log: IO[bytes]) -> None:
    """Copy the job's output to its log on the volume and to the container's log."""
    for line in source:
        with contextlib.suppress(OSError):
            log.write(line)
            log.flush()
        sys.stdout.buffer.write(line)
        sys.stdout.flush()


def signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    """Send a signal to the process and to everything that it has started in its process group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def write(path: str, text: str) -> None:
    """Write a file atomically and flushed to disk."""
    temporary = f"{path}.{os.getpid()}.new"
    with open(temporary, "w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)


def words(name: str) -> set[str]:
    """Return the words of a GPU's name, without maker, case and hyphens: catalogue and driver spell it differently."""
    return {word for word in name.upper().replace("-", " ").split() if word not in ("NVIDIA", "GEFORCE")}


def main(environment: Mapping[str, str]) -> int:
    """Run the job, record its outcome and terminate the pod. Returns the exit status if there is no pod to terminate."""
    pod = Pod(environment)
    threading.Thread(target=pod.watch, name="watchdog", daemon=True).start()

    def stop(number: int, _frame: object) -> None:
        if pod.ending:
            os._exit(0)
        pod.stopping = f"signal {number}"

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    status, reason = 1, "the pod's program failed"
    try:
        status, reason = pod.run()
    except Exception as error:  # the pod must be terminated after any error
        reason = f"{type(error).__name__}: {error}"
    pod.say(f"ended: {reason}")
    with contextlib.suppress(OSError):
        pod.write_outcome(status, reason)
    pod.end()
    return status


if __name__ == "__main__":
    sys.exit(main(os.environ))
