"""The base of all settings classes: frozen, without unknown keys, hashed by value, loaded from YAML with clear errors."""

import hashlib
import json
import os
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, ValidationInfo

from fvlm_core import dotted
from fvlm_core.errors import UserError


class _Execution:
    """Marks a setting that affects how a job runs but not its result; see `EXECUTION`."""


EXECUTION = _Execution()
"""In `Annotated[int, EXECUTION]`: excludes the field from the settings' identity, so that changing it invalidates no result."""


def _profile_path(path: Path, info: ValidationInfo) -> Path:
    folder: Path | None = (info.context or {}).get(FOLDER)
    return path if folder is None else Path(os.path.normpath(folder / path.expanduser()))


def _name_or_folder(name: str, info: ValidationInfo) -> str:
    folder: Path | None = (info.context or {}).get(FOLDER)
    if folder is None or not (name.startswith(LOCAL_STARTS) or (folder / name).is_dir()):
        return name
    return str(_profile_path(Path(name), info))


FOLDER = "folder"
"""Key in pydantic's validation context: the folder of the file that the values come from."""
LOCAL_STARTS = ("./", "../", "~", "/")
ProfilePath = Annotated[Path, AfterValidator(_profile_path)]
"""A path that is resolved against the folder of the profile that contains it; unchanged if the values do not come from a profile."""
NameOrFolder = Annotated[str, AfterValidator(_name_or_folder)]
"""A hub name, or a local folder that is resolved like `ProfilePath`: it starts with ./, ../, ~ or /, or exists beside the profile."""


class Settings(BaseModel):
    """A frozen pydantic model whose field docstrings document the settings, also in the UI's form."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())

    def hash(self, *, exclude: set[str] | None = None) -> str:
        """sha256 of the canonical JSON of the settings' identity, without the top-level fields in `exclude`."""
        return hash_json({name: value for name, value in self.identity_values().items() if name not in (exclude or ())})

    def identity_values(self) -> dict[str, Any]:
        """The values in JSON form, without the fields marked `EXECUTION` at any depth."""
        values = self.model_dump(mode="json")
        return {
            name: _identity(getattr(self, name), values[name])
            for name, field in type(self).model_fields.items()
            if EXECUTION not in field.metadata
        }

    @classmethod
    def from_yaml(cls, path: Path) -> Self:
        """Read a YAML file. Raises UserError that names the file, the invalid key and the allowed values."""
        return cls.from_values(read_yaml(path), where=str(path))

    @classmethod
    def from_values(cls, values: Any, *, where: str, folder: Path | None = None) -> Self:
        """Validate plain values; `where` names their origin in errors, and `folder` is the base of relative paths (see `ProfilePath`).

        Raises UserError as `from_yaml` does.
        """
        try:
            return cls.model_validate(values, context={FOLDER: folder})
        except ValidationError as error:
            raise UserError(explain(error, cls), where=where, fix="correct the keys named above") from error

    def with_changes(self, changes: dict[str, Any], *, where: str = "changes", folder: Path | None = None) -> Self:
        """A fully validated copy with the values at dotted paths replaced, e.g. `{"model.temperature": 0.5}`.

        A number indexes a list: `"loss.fine.0"`. Relative file paths among the new values (see `ProfilePath`) are resolved against
        `folder`, if given. Raises UserError for a dotted path that does not exist.
        """
        try:
            values = dotted.with_changes(self.model_dump(mode="json"), changes)
        except dotted.UnknownPathError as error:
            raise UserError(
                f"no setting {error.path!r}", where=where, fix=f"at that level there is: {', '.join(error.known) or 'no deeper key'}"
            ) from error
        where = f"{where} ({', '.join(changes)})"
        changed = type(self).from_values(values, where=where, folder=folder)
        if folder is None:
            return changed
        # validate again without the folder: only the new values' paths are relative to it, not the existing ones
        placed = changed.model_dump(mode="json")
        return type(self).from_values(dotted.with_changes(values, {path: dotted.value_at(placed, path) for path in changes}), where=where)

    def to_yaml(self, path: Path) -> None:
        """Write the values as YAML."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False))


def _identity(value: Any, dumped: Any) -> Any:
    """`dumped` (the JSON form of `value`) without fields marked `EXECUTION`."""
    if isinstance(value, Settings):
        return value.identity_values()
    if isinstance(value, dict):
        return {key: _identity(part, one) for part, (key, one) in zip(value.values(), dumped.items(), strict=True)}
    if isinstance(value, list | tuple):
        return [_identity(part, one) for part, one in zip(value, dumped, strict=True)]
    return dumped


def hash_json(value: Any) -> str:
    """sha256 hex of a JSON-able value in canonical form (sorted keys, no spaces)."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_yaml(path: Path) -> Any:
    """Parse a YAML file. Raises UserError if it is missing or not YAML."""
    try:
        return yaml.safe_load(path.read_text())
    except FileNotFoundError as error:
        raise UserError("settings file not found", where=str(path), fix="check the path") from error
    except (yaml.YAMLError, UnicodeDecodeError, IsADirectoryError) as error:
        raise UserError(f"not a readable YAML file: {error}", where=str(path), fix="correct the file") from error


def explain(error: ValidationError, cls: type[BaseModel]) -> str:
    """One line per validation error: the dotted key and the problem; for an unknown key, also the keys that are allowed there."""
    lines = []
    for fault in error.errors(include_url=False):
        key = ".".join(str(part) for part in fault["loc"]) or "(top level)"
        if fault["type"] == "extra_forbidden":
            lines.append(f"unknown key {key!r}; allowed here: {', '.join(_allowed_keys(cls, fault['loc'][:-1]))}")
        else:
            lines.append(f"{key}: {fault['msg']} (got {fault['input']!r:.80})")
    return "\n  ".join(lines)


def _allowed_keys(cls: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """The field names of the model at `loc`, from the JSON schema."""
    schema = cls.model_json_schema()
    definitions, node = schema.get("$defs", {}), schema
    for part in loc:
        named = node.get("properties", {}).get(part) or next(iter(node.get("patternProperties", {}).values()), None)
        inside = node.get("items") if isinstance(part, int) else named or node.get("additionalProperties")
        node = _resolve(inside if isinstance(inside, dict) else {}, definitions)
    return sorted(_resolve(node, definitions).get("properties", {}))


def _resolve(node: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """Follow a `$ref`, or the object branch of an optional."""
    for branch in node.get("anyOf", node.get("allOf", [])):
        if "$ref" in branch:
            node = branch
    if "$ref" in node:
        return definitions[node["$ref"].rsplit("/", 1)[-1]]
    return node
