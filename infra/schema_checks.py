"""JSON schemas that were found valid are not checked again in the life of a process.

The schema of a deployment's form is seventy kilobytes. Prefect's server checks it against the schema of schemas twice when the deployment
is registered and once for every run of it: a fifth of a processor second each.
"""

import hashlib
import json
from typing import Any

from jsonschema import Draft202012Validator
from prefect.utilities.schema_tools import validation


def check_schemas_once() -> None:
    """For both validators that Prefect uses."""
    for validator in (Draft202012Validator, validation._VALIDATOR):
        check_once(validator)


def check_once(validator: Any) -> None:
    """`validator.check_schema` remembers what it found valid, by content."""
    check, valid = validator.check_schema, set[bytes]()

    def check_schema(schema: Any, *more: Any, **options: Any) -> None:
        content = hashlib.sha256(json.dumps(schema, default=repr).encode()).digest()
        if content not in valid:
            check(schema, *more, **options)
            valid.add(content)

    validator.check_schema = staticmethod(check_schema)
