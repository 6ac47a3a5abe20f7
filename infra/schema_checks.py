"""JSON schemas that were found valid are not checked again, in this process or in a later one of the same environment.

The schema of a deployment's form is seventy kilobytes. Prefect's server checks it against the schema of schemas twice when the deployment
is registered and once for every run of it: a fifth of a processor second each.
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
"""Digests of valid schemas, a line each. It is where Python keeps what it makes of Prefect's source."""


def check_schemas_once() -> None:
    """For both validators that Prefect uses."""
    for validator in (Draft202012Validator, validation._VALIDATOR):
        check_once(validator, KNOWN)


def check_once(validator: Any, known: Path) -> None:
    """`validator.check_schema` remembers by content what it found valid, and in the file `known` where that can be written."""
    check, valid = validator.check_schema, set[str]()
    with suppress(OSError):
        valid.update(known.read_text().split())

    def check_schema(schema: Any, *more: Any, **options: Any) -> None:
        try:
            content = hashlib.sha256(json.dumps([validator.META_SCHEMA, schema]).encode()).hexdigest()
        except (TypeError, ValueError):  # it is no JSON, and would look different every time
            return check(schema, *more, **options)
        if content not in valid:
            check(schema, *more, **options)
            valid.add(content)
            with suppress(OSError), known.open("a") as lines:
                lines.write(f"{content}\n")
        return None

    validator.check_schema = staticmethod(check_schema)
