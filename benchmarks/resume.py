"""Resume under fire: random kills of running pipelines, and whether they end with the same weights and the same order of samples.

The campaign itself, its options and what it kills: `tests/campaign/kill_campaign.py`.
"""

import sys

from tests.campaign.kill_campaign import main

if __name__ == "__main__":
    sys.exit(main())
