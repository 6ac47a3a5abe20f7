"""Set before anything is imported: no test asks a hub, every test computes on one thread, and CI tries the same examples every time."""

import os

from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# A failure in CI must be the change's, not the seed's; new examples are tried at every run elsewhere, and a failing one is printed as a
# line to paste (`@reproduce_failure`). HYPOTHESIS_PROFILE=ci or =local chooses by hand. No deadline: the machines are shared.
settings.register_profile("ci", derandomize=True, deadline=None, print_blob=True)
settings.register_profile("local", deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "local"))
