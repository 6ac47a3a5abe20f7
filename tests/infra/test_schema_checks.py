"""Schemas are checked once, and those that are wrong every time."""

from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator, SchemaError, validate, validators

from infra.schema_checks import check_once


def test_a_valid_schema_is_checked_once_and_a_wrong_one_refused_every_time(tmp_path: Path) -> None:
    checked = []

    def count(_validator, _value, schema, _meta_schema):
        checked.append(schema)
        return validators.Draft202012Validator(Draft202012Validator.META_SCHEMA).iter_errors(schema)

    def counting() -> Any:
        """A validator of a new process."""
        made = validators.create(meta_schema={"counted": True}, validators={**Draft202012Validator.VALIDATORS, "counted": count})
        check_once(made, tmp_path / "known.txt")
        return made

    first = counting()
    good, wrong = {"type": "object", "properties": {"steps": {"type": "integer"}}}, {"type": "number of steps"}
    for _ in range(2):
        validate({"steps": 1}, good, first)
        with pytest.raises(SchemaError, match="number of steps"):
            validate({"steps": 1}, wrong, first)
    assert checked == [good, wrong, wrong]
    validate({}, {**good, "required": []}, first)
    assert len(checked) == 4, "another schema"
    with pytest.raises(Exception, match="is not of type 'integer'"):
        validate({"steps": "ten"}, good, first)
    second = counting()
    validate({"steps": 1}, good, second)
    assert len(checked) == 4, "a later process knows it"
    with pytest.raises(SchemaError, match="number of steps"):
        validate({"steps": 1}, wrong, second)


def test_nothing_has_to_be_kept() -> None:
    validator = validators.extend(Draft202012Validator)
    check_once(validator, Path("/dev/null/in a file"))
    validate({}, {"type": "object"}, validator)
    with pytest.raises(SchemaError):
        validate({}, {"type": 3}, validator)
