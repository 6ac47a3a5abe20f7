"""VISTA-400K: a JSON list per subset, and tars of its videos beside it.

`conversations` are in LLaVA's format. The video's path is in `video`, or in `image`, where the authors' own loader expects it.
"""

from functools import partial

from fvlm_core.data.sources.adapter import Adapter, Published
from fvlm_core.data.sources.turns import llava_rows

ADAPTER = Adapter(
    name="vista",
    title="VISTA-400K",
    kind="video",
    prompt="",
    homepage="https://huggingface.co/datasets/TIGER-Lab/VISTA-400K",
    licence="MIT",
    citation="Ren et al. 2024, VISTA: Enhancing Long-Duration and High-Resolution Video Understanding by "
    "Video Spatiotemporal Augmentation, arXiv:2412.00927",
    required=("conversations", "video"),
    instead={"video": ("image",)},
    rows=partial(llava_rows, media=("video", "image")),
    published=Published(samples=400_000, gigabytes=None, hours=None, source="its name and arXiv:2412.00927, rounded"),
)
