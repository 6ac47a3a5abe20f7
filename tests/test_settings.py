"""Settings: identity, and changes by dotted path."""

from pathlib import Path
from typing import Annotated

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fvlm_core.dotted import UnknownPathError, differences, flatten, value_at, with_changes
from fvlm_core.errors import UserError
from fvlm_core.settings import EXECUTION, NameOrFolder, ProfilePath, Settings, read_yaml


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


def test_a_key_may_hold_dots() -> None:
    values = {"reports": {"grid-1.00e09-foveated": {"folder": "a"}, "grid-1": {"folder": "b"}}}
    assert value_at(values, "reports.grid-1.00e09-foveated.folder") == "a"
    changed = with_changes(values, {"reports.grid-1.00e09-foveated": "c", "reports.grid-1.folder": "d"})
    assert changed == {"reports": {"grid-1.00e09-foveated": "c", "grid-1": {"folder": "d"}}}
    with pytest.raises(UnknownPathError, match=r"at that level there is: grid-1\.00e09-foveated, grid-1"):
        value_at(values, "reports.grid-2.00e09-foveated")


class Paths(Settings):
    file: ProfilePath
    several: list[ProfilePath] = []
    model: NameOrFolder = "owner/name"


def test_paths_of_a_profile_start_at_its_file_wherever_it_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "profiles" / "owner" / "mine").mkdir(parents=True)
    monkeypatch.setenv("HOME", "/home/someone")
    values = {"file": "data/a.csv", "several": ["../b.csv", "/c.csv", "~/d.csv"]}

    def loaded(model: str) -> Paths:
        return Paths.from_values(values | {"model": model}, where="x", folder=tmp_path / "profiles")

    first = loaded("owner/name")
    assert first.file == tmp_path / "profiles/data/a.csv"
    assert first.several == [tmp_path / "b.csv", Path("/c.csv"), Path("/home/someone/d.csv")]
    assert first.model == "owner/name"
    assert loaded("owner/mine").model == str(tmp_path / "profiles/owner/mine")
    assert loaded("./gone").model == str(tmp_path / "profiles/gone")
    assert loaded("../up").model == str(tmp_path / "up")
    assert loaded("~/model").model == "/home/someone/model"
    again = Paths.from_values(first.model_dump(mode="json"), where="a worker")
    assert again == first


def test_paths_outside_a_profile_stay_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump({"file": "data/a.csv", "model": "./here"}))
    for loaded in (Paths.from_yaml(path), Paths.from_values(read_yaml(path), where="x")):
        assert (loaded.file, loaded.model) == (Path("data/a.csv"), "./here")
