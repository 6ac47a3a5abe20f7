"""Schemas are checked once, and those that are wrong every time."""

import pytest
from jsonschema import Draft202012Validator, SchemaError, validate, validators

from infra.schema_checks import check_once


def test_a_valid_schema_is_checked_once_and_a_wrong_one_refused_every_time() -> None:
    checked = []

    def count(_validator, _value, schema, _meta_schema):
        checked.append(schema)
        return validators.Draft202012Validator(Draft202012Validator.META_SCHEMA).iter_errors(schema)

    counting = validators.create(meta_schema={"counted": True}, validators={**Draft202012Validator.VALIDATORS, "counted": count})
    check_once(counting)
    good, wrong = {"type": "object", "properties": {"steps": {"type": "integer"}}}, {"type": "number of steps"}
    for _ in range(2):
        validate({"steps": 1}, good, counting)
        with pytest.raises(SchemaError, match="number of steps"):
            validate({"steps": 1}, wrong, counting)
    assert checked == [good, wrong, wrong]
    validate({}, {**good, "required": []}, counting)
    assert len(checked) == 4, "another schema"
    with pytest.raises(Exception, match="is not of type 'integer'"):
        validate({"steps": "ten"}, good, counting)
