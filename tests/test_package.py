"""`pip install .` (not editable) on a clean machine: wheel and sdist hold all that the command needs, from any folder."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NEEDED = (
    "deployments/profiles/ci.yaml",
    "deployments/recipes/tiny.yaml",
    "fvlm_core/eval/published.yaml",
    "fvlm_core/serve/page.html",
    "fvlm_core/release/templates/card.md.j2",
    "fvlm_core/data/templates/look.html.j2",
    "infra/lock.sh",
)
BUILD = "import sys; from setuptools import build_meta as b; out = sys.argv[1]; b.build_sdist(out); b.build_wheel(out)"

pytestmark = pytest.mark.slow(reason="builds and installs the package")


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the sdist, and the wheel made from the files that git tracks: nothing that only lies here is in it."""
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, listed):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run([sys.executable, "-c", BUILD, output], cwd=source, capture_output=True, check=True)
    return output


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory) -> Path:
    """The bin folder of a fresh environment with the wheel, and the dependencies of this one."""
    environment = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    python = environment / "bin" / "python"
    (wheel,) = built.glob("*.whl")
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True)
    (packages,) = environment.glob("lib/python3*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return environment / "bin"


def test_wheel_and_sdist_hold_everything_and_no_tests(built):
    (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert set(NEEDED) <= names
    assert not any(name.startswith("tests/") for name in names)
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert {*NEEDED, "pyproject.toml", "README.md", "LICENSE"} <= held


@pytest.mark.parametrize("arguments", [["--help"], ["plan", "--profile", "ci", "--volume", "v"]])
def test_the_command_works_from_any_folder(installed, tmp_path, arguments):
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PREFECT_"))}
    done = subprocess.run([installed / "fvlm", *arguments], cwd=tmp_path, env=plain, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    expected = {"--help": "Commands", "plan": "precompute"}[arguments[0]]
    assert expected in done.stdout


def test_the_installed_package_is_what_runs(installed, tmp_path):
    code = "import deployments, fvlm_core, infra; print(*{m.__file__.rsplit('/', 2)[0] for m in (deployments, fvlm_core, infra)})"
    done = subprocess.run([installed / "python", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    (place,) = done.stdout.split()
    assert place == str(next(installed.parent.glob("lib/python3*/site-packages")))
