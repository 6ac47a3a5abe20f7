"""Modules import each other in no circle, so that each can be read after those that it imports; the arrows are import-linter's."""

import tomllib
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import grimp

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Imports in functions and for types alone count too; that a module started as a program imports itself by its name does not."""
    graph = grimp.build_graph(*PROJECT["tool"]["importlinter"]["root_packages"], cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) - {module} for module in graph.modules}
    assert circle_in(imports) == []


def circle_in(imports: dict[str, set[str]]) -> list[str]:
    """The modules of a circle, each imported by the next; none where there is no circle."""
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_a_circle_is_found() -> None:
    assert circle_in({"a": {"b"}, "b": {"c"}, "c": {"b"}}) in (["b", "c", "b"], ["c", "b", "c"])
    assert circle_in({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
