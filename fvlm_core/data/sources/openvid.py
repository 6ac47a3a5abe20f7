"""OpenVid-1M: its csv (`OpenVid-1M.csv`, `OpenVidHD.csv`) names in `video` the files of its zip archives.

Give the archives as the source's `archives`: they need not be unpacked, and split archives (`OpenVid_part73_partaa`, ...) need not be
joined. Or give the folder that they were unpacked into as `media`. Filters may use the other columns, such as `aesthetic score` or
`seconds`.
"""

from fvlm_core.data.sources.adapter import Adapter, Published, renamed

COLUMNS = {"video": "url", "caption": "caption"}

ADAPTER = Adapter(
    name="openvid",
    title="OpenVid-1M",
    kind="video",
    prompt="What would be the OpenVid caption for this video?",
    homepage="https://huggingface.co/datasets/nkp37/OpenVid-1M",
    licence="CC-BY-4.0",
    citation="Nan et al. 2024, OpenVid-1M: A Large-Scale High-Quality Dataset for Text-to-video Generation, arXiv:2407.02371",
    required=tuple(COLUMNS),
    rows=renamed(COLUMNS),
    published=Published(
        samples=1_019_957,
        gigabytes=6976.0,
        hours=2051.0,
        source="arXiv:2407.02371; size: 3,488 shards of 2 GB of the same files (Dev-Jahn/OpenVid-1M-wds)",
    ),
)
