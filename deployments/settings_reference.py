"""Generate the table of all keys of a profile and a recipe from the types: `python -m deployments.settings_reference [--check]`.

It reads the JSON schema of the settings classes, from which Prefect's form is made too. So a new setting appears here once it is defined
and documented in its class. With `--check` nothing is written, and the exit status is 1 if `docs/settings.md` is not up to date.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

from fvlm_core.config import Recipe
from fvlm_core.settings import Settings
from infra.stack import REPOSITORY
from tasks.config import PipelineConfig

REFERENCE = REPOSITORY / "docs" / "settings.md"
COMMAND = "python -m deployments.settings_reference"
TITLE = f"""# Every setting

Generated from the types by `{COMMAND}`; do not edit. `N` stands for an index in a list, `NAME` for a name that you choose. The
same paths are used in `--set`, in an ablation's `path`, and in error messages."""
PARTS: tuple[tuple[str, str, type[Settings]], ...] = (
    ("Profile", "One YAML file configures the pipeline: `deployments/profiles/`.", PipelineConfig),
    ("Recipe", "One YAML file configures one training run: `deployments/recipes/`, `torchrun -m fvlm_core.train recipe.yaml`.", Recipe),
)
LIMITS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<", "minItems": "of at least", "pattern": "matches"}

Schema = dict[str, Any]


class Key(NamedTuple):
    """A row of the table."""

    path: str
    type: str
    default: str
    text: str


def keys(settings: type[Settings]) -> list[Key]:
    """All keys, in the order of definition; a group of keys that appeared before is replaced by a reference to it."""
    schema = settings.model_json_schema()
    return list(_Walk(schema.get("$defs", {})).keys("", schema))


def reference() -> str:
    """The content of `docs/settings.md`."""
    lines = [TITLE]
    for title, text, settings in PARTS:
        lines += ["", f"## {title}", "", text, "", "| key | type | default | description |", "|---|---|---|---|"]
        lines += [
            "| " + " | ".join((f"`{key.path}`", _cell(key.type), _cell(key.default), _cell(key.text))) + " |" for key in keys(settings)
        ]
    return "\n".join(lines) + "\n"


class _Walk:
    """One pass over a schema; remembers where each group of keys was shown."""

    def __init__(self, definitions: dict[str, Schema]) -> None:
        self.definitions = definitions
        self.shown: dict[str, str] = {}
        """Path of each group, by name of its definition."""

    def keys(self, prefix: str, group: Schema) -> Iterator[Key]:
        """The keys of a group and of the groups in it."""
        for name, node in group.get("properties", {}).items():
            path = f"{prefix}{name}"
            groups = list(self._groups(path, node))
            before = [self.shown.get(definition) for definition, _ in groups]
            text = node.get("description") or " ".join(self.definitions[definition].get("description", "") for definition, _ in groups)
            as_there = " ".join(f"As `{there}`." for there in before if there)
            default = "required" if name in group.get("required", ()) else _default(node)
            yield Key(path, self._type(node), default, f"{text} {as_there}".strip())
            for (definition, inner), there in zip(groups, before, strict=True):
                if there is None:
                    self.shown[definition] = inner
                    yield from self.keys(f"{inner}.", self.definitions[definition])

    def _groups(self, path: str, node: Schema) -> Iterator[tuple[str, str]]:
        """Groups of keys that a value may contain: (name of the definition, path)."""
        if "$ref" in node:
            definition = _name(node)
            if "properties" in self.definitions[definition]:
                yield definition, path
            else:
                yield from self._groups(path, self.definitions[definition])
        for branch in (*node.get("anyOf", ()), *node.get("oneOf", ()), *node.get("allOf", ())):
            yield from self._groups(path, branch)
        for inner, place in ((node.get("items"), "N"), (node.get("additionalProperties"), "NAME")):
            if isinstance(inner, dict):
                yield from self._groups(f"{path}.{place}", inner)
        for inner in node.get("patternProperties", {}).values():
            yield from self._groups(f"{path}.NAME", inner)

    def _type(self, node: Schema) -> str:
        """The type in words, e.g. `integer ≥ 1`, `list of number > 0`, `"ddp" or "fsdp2"`."""
        if "$ref" in node:
            definition = self.definitions[_name(node)]
            return "group" if "properties" in definition else self._type(definition)
        for choice in ("anyOf", "oneOf", "allOf"):
            if choice in node:
                return " or ".join(dict.fromkeys(self._type(branch) for branch in node[choice]))
        if "enum" in node or "const" in node:
            return " or ".join(json.dumps(value) for value in node.get("enum", [node.get("const")]))
        limits = "".join(f" {word} {node[limit]}" for limit, word in LIMITS.items() if limit in node)
        if node.get("type") == "array":
            return f"list{limits}: {self._type(node.get('items', {}))}"
        inner = next(iter(node.get("patternProperties", {}).values()), node.get("additionalProperties"))
        if node.get("type") == "object":
            return f"{self._type(inner)} by name" if isinstance(inner, dict) else "mapping"
        return f"{'path' if node.get('format') == 'path' else node.get('type', 'anything')}{limits}"


def _name(node: Schema) -> str:
    return node["$ref"].rsplit("/", 1)[-1]


def _default(node: Schema) -> str:
    """The default; empty for a group, whose keys have their own defaults, and for a default factory (such as an empty list)."""
    if "default" not in node or isinstance(node["default"], dict):
        return ""
    return f"`{json.dumps(node['default'])}`".replace(f"{REPOSITORY}/", "")  # independent of where the checkout is


def _cell(text: str) -> str:
    """Put text on one line, and escape the characters that would end the cell."""
    return " ".join(text.split()).replace("|", "\\|")


def main() -> int:
    """Write the file, or check that it is up to date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with status 1 if the file is not up to date")
    options = parser.parse_args()
    text = reference()
    if options.check:
        if REFERENCE.is_file() and REFERENCE.read_text() == text:
            return 0
        print(f"error: {REFERENCE} is not up to date with the settings' types\n  fix: {COMMAND}", file=sys.stderr)
        return 1
    REFERENCE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
