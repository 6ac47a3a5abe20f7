"""Judges from repeated looks at a pod whether it has started, is dead, idle, or past its deadline. Uses neither clock nor network."""

from dataclasses import dataclass

from infra.runpod.models import OVER, Pod, Status
from infra.runpod.pod import PROGRAM_SAYS, SETTING_UP

GONE_LOOKS = 2
"""Consecutive lists without the pod after which it is gone: a single one may come from a replica that does not know the pod yet."""
RESTARTS = 3
"""Restarts of the container after which its command is known not to work: the pod's program would end the pod at the second start."""
UNSTARTED = "the pod did not start"
STALE_S = 120.0
"""How outdated a container's uptime may be in a response of the service."""
GAP_SHARE = 0.25
"""Longest time between two looks that still counts as idle, as a share of `idle_s`: after a longer outage of the service it is unknown what
the GPUs did in between."""


@dataclass
class Watch:
    """What is known about a pod so far. Call `look` with every new list of pods."""

    deadline: float
    """Seconds since the epoch."""
    began: float
    start_timeout_s: float
    idle_s: float | None = None
    """How long all GPUs may be idle."""
    silent_s: float | None = None
    """How long the run may give no sign of life, from the start of the container. While packages are installed (for at most
    `pod.SETUP_S`), the lines of the pod's program are signs of life."""
    overtime_s: float = 120.0
    """Time after the deadline in which the pod may end itself."""
    running: bool = False
    missing: int = 0
    restarts: int = 0
    uptime: int = 0
    started: float | None = None
    """When the container was last started, according to its uptime."""
    speaks: bool = False
    """Whether the log has a line of the pod's program, so that its command is known to work."""
    idle_since: float | None = None
    looked_at_gpus: float | None = None
    """When the utilization of the GPUs was last seen."""
    setup_lines: int = 0
    """Lines in the log that say that packages are still being installed."""
    sign: object = None
    heard: float | None = None

    def look(self, pod: Pod | None, now: float) -> str | None:
        """Return why the pod is over or has to be ended, or None if it is healthy. `pod` is None if it is no longer listed."""
        if pod is None:
            self.missing += 1
            return "the pod is gone" if self.missing >= GONE_LOOKS else None
        self.missing = 0
        if pod.status in OVER:
            return f"the pod is {pod.status}"
        if now > self.deadline + self.overtime_s:
            return "the pod is past its deadline and did not end itself"
        if pod.status != Status.RUNNING:
            late = not self.running and now - self.began > self.start_timeout_s
            return f"{UNSTARTED} in {self.start_timeout_s:.0f} s; it is {pod.status}" if late else None
        if not self.running:
            self.running, self.heard = True, None  # silence counts from now, also if no poll succeeded for a while before
        return self._restarts(pod, now) or self._idle(pod, now)

    def read(self, line: str) -> None:
        """Note a line of the pod's log."""
        self.speaks |= line.startswith(PROGRAM_SAYS)
        self.setup_lines += line.startswith(f"{PROGRAM_SAYS} {SETTING_UP}")

    def hear(self, sign: object, now: float) -> str | None:
        """Note the run's newest sign of life, any value that changes with each of them. Returns why the pod has to be ended, or None."""
        sign = (sign, self.setup_lines)
        if sign != self.sign or self.heard is None or not self.running:
            self.sign, self.heard = sign, now
        silence = now - self.heard
        return f"its run has given no sign of life for {silence / 60:.0f} min" if self.silent_s and silence > self.silent_s else None

    def _restarts(self, pod: Pod, now: float) -> str | None:
        uptime = pod.runtime.uptime if pod.runtime else None
        if uptime is None:
            return None
        started = now - uptime
        # if a command ends at once, every look sees the same uptime, but of another container
        again = self.started is not None and not self.speaks and started > self.started + STALE_S
        # once the pod's program has been heard, an uptime that falls by seconds comes from an outdated response
        fell = uptime < self.uptime and (not self.speaks or self.started is None or started > self.started + STALE_S)
        if fell or again:
            self.restarts += 1
            self.started = started
        self.started, self.uptime = started if self.started is None else min(self.started, started), uptime
        return f"the container was started {self.restarts + 1} times" if self.restarts >= RESTARTS else None

    def _idle(self, pod: Pod, now: float) -> str | None:
        use = [gpu.util for gpu in pod.runtime.gpus if gpu.util is not None] if pod.runtime else []
        last, self.looked_at_gpus = self.looked_at_gpus, now
        if self.idle_s is None or not use or any(use):
            self.idle_since = None
            return None
        blind = last is not None and now - last > GAP_SHARE * self.idle_s
        self.idle_since = now if self.idle_since is None or blind else self.idle_since
        idle = now - self.idle_since
        return f"no GPU of the pod has done anything for {idle / 60:.0f} min" if idle >= self.idle_s else None
