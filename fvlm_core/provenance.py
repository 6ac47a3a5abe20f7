"""The code that produced a result: the repository's files that a job imports (transitively), and the versions of its libraries.

A manifest records both. Code is not part of a step's cache key, because then a changed comment would invalidate every result. Instead, a
result of other code is reported, or recomputed if the profile says so.
"""

import ast
import contextlib
import hashlib
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import metadata
from pathlib import Path

PACKAGE = "fvlm_core"
ROOT = Path(__file__).resolve().parents[1]
"""The folder that code paths are relative to: the checkout, or the folder in which the package is installed."""
LIBRARIES = ("torch", "transformers", "webdataset", "av", "numpy")
"""Libraries whose version can affect a result."""
COMMIT_FILE = ".commit"
"""Holds the commit in a copy of the checkout without .git, as used on rented machines (`infra.runpod.code`)."""
DIGEST_LENGTH = 16
"""Number of hex digits kept of a file's sha256; enough to detect a change."""


def job_code() -> dict[str, str]:
    """Digests, by path, of the repository's files that the running job's module imports; empty outside a job."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    name = spec.name.removesuffix(".__main__") if spec else ""
    return {path: digest(path) for path in imported_files(name)} if name.split(".")[0] == PACKAGE else {}


@cache
def imported_files(module: str) -> tuple[str, ...]:
    """Paths, relative to `ROOT`, of the repository's files that `module` imports (transitively), including imports inside functions."""
    found: dict[str, Path] = {}
    waiting = [module, f"{module}.__main__"]
    while waiting:
        name = waiting.pop()
        path = _file_of(name)
        if path is None or name in found:
            continue
        found[name] = path
        waiting += _imports(name, path)
        waiting += [name.rpartition(".")[0]] if "." in name else []  # a package's __init__ runs first
    return tuple(sorted(path.relative_to(ROOT).as_posix() for path in found.values()))


@cache
def digest(path: str) -> str:
    """Current digest of the file at `path`, relative to `ROOT`; empty if there is no such file."""
    try:
        return hashlib.sha256((ROOT / path).read_bytes()).hexdigest()[:DIGEST_LENGTH]
    except OSError:
        return ""


def cache_digests(module: str) -> None:
    """Cache the current digests of the code that `module` imports, for this process and all processes forked from it."""
    for path in imported_files(module):
        digest(path)
    versions()
    commit()


@cache
def versions() -> dict[str, str]:
    """Versions of Python and of `LIBRARIES`."""
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in LIBRARIES}


@cache
def commit() -> str:
    """The checkout's commit, with the suffix `+changes` if files differ from it; empty if there is neither a git checkout nor `.commit`."""
    with contextlib.suppress(OSError):
        return (ROOT / COMMIT_FILE).read_text().strip()
    try:
        described = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"]
        return subprocess.run(described, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def changes(code: Mapping[str, str], made_with: Mapping[str, str]) -> list[str]:
    """Differences between the current code and libraries and those that produced a result, one clause each; empty if there are none."""
    lines = [f"{path} has {'changed' if digest(path) else 'gone'}" for path, before in code.items() if digest(path) != before]
    now = versions()
    return lines + [f"{name} was {before} and is {now[name]}" for name, before in made_with.items() if now.get(name, before) != before]


def _imports(name: str, path: Path) -> Iterator[str]:
    """Names of the modules that a file imports anywhere, except under `if TYPE_CHECKING`."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in _nodes(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (above, node.module) if part)
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)  # each may be a module or an attribute of one


def _nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes of a tree, except those under `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"):
            yield node
            yield from _nodes(node)


def _file_of(module: str) -> Path | None:
    """The file of a module of this package; None for other packages and for names that are not modules."""
    parts = module.split(".")
    if parts[0] != PACKAGE:
        return None
    place = ROOT.joinpath(*parts)
    return next((path for path in (place / "__init__.py", place.with_suffix(".py")) if path.is_file()), None)
