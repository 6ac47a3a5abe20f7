"""Caches which JSON schemas are valid, so that each is checked only once per Python environment.

The schema of a deployment's parameters has seventy kilobytes. Prefect's server checks it against the metaschema twice when the deployment
is registered and once for each of its runs, which takes a fifth of a CPU second each time.
"""

import hashlib
import json
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import prefect
from jsonschema import Draft202012Validator
from prefect.utilities.schema_tools import validation

KNOWN = Path(prefect.__file__).parent / "__pycache__" / f"schemas-{version('jsonschema')}.txt"
"""File with the digests of valid schemas, one per line. It is stored next to Prefect's bytecode."""


def check_schemas_once() -> None:
    """Cache the checks of both validators that Prefect uses."""
    for validator in (Draft202012Validator, validation._VALIDATOR):
        check_once(validator, KNOWN)


def check_once(validator: Any, known: Path) -> None:
    """Make `validator.check_schema` remember valid schemas by content, in memory and, if it is writable, in the file `known`."""
    check, valid = validator.check_schema, set[str]()
    with suppress(OSError):
        valid.update(known.read_text().split())

    def check_schema(schema: Any, *more: Any, **options: Any) -> None:
        try:
            content = hashlib.sha256(json.dumps([validator.META_SCHEMA, schema]).encode()).hexdigest()
        except (TypeError, ValueError):  # not JSON, so there is no stable digest
            return check(schema, *more, **options)
        if content not in valid:
            check(schema, *more, **options)
            valid.add(content)
            with suppress(OSError), known.open("a") as lines:
                lines.write(f"{content}\n")
        return None

    validator.check_schema = staticmethod(check_schema)
