"""GPUs are dealt out so that no two jobs share one, and all are busy."""

import threading
import time
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from infra.devices import VISIBLE, Devices
from infra.launch import LOG_NAME, launch


@settings(max_examples=20)
@given(count=st.integers(2, 6), wanted=st.lists(st.integers(1, 3), min_size=1, max_size=12))
def test_no_two_jobs_share_a_gpu(count: int, wanted: list[int]) -> None:
    devices, lock = Devices(count), threading.Lock()
    busy: set[int] = set()
    shared, most = [], [0]

    def job(number: int) -> None:
        with devices.taken(number) as given:
            mine = {int(one) for one in given[VISIBLE].split(",")} if given else set(range(count))
            with lock:
                shared.extend(mine & busy)
                busy.update(mine)
                most[0] = max(most[0], len(busy))
            time.sleep(0.001)
            with lock:
                busy.difference_update(mine)

    threads = [threading.Thread(target=job, args=(number,)) for number in wanted if number < count]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert not any(thread.is_alive() for thread in threads)
    assert shared == []
    assert most[0] <= count


def test_a_job_sees_its_own(tmp_path: Path) -> None:
    devices, seen = Devices(2), []

    def job(name: str) -> None:
        with devices.taken(1) as mine:
            launch(["sh", "-c", f"echo sees ${VISIBLE}; sleep 0.5"], tmp_path / name, devices=mine)
        seen.append((tmp_path / name / LOG_NAME).read_text())

    threads = [threading.Thread(target=job, args=(name,)) for name in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(seen) == ["sees 0\n", "sees 1\n"]
    with devices.taken(2) as both:
        assert both == {}, "all of them: nothing is hidden"
