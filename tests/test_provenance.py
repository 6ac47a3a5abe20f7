"""Which code a result was made by."""

import subprocess
import sys
from pathlib import Path

import pytest

from fvlm_core import provenance
from fvlm_core.manifest import AnyManifest, Manifest
from tests.jobs.count import CountJob


def test_a_job_reaches_what_it_imports_and_nothing_else() -> None:
    training = set(provenance.imported_files("fvlm_core.train"))
    assert {"fvlm_core/train/__main__.py", "fvlm_core/train/loop.py", "fvlm_core/model/attention.py", "fvlm_core/__init__.py"} <= training
    assert not any(path.startswith(("fvlm_core/release", "fvlm_core/scaling", "fvlm_core/eval/")) for path in training)
    assert "fvlm_core/train/loop.py" not in provenance.imported_files("fvlm_core.data.clips")


def test_imports_match_what_python_loads() -> None:
    """Every module of the package that importing a job loads is among the files that were found."""
    code = "import sys, fvlm_core.eval.evaluate; print(*[m for m in sys.modules if m.split('.')[0] == 'fvlm_core'])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    found = provenance.imported_files("fvlm_core.eval.evaluate")
    files = {name: name.replace(".", "/") for name in loaded}
    assert not [name for name, path in files.items() if f"{path}.py" not in found and f"{path}/__init__.py" not in found]


def test_a_manifest_written_by_a_job_says_its_code_commit_and_versions(tmp_path: Path) -> None:
    clip = "output: {}\nsources: {{}}\n".format(tmp_path / "clips")
    (tmp_path / "job.yaml").write_text(clip)
    subprocess.run([sys.executable, "-m", "fvlm_core.data.clips", str(tmp_path / "job.yaml")], check=True)
    manifest = AnyManifest.read(tmp_path / "clips")
    assert manifest.code["fvlm_core/data/clips.py"] == provenance.digest("fvlm_core/data/clips.py")
    assert manifest.versions == provenance.versions()
    assert manifest.commit == provenance.commit()
    assert manifest.other_code == []


def test_what_differs_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Manifest(name="x", settings_hash=CountJob(output=Path("x"), value=1).hash())
    other = made.model_copy(
        update={"code": {"fvlm_core/cli.py": "0" * 16, "fvlm_core/gone.py": "1" * 16}, "versions": made.versions | {"torch": "1.0"}}
    )
    assert made.other_code == []
    now = provenance.versions()["torch"]
    assert other.other_code == ["fvlm_core/cli.py has changed", "fvlm_core/gone.py has gone", f"torch was 1.0 and is {now}"]
