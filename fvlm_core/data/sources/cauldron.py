"""The Cauldron: 50 configurations of parquet with `images` (their bytes) and `texts`, a list of {user, assistant, source}.

All questions about the same images become one conversation of several turns, as in Idefics2's training. Filters see `images` as the
number of images in the row.
"""

import pyarrow as pa

from fvlm_core.data.sources.adapter import ROW_NUMBER, Adapter, Published
from fvlm_core.data.sources.turns import batch_of, conversations, pairs

SAMPLES = {
    "ai2d": 2434,
    "aokvqa": 16539,
    "chart2text": 26961,
    "chartqa": 18265,
    "clevr": 70000,
    "clevr_math": 70000,
    "cocoqa": 46287,
    "datikz": 47974,
    "diagram_image_to_text": 300,
    "docvqa": 10189,
    "dvqa": 200000,
    "figureqa": 100000,
    "finqa": 5276,
    "geomverse": 9303,
    "hateful_memes": 8500,
    "hitab": 2500,
    "iam": 5663,
    "iconqa": 27307,
    "infographic_vqa": 2118,
    "intergps": 1280,
    "localized_narratives": 199998,
    "mapqa": 37417,
    "mimic_cgd": 70939,
    "multihiertt": 7619,
    "nlvr2": 50426,
    "ocrvqa": 165746,
    "okvqa": 8998,
    "plotqa": 157070,
    "raven": 42000,
    "rendered_text": 10000,
    "robut_sqa": 8514,
    "robut_wikisql": 74989,
    "robut_wtq": 38246,
    "scienceqa": 4976,
    "screen2words": 15730,
    "spot_the_diff": 8566,
    "st_vqa": 17247,
    "tabmwp": 22722,
    "tallyqa": 98680,
    "tat_qa": 2199,
    "textcaps": 21953,
    "textvqa": 21953,
    "tqa": 1493,
    "vistext": 9969,
    "visual7w": 14366,
    "visualmrc": 3027,
    "vqarad": 313,
    "vqav2": 82772,
    "vsr": 2157,
    "websight": 10000,
}
"""Number of rows of each configuration."""


def rows(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Return a row per published row. Rows without images, or with missing questions or answers, are left out."""
    made = []
    for number, texts in enumerate(batch.column("texts").to_pylist()):
        questions = [(turn["user"] or "").strip() for turn in texts or ()]
        answers = [(turn["assistant"] or "").strip() for turn in texts or ()]
        if turns := pairs(questions, answers):
            made.append({ROW_NUMBER: number, "conversations": conversations(turns)})
    return batch_of(made)


ADAPTER = Adapter(
    name="cauldron",
    title="The Cauldron",
    kind="image",
    prompt="",
    homepage="https://huggingface.co/datasets/HuggingFaceM4/the_cauldron",
    licence="that of each of its 50 datasets; the prompts CC-BY-4.0",
    citation="Laurençon, Tronchon, Cord and Sanh 2024, What matters when building vision-language models?, arXiv:2405.02246",
    required=("texts",),
    embedded=("images",),
    rows=rows,
    published=Published(
        samples=sum(SAMPLES.values()),
        gigabytes=169.0,
        hours=None,
        source="the dataset card: num_examples of each configuration",
        parts=SAMPLES,
    ),
)
