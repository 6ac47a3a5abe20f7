"""OpenVid-1M: its csv (`OpenVid-1M.csv`, `OpenVidHD.csv`) names the files of its unpacked zip archives in `video`.

Give the folder they were unpacked into as the source's `media`. Filters may use its other columns, such as `aesthetic score`.
"""

from fvlm_core.data.sources.adapter import Adapter, renamed

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
)
