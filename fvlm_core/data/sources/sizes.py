"""Published sizes of a profile's sources, to plan a run before anything is downloaded."""

import glob
from collections.abc import Sequence
from pathlib import Path

from fvlm_core.data.jobs import Source
from fvlm_core.data.sources import ADAPTERS
from fvlm_core.tables import Table

HEAD = ["source", "dataset", "samples", "of", "GB", "hours of video", "licence", "files"]


def sources_table(sources: Sequence[Source]) -> Table:
    """Return a table with a row per source: how much of it is used, and whether its files exist."""
    rows = [_row(source) for source in sources]
    known = [size for source in sources if (size := source.published)]
    sizes = ([one.samples for one in known], [one.gigabytes for one in known], [one.hours for one in known])
    samples, size, hours = (sum(filter(None, column)) for column in sizes)
    total = ["all", "", _number(samples), "", _number(size), _number(hours), "", ""]
    unknown = [name for name, column in zip(("bytes", "hours"), sizes[1:], strict=True) if None in column]
    note = "Samples, bytes and hours are published numbers, scaled to what is used (bytes: to the files, which are needed in full). \
What a filter leaves out is not known in advance."
    if unknown:
        note += f" Not all authors publish {' and '.join(unknown)}: the sum covers those that do."
    return Table(title="Sources", head=HEAD, rows=[*rows, total] if len(known) > 1 else rows, note=note)


def too_large(sources: Sequence[Source], volume_gb: int) -> str | None:
    """Return a warning if the sources' files are known to need more space than the volume has, else None."""
    here = [source for source in sources if not source.web_archives]
    known = {source.name: size.gigabytes for source in here if (size := source.published) and size.gigabytes is not None}
    if (needed := sum(known.values())) <= volume_gb:
        return None
    unknown = ", ".join(source.name for source in here if source.name not in known)
    more = f", and {unknown}, whose sizes are not published," if unknown else ""
    return f"The volume has {volume_gb:,} GB; {', '.join(known)} take {needed:,.0f} GB{more} and the shards come on top: \
raise machine.rental.volume_gb, or name fewer files."


def missing_files(source: Source) -> list[Path]:
    """Return the source's files, archives and media folder that do not exist; for a pattern without matches, the pattern."""
    named = [*source.files, *source.archives, *([source.media] if source.media else [])]
    return [path for path in named if not path.exists() and not glob.glob(str(path))]


def _row(source: Source) -> list[str]:
    adapter, size = ADAPTERS[source.format], source.published
    numbers = ["", "", "", ""]
    if size and adapter.published:
        numbers = [_number(size.samples), _number(adapter.published.samples), _number(size.gigabytes), _number(size.hours)]
    there = "not there" if missing_files(source) else "in a store" if source.stored else "there"
    web = f"; {len(source.web_archive_addresses)} archives on the web" if source.web_archives else ""
    return [source.name, adapter.title, *numbers, adapter.licence, there + web]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"
