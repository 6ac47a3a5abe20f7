"""What looks at a pod mean, one after the other: that it has started, is dead, idle, or past its time. No clock and no network in here."""

from dataclasses import dataclass

from infra.runpod.models import OVER, Pod, Status

GONE_LOOKS = 2
"""Lists in a row without the pod: one may come from a copy of the service that does not know it yet."""
RESTARTS = 3
"""Of the container; the pod's program ends a pod at the second start, so it does not run at all."""
UNSTARTED = "the pod did not start"
STALE_S = 120.0
"""How late the service may be with a container's uptime."""
GAP_SHARE = 0.25
"""Of `idle_s`, between two looks: after a longer outage of the service nobody knows what the GPUs did meanwhile."""


@dataclass
class Watch:
    """What is known of a pod so far. `look` with every new list of pods."""

    deadline: float
    """Seconds since the epoch."""
    began: float
    start_timeout_s: float
    idle_s: float | None = None
    """How long all GPUs may do nothing."""
    silent_s: float | None = None
    """How long the run may give no sign of life. It is set up first: packages are installed, shards are fetched."""
    overtime_s: float = 120.0
    """After the deadline, for the pod to end itself."""
    running: bool = False
    missing: int = 0
    restarts: int = 0
    uptime: int = 0
    started: float | None = None
    """When the container was started the last time, by its uptime."""
    speaks: bool = False
    """Whether the pod's program has been read in its log, so its command is not a bad one."""
    idle_since: float | None = None
    looked_at_gpus: float | None = None
    """The last time that what they do was seen."""
    sign: object = None
    heard: float | None = None

    def look(self, pod: Pod | None, now: float) -> str | None:
        """Why the pod is over or has to end; None while it is well. `pod` is None where the list has it no longer."""
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
        self.running = True
        return self._restarts(pod, now) or self._idle(pod, now)

    def hear(self, sign: object, now: float) -> str | None:
        """`sign`: anything that is another with every sign of life of the run. Returns why the pod has to end, or None."""
        if sign != self.sign or self.heard is None:
            self.sign, self.heard = sign, now
        silence = now - self.heard
        return f"its run has given no sign of life for {silence / 60:.0f} min" if self.silent_s and silence > self.silent_s else None

    def _restarts(self, pod: Pod, now: float) -> str | None:
        uptime = pod.runtime.uptime if pod.runtime else None
        if uptime is None:
            return None
        started = now - uptime
        # of a command that ends at once every look sees the same uptime, and another container
        again = self.started is not None and not self.speaks and started > self.started + STALE_S
        # where the pod's program was heard, an uptime that falls by seconds is an older copy of the answer
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
