"""LLaVA-Video-178K: JSON lists of {id, conversations, data_source, video}, by length and origin, and tar.gz archives of the videos.

Files whose names have `_cap_` hold captions, `_oe_` open questions, `_mc_` multiple choice. `conversations` are in LLaVA's format. The
archives are compressed: unpack each once with gunzip and give the tars as `archives`, or unpack them and give the folder as `media`.
"""

from functools import partial

from fvlm_core.data.sources.adapter import Adapter, Published
from fvlm_core.data.sources.turns import llava_rows

ADAPTER = Adapter(
    name="llava_video",
    title="LLaVA-Video-178K",
    kind="video",
    prompt="",
    homepage="https://huggingface.co/datasets/lmms-lab/LLaVA-Video-178K",
    licence="academic research only: made with OpenAI's models, videos under their own terms",
    citation="Zhang et al. 2024, Video Instruction Tuning with Synthetic Data, arXiv:2410.02713",
    required=("conversations", "video"),
    rows=partial(llava_rows, media=("video",)),
    published=Published(
        samples=1_335_500,
        gigabytes=None,
        hours=14_960.0,
        source="arXiv:2410.02713 and the dataset card: 178,510 videos of 2,000 hours in all, each in several samples",
        parts={"_cap_": 178_510, "_oe_": 960_792, "_mc_": 196_198},
    ),
)
