"""The base of every settings class: frozen, closed to unknown keys, hashed by value, loaded from YAML with clear errors."""

import hashlib
import json
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from fvlm_core.errors import UserError


class Settings(BaseModel):
    """A frozen pydantic model whose field docstrings are its documentation (and the UI form's)."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())

    def hash(self, *, exclude: set[str] | None = None) -> str:
        """sha256 of the canonical JSON of the values, without the top-level fields in `exclude`."""
        return hash_json(self.model_dump(mode="json", exclude=exclude))

    @classmethod
    def from_yaml(cls, path: Path) -> Self:
        """Read a YAML file. Raises UserError naming the key, the file and what is allowed."""
        return cls.from_values(read_yaml(path), where=str(path))

    @classmethod
    def from_values(cls, values: Any, *, where: str) -> Self:
        """Validate plain values that came from `where`. Raises UserError as `from_yaml` does."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise UserError(explain(error, cls), where=where, fix="correct the keys named above") from error

    def with_changes(self, changes: dict[str, Any], *, where: str = "changes") -> Self:
        """A copy with dotted paths replaced, e.g. `{"model.temperature": 0.5}`; validated as a whole.

        An index reaches into a list: `"loss.fine.0"`. Raises UserError for a path that does not exist.
        """
        values = self.model_dump(mode="json")
        for path, value in changes.items():
            *parents, last = path.split(".")
            node: Any = values
            try:
                for key in parents:
                    node = node[int(key)] if isinstance(node, list) else node[key]
                slot: Any = int(last) if isinstance(node, list) else last
                node[slot]  # only existing settings can be changed
                node[slot] = value
            except (KeyError, IndexError, TypeError, ValueError) as error:
                allowed = ", ".join(node) if isinstance(node, dict) else "no deeper key"
                raise UserError(f"no setting {path!r}", where=where, fix=f"at that level there is: {allowed}") from error
        return type(self).from_values(values, where=f"{where} ({', '.join(changes)})")

    def to_yaml(self, path: Path) -> None:
        """Write the values as YAML."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False))


def hash_json(value: Any) -> str:
    """sha256 hex of a JSON-able value in canonical form (sorted keys, no spaces)."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_yaml(path: Path) -> Any:
    """Parse a YAML file. Raises UserError when it is missing or not YAML."""
    try:
        return yaml.safe_load(path.read_text())
    except FileNotFoundError as error:
        raise UserError("settings file not found", where=str(path), fix="check the path") from error
    except (yaml.YAMLError, UnicodeDecodeError, IsADirectoryError) as error:
        raise UserError(f"not a readable YAML file: {error}", where=str(path), fix="correct the file") from error


def explain(error: ValidationError, cls: type[BaseModel]) -> str:
    """A line per fault: the dotted key, what was wrong, and for an unknown key the keys that exist there."""
    lines = []
    for fault in error.errors(include_url=False):
        key = ".".join(str(part) for part in fault["loc"]) or "(top level)"
        if fault["type"] == "extra_forbidden":
            lines.append(f"unknown key {key!r}; allowed here: {', '.join(_allowed_keys(cls, fault['loc'][:-1]))}")
        else:
            lines.append(f"{key}: {fault['msg']} (got {fault['input']!r:.80})")
    return "\n  ".join(lines)


def _allowed_keys(cls: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """The field names of the model that `loc` points at, found through the JSON schema."""
    schema = cls.model_json_schema()
    definitions, node = schema.get("$defs", {}), schema
    for part in loc:
        named = node.get("properties", {}).get(part) or next(iter(node.get("patternProperties", {}).values()), None)
        inside = node.get("items") if isinstance(part, int) else named or node.get("additionalProperties")
        node = _resolve(inside if isinstance(inside, dict) else {}, definitions)
    return sorted(_resolve(node, definitions).get("properties", {}))


def _resolve(node: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """Follow a `$ref`, or the one branch of an optional that is an object."""
    for branch in node.get("anyOf", node.get("allOf", [])):
        if "$ref" in branch:
            node = branch
    if "$ref" in node:
        return definitions[node["$ref"].rsplit("/", 1)[-1]]
    return node
