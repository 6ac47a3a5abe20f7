"""FineVideo split into scenes: a row per scene of a film, with its time range and what happens in it."""

import re
from dataclasses import replace
from typing import Any

import pyarrow as pa

from fvlm_core.data.sources import finevideo
from fvlm_core.data.sources.adapter import ROW_NUMBER, Published
from fvlm_core.data.sources.turns import batch_of

TIME = re.compile(r"(?:(\d+):)?(\d+):(\d+(?:\.\d+)?)")
"""`00:01:05.250`; the hours are optional."""


def rows(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Return a row per scene that has a time range and a description."""
    made = []
    for number, about in enumerate(batch.column(finevideo.ABOUT).to_pylist()):
        for scene in (about or {}).get("scenes") or []:
            activities: list[dict[str, Any]] = scene.get("activities") or []
            words = [(one["description"] or "").strip().rstrip(".") for one in activities]
            window = _window([scene.get("timestamps"), *(one.get("timestamp") for one in activities)])
            if window and any(words):
                start, end = window
                made.append({ROW_NUMBER: number, "url": f"t={start:.3f},{end:.3f}", "caption": ". ".join(filter(None, words)) + "."})
    return batch_of(made)


def _window(stamps: list[dict[str, Any] | None]) -> tuple[float, float] | None:
    """Return the scene's own time range, else that of all its activities; None if it is empty."""
    own, *inner = [_seconds(stamp) for stamp in stamps]
    found = [own] if own else [stamp for stamp in inner if stamp]
    start, end = (min(s for s, _ in found), max(e for _, e in found)) if found else (0.0, 0.0)
    return (start, end) if end > start else None


def _seconds(stamp: dict[str, Any] | None) -> tuple[float, float] | None:
    ends = [TIME.fullmatch((stamp or {}).get(f"{end}_timestamp") or "") for end in ("start", "end")]
    if not all(ends):
        return None
    start, end = (int(one[1] or 0) * 3600 + int(one[2]) * 60 + float(one[3]) for one in ends if one)
    return start, end


ADAPTER = replace(
    finevideo.ADAPTER,
    name="finevideo_scenes",
    title="FineVideo, by scene",
    prompt="Which activities would FineVideo list for this scene?",
    rows=rows,
    published=Published(
        samples=43_751 * 3, gigabytes=600.0, hours=3425.0, source="the dataset card: films; scenes are estimated at three a film"
    ),
)
