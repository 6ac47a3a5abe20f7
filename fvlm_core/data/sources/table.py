"""A table of videos: csv or parquet with the columns `url` and `caption`, and optional ones for what is asked about a video.

| column | meaning | default |
|---|---|---|
| source | lower-case name of the source | the name in the profile |
| kind | video or image (a still) | video |
| split | train, val, or empty: decided by a hash of the url | empty |
| conversations | JSON: a list of conversations, each a list of {question, answer}; the last may have {rejected} too, an answer \
that is worse | the source's prompt and the caption |
| probes | JSON: per conversation null or {task, choices, answer_index, cells} | null |
| extra | JSON: further fields of the sample | {} |

A `url` is an http(s) address or a file: `file:///...`, an absolute path, or one that starts at the table's folder.
"""

from fvlm_core.data.rows import COLUMNS, REQUIRED
from fvlm_core.data.sources.adapter import DEFAULT_PROMPT, Adapter

ADAPTER = Adapter(
    name="table",
    title="A table of one's own",
    kind="video",
    prompt=DEFAULT_PROMPT,
    homepage="",
    licence="the owner's",
    citation="",
    required=REQUIRED,
    optional=tuple(name for name in COLUMNS if name not in REQUIRED),
    rows=lambda batch: batch,
)
