"""What looks at a pod, and what follows from them."""

from infra.runpod.models import Pod
from infra.runpod.watch import Watch


def seen(status: str, **more: object) -> Pod:
    return Pod.model_validate({"id": "a", "name": "b", "status": status, "createdAt": "2026-11-25T00:00:00Z"} | more)


def test_a_command_that_ends_at_once_is_seen_although_every_look_sees_the_same_uptime() -> None:
    """dstack 1142. A service whose uptime stands still is no such case once the pod's program has been read in its log."""
    for speaks in (False, True):
        watch = Watch(deadline=1e9, began=0, start_timeout_s=100, speaks=speaks)
        looks = [watch.look(seen("RUNNING", runtime={"uptime": 1}), now) for now in range(0, 600, 15)]
        assert [look for look in looks if look][:1] == ([] if speaks else ["the container was started 4 times"])
    watch = Watch(deadline=1e9, began=0, start_timeout_s=100)
    late = [watch.look(seen("RUNNING", runtime={"uptime": now - now % 60}), now) for now in range(0, 3600, 15)]
    assert late == [None] * len(late), "an uptime that comes a minute late"


def test_what_looks_at_a_pod_mean() -> None:
    def fresh() -> Watch:
        return Watch(deadline=10_000, began=0, start_timeout_s=100, idle_s=600, speaks=True)

    busy, idle = ({"runtime": {"uptime": 5, "gpus": [{"util": use}]}} for use in (50, 0))
    watch = fresh()
    assert watch.look(seen("PROVISIONING"), 50) is None
    assert watch.look(seen("STARTING"), 101) == "the pod did not start in 100 s; it is STARTING"
    watch = fresh()
    looks = [watch.look(pod, number) for number, pod in enumerate((None, seen("RUNNING"), None, None))]
    assert looks == [None, None, None, "the pod is gone"]
    for status in ("EXITED", "ERROR", "TERMINATED"):
        assert fresh().look(seen(status), 1) == f"the pod is {status}"
    assert fresh().look(seen("MIGRATING"), 1) is None
    watch = fresh()
    assert watch.look(seen("RUNNING", **idle), 0) is None
    assert watch.look(seen("RUNNING", **busy), 500) is None
    assert [watch.look(seen("RUNNING", **idle), now) for now in range(900, 1500, 100)] == [None] * 6
    assert watch.look(seen("RUNNING", **idle), 1500) == "no GPU of the pod has done anything for 10 min"
    assert watch.look(seen("RUNNING", **idle), 5000) is None, "what the GPUs did while the service was away is not known"
    assert fresh().look(seen("RUNNING"), 10_121) == "the pod is past its deadline and did not end itself"
    watch = fresh()
    uptimes = [watch.look(seen("RUNNING", runtime={"uptime": uptime}), 1) for uptime in (500, 3, 500, 2, 500, 1)]
    assert uptimes[:5] == [None] * 5
    assert uptimes[5] == "the container was started 4 times"
    watch = fresh()
    assert [watch.look(seen("RUNNING", runtime={"uptime": now - now % 40}), 3000 + now % 20) for now in range(0, 900, 10)] == [None] * 90


def test_a_pod_that_starts_slowly_and_then_installs_packages_is_not_silent() -> None:
    """The run itself says nothing before its environment is there."""
    watch = Watch(deadline=1e9, began=0, start_timeout_s=1200, silent_s=1800)
    for now in range(0, 7200, 60):
        if now >= 1000:
            watch.read("[pod] setting up: this or another pod has been installing packages for 60 s")
        assert watch.look(seen("RUNNING" if now >= 1000 else "STARTING"), now) is None
        assert watch.hear(("pending", None), now) is None
    watch.read("[pod] ends this pod: HTTP Error 403")
    assert watch.hear(("pending", None), 7140 + 1801) == "its run has given no sign of life for 30 min"
    watch = Watch(deadline=1e9, began=0, start_timeout_s=1200, silent_s=1800)
    silences = []
    for now, status in ((0, "STARTING"), (1100, "RUNNING"), (2800, "RUNNING"), (2901, "RUNNING")):
        watch.look(seen(status), now)
        silences.append(watch.hear("pending", now) is not None)
    assert silences == [False, False, False, True], "the time before the container ran is no silence"
