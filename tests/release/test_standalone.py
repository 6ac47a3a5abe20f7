"""The flat copy of the model's code: whole where it is needed, cut where it is not, importable by every transformers 5."""

import ast
import re
import sys
from pathlib import Path

import pytest

from fvlm_core.release import html
from fvlm_core.release.standalone import Module, _reach, export


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("export")
    export(path, "1.2.3")
    return path


def relative_imports(path: Path) -> set[str]:
    """As transformers finds them."""
    return set(re.findall(r"^\s*from\s+\.(\S+)\s+import", path.read_text(), re.M))


def test_what_is_not_reached_stays_here(folder):
    names = {
        node.name
        for node in ast.walk(ast.parse((folder / "fvlm_foveated.py").read_text()))
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }
    assert {"FoveatedVLM", "forward", "read_fine", "Read"} <= names
    assert not names & {"save", "load_model", "build_model", "SavedModel"}
    assert "encode_jpeg" not in (folder / "fvlm_frames.py").read_text()


def test_every_file_says_where_it_is_from(folder):
    for path in folder.glob("*.py"):
        assert re.match(r"# Made from fvlm_core/\S+\.py of fVLM 1\.2\.3", path.read_text())


def test_entry_files_import_all_they_need_themselves(folder):
    """transformers 5.0 copies only the direct imports of a local folder's file."""
    for root in ("configuration_fvlm", "modeling_fvlm", "processing_fvlm"):
        found, waiting = set(), [root]
        while waiting:
            new = relative_imports(folder / f"{waiting.pop()}.py") - found
            found |= new
            waiting.extend(new)
        assert relative_imports(folder / f"{root}.py") == found


def test_the_card_names_every_package_that_is_imported(folder):
    """Also those for videos: transformers imports all the files, and asks for what they import at their top."""
    packages: set[str] = set()
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                packages |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                packages.add(str(node.module).partition(".")[0])
    card = Path(html.__file__).with_name(html.TEMPLATES) / "card.md.j2"
    (needs,) = (line for line in card.read_text().splitlines() if line.startswith("Needs "))
    brought = {"numpy", "httpx"}  # by transformers
    for package in packages - sys.stdlib_module_names - brought:
        assert f"`{package.replace('PIL', 'pillow')}" in needs
    assert "for video" not in needs


def test_docstrings_of_constants_and_comments_above_travel(folder):
    source = (folder / "fvlm_batch.py").read_text()
    assert 'IGNORE = -100\n"""Label of a position without a target."""' in source


def test_a_module_reached_by_its_name_is_refused(tmp_path, monkeypatch):
    """`from package import module` cannot be made flat by renaming names."""
    (tmp_path / "reaching.py").write_text('"""Doc."""\nfrom fvlm_core.model import attention\n\n\ndef f():\n    return attention.NAME\n')
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"reaches the module fvlm_core\.model\.attention by its name"):
        list(_reach(Module.parse("reaching"), "f"))
