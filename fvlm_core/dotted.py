"""Read, change and list settings by dotted path, e.g. `optimizer.lr_llm` or `loss.fine.0`.

Values are JSON-like: nested dicts and lists. A number in a path is an index into a list. A key may itself contain dots
(`reports.grid-2.00e09`): the longest matching key wins.
"""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any


class UnknownPathError(KeyError):
    """There is no value at `path`; `known` lists the keys at the level where the lookup failed."""

    def __init__(self, path: str, known: list[str]) -> None:
        super().__init__(path)
        self.path, self.known = path, known

    def __str__(self) -> str:
        return f"no setting {self.path!r}; at that level there is: {', '.join(self.known) or 'no deeper key'}"


def value_at(values: Any, path: str) -> Any:
    """The value at `path`. Raises UnknownPathError."""
    node, slot = _place(values, path)
    return node[slot]


def with_changes(values: Any, changes: Mapping[str, Any]) -> Any:
    """A copy of `values` with the value at each path replaced. Raises UnknownPathError for a path that does not exist."""
    values = deepcopy(values)
    for path, value in changes.items():
        node, slot = _place(values, path)
        node[slot] = deepcopy(value)
    return values


def flatten(values: Any, *, lists: bool = False, prefix: str = "") -> dict[str, Any]:
    """The leaf values by dotted path. A list is a leaf, unless `lists` is set; empty dicts and lists are always leaves."""
    items = values.items() if isinstance(values, dict) else enumerate(values) if lists and isinstance(values, list) else ()
    found: dict[str, Any] = {}
    for key, value in items:
        found |= flatten(value, lists=lists, prefix=f"{prefix}.{key}" if prefix else str(key))
    return found or ({prefix: values} if prefix else {})


def differences(before: Any, after: Any) -> dict[str, tuple[Any, Any]]:
    """The (before, after) values of all paths that differ; None stands for a missing value. Lists are compared item by item."""
    old, new = flatten(before, lists=True), flatten(after, lists=True)
    missing = object()
    paths = sorted(path for path in old.keys() | new.keys() if old.get(path, missing) != new.get(path, missing))
    return {path: (old.get(path), new.get(path)) for path in paths}


def _place(values: Any, path: str) -> tuple[Any, Any]:
    """The dict or list that holds the value at `path`, and the value's key or index in it. Raises UnknownPathError."""
    node, keys = values, path.split(".")
    while True:
        fitting = next((end for end in range(len(keys), 1, -1) if isinstance(node, dict) and ".".join(keys[:end]) in node), 1)
        slot = _slot(node, ".".join(keys[:fitting]), path)
        keys = keys[fitting:]
        if not keys:
            return node, slot
        node = node[slot]


def _slot(node: Any, key: str, path: str) -> Any:
    """The key or index in `node` that the path component `key` refers to."""
    if isinstance(node, dict) and key in node:
        return key
    if isinstance(node, list) and key.isdecimal() and int(key) < len(node):
        return int(key)
    known = list(node) if isinstance(node, dict) else [str(index) for index in range(len(node))] if isinstance(node, list) else []
    raise UnknownPathError(path, known)
