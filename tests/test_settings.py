"""Settings: identity, and changes by dotted path."""

from typing import Annotated

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fvlm_core.dotted import UnknownPathError, differences, flatten, value_at, with_changes
from fvlm_core.errors import UserError
from fvlm_core.settings import EXECUTION, Settings


class Inner(Settings):
    size: int = 1
    threads: Annotated[int, EXECUTION] = 1


class Outer(Settings):
    inner: Inner = Inner()
    several: list[Inner] = [Inner(size=2)]
    named: dict[str, Inner] = {"a": Inner(size=3)}


def test_how_a_job_is_done_is_no_part_of_its_identity_at_any_depth() -> None:
    busy = Outer(inner=Inner(threads=8), several=[Inner(size=2, threads=8)], named={"a": Inner(size=3, threads=8)})
    assert busy.hash() == Outer().hash()
    assert Outer(inner=Inner(size=5)).hash() != Outer().hash()
    assert Outer(several=[Inner(size=5)]).hash() != Outer().hash()
    assert Outer(named={"a": Inner(size=5)}).hash() != Outer().hash()


def test_a_change_reaches_into_lists_and_names_what_there_is() -> None:
    assert Outer().with_changes({"several.0.size": 7}).several[0].size == 7
    with pytest.raises(UserError, match=r"no setting 'inner\.sise'"):
        Outer().with_changes({"inner.sise": 7})
    with pytest.raises(UnknownPathError, match="at that level there is: size, threads"):
        value_at(Outer().model_dump(), "inner.sise")


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.from_regex(r"[a-z]+", fullmatch=True), inner, max_size=3),
    max_leaves=12,
)
trees = st.dictionaries(st.from_regex(r"[a-z]+", fullmatch=True), plain, max_size=4)


@given(trees)
def test_every_listed_path_leads_to_its_value(values: dict) -> None:
    for lists in (False, True):
        for path, value in flatten(values, lists=lists).items():
            assert value_at(values, path) == value


@given(trees, st.integers())
def test_a_change_changes_that_path_and_nothing_else(values: dict, new: int) -> None:
    for path, value in flatten(values, lists=True).items():
        changed = with_changes(values, {path: new})
        assert value_at(changed, path) == new
        assert set(differences(values, changed)) == ({path} if value != new else set())
