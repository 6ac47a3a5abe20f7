"""Copy modules of this project into one flat folder in which they work without the project, so that there is one source of truth.

transformers loads a repository's code from a flat folder of files with relative imports. So every module that the hub's model, processor
and configuration use is copied, with its `fvlm_core` imports made relative, and reduced to the definitions that they reach. Code that
builds, saves and validates models (and needs pydantic) is not copied. Settings classes are replaced by plain classes of the same names.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

PACKAGE = "fvlm_core"
HUB = f"{PACKAGE}.release.hub"
ROOTS = (f"{HUB}.configuration_fvlm", f"{HUB}.modeling_fvlm", f"{HUB}.processing_fvlm")
"""Copied completely."""
CONFIGURATION = f"{HUB}.configuration_fvlm"
REPLACED = {
    (f"{PACKAGE}.config", "ModelSettings"): (CONFIGURATION, "ModelSettings"),
    (f"{PACKAGE}.config", "GlanceSettings"): (CONFIGURATION, "GlanceSettings"),
    (f"{PACKAGE}.config", "LossSettings"): (CONFIGURATION, "LossSettings"),
}
"""Definitions with a different version on the hub: (module, name) in this project -> (module, name) on the hub."""
NOTE = "# Made from {origin} of fVLM {version} when the model was released; change it there.\n"

Name = tuple[str, str]
"""(Module, name in it)."""


@dataclass
class Definition:
    """A top-level statement, with the comments above and the docstring below it."""

    names: list[str]
    node: ast.stmt
    first_line: int
    last_line: int


@dataclass
class Module:
    """A parsed module of the project."""

    name: str
    lines: list[str]
    docstring_end: int
    definitions: list[Definition] = field(default_factory=list)
    imports: dict[str, tuple[ast.Import | ast.ImportFrom, ast.alias]] = field(default_factory=dict)
    reached: set[int] = field(default_factory=set)
    """Indexes of the definitions to copy."""
    used: set[str] = field(default_factory=set)
    """Names of the imports to copy."""

    @property
    def file_name(self) -> str:
        """The module's file in the flat folder."""
        last = self.name.rsplit(".", 1)[1]
        return f"{last}.py" if self.name in ROOTS else f"fvlm_{last}.py"

    @property
    def any_name(self) -> str:
        """Some name that can be imported from the module's file."""
        return next(name for index in sorted(self.reached) for name in self.definitions[index].names)

    @classmethod
    def parse(cls, name: str) -> "Module":
        spec = find_spec(name)
        assert spec is not None
        assert spec.origin is not None
        source = Path(spec.origin).read_text()
        lines, body = source.splitlines(), ast.parse(source).body
        module = cls(name, lines, body[0].end_lineno or 0)
        for node in body[1:]:
            if isinstance(node, ast.Import | ast.ImportFrom):
                module.imports |= {alias.asname or alias.name.split(".")[0]: (node, alias) for alias in node.names}
            elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):  # the docstring of the assignment above
                module.definitions[-1].last_line = node.end_lineno or 0
            else:
                module.definitions.append(_definition(node, lines))
        return module


def export(folder: Path, version: str) -> list[str]:
    """Write the hub's modules and all they reach into `folder`; returns the file names. Raises ValueError if they cannot be flattened."""
    modules: dict[str, Module] = {}
    waiting: list[Name] = [(root, "*") for root in ROOTS]
    while waiting:
        where, name = waiting.pop()
        if where not in modules:
            modules[where] = Module.parse(where)
        waiting.extend(_reach(modules[where], name))
    names = [module.file_name for module in modules.values()]
    if len(set(names)) < len(names):
        raise ValueError(f"two modules have the same file name: {sorted(names)}")
    for module in modules.values():
        (folder / module.file_name).write_text(_text(module, modules, version))
    return sorted(names)


def _definition(node: ast.stmt, lines: list[str]) -> Definition:
    decorators = getattr(node, "decorator_list", [])
    first = min([node.lineno, *(decorator.lineno for decorator in decorators)])
    while first > 1 and lines[first - 2].startswith("#"):
        first -= 1
    names: list[str] = []
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        names = [node.name]
    elif isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        names = [part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)]
    return Definition(names, node, first, node.end_lineno or 0)


def _reach(module: Module, name: str) -> Iterator[Name]:
    """Mark a name (`*` for all) as reached; yields the names that it uses."""
    for index, definition in enumerate(module.definitions):
        # statements that define no name are kept for their side effects, such as a registration
        if index in module.reached or not (name == "*" or name in definition.names or not definition.names):
            continue
        module.reached.add(index)
        for used in _names_in(definition):
            yield from _follow(module, used)
    if name in module.imports:
        yield from _follow(module, name)


def _follow(module: Module, name: str) -> Iterator[Name]:
    if name in module.imports:
        module.used.add(name)
        node, alias = module.imports[name]
        origin = node.module if isinstance(node, ast.ImportFrom) else None
        if origin is None or origin.split(".")[0] != PACKAGE:
            return
        target = REPLACED.get((origin, alias.name), (origin, alias.name))
        spec = find_spec(f"{origin}.{alias.name}") if origin == PACKAGE or _is_package(origin) else None
        if spec is not None:
            raise ValueError(f"{module.name} reaches the module {origin}.{alias.name} by its name: import names from it")
        yield target
    elif any(name in definition.names for definition in module.definitions):
        yield module.name, name


def _is_package(name: str) -> bool:
    spec = find_spec(name)
    return spec is not None and spec.submodule_search_locations is not None


def _names_in(definition: Definition) -> set[str]:
    """Names that a definition uses, including those in quoted annotations."""
    names: set[str] = set()
    for part in ast.walk(definition.node):
        if isinstance(part, ast.Name):
            names.add(part.id)
        elif isinstance(part, ast.Constant) and isinstance(part.value, str) and part.value.isidentifier():
            names.add(part.value)
    return names


def _text(module: Module, modules: dict[str, Module], version: str) -> str:
    """The content of the module's file."""
    origin = module.name.replace(".", "/") + ".py"
    parts = ["\n".join([NOTE.format(origin=origin, version=version), *module.lines[: module.docstring_end]]), _imports(module, modules)]
    for index, definition in enumerate(module.definitions):
        if index in module.reached:
            parts.append("\n".join(module.lines[definition.first_line - 1 : definition.last_line]))
    return "\n\n\n".join(part for part in parts if part) + "\n"


def _imports(module: Module, modules: dict[str, Module]) -> str:
    """The used imports; those of the project are made relative."""
    packages: dict[str, list[str]] = {}
    for name in sorted(module.used):
        node, alias = module.imports[name]
        if isinstance(node, ast.Import):
            packages.setdefault(f"import {alias.name}" + (f" as {alias.asname}" if alias.asname else ""), [])
            continue
        origin, original = node.module or "", alias.name
        if origin.split(".")[0] == PACKAGE:
            origin, original = REPLACED.get((origin, original), (origin, original))
            origin = f".{modules[origin].file_name.removesuffix('.py')}"
        packages.setdefault(f"from {origin} import ", []).append(original if original == name else f"{original} as {name}")
    lines = [head + ", ".join(names) for head, names in sorted(packages.items(), key=lambda item: (" ." in item[0], item[0]))]
    if module.name in ROOTS and (hidden := _hidden(module, modules)):
        lines.append("# transformers 5.0 copies only modules that this file imports itself")
        lines += [f"from .{other.file_name.removesuffix('.py')} import {other.any_name}  # noqa: F401" for other in hidden]
    return "\n".join(lines)


def _hidden(module: Module, modules: dict[str, Module]) -> list[Module]:
    """The modules that a root imports only indirectly."""
    direct = _imported(module)
    found, waiting = set(direct), list(direct)
    while waiting:
        new = _imported(modules[waiting.pop()]) - found
        found |= new
        waiting.extend(new)
    return [modules[name] for name in sorted(found - direct - {module.name})]


def _imported(module: Module) -> set[str]:
    """The project's modules that a module imports directly."""
    imports = [
        (node.module or "", alias.name)
        for node, alias in (module.imports[name] for name in module.used)
        if isinstance(node, ast.ImportFrom)
    ]
    return {REPLACED.get(one, one)[0] for one in imports if one[0].split(".")[0] == PACKAGE}
