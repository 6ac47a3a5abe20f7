"""A module that is started with garbage collected rarely is run as it is run without."""

import subprocess
import sys
from pathlib import Path

from infra.stack import REPOSITORY

PROGRAM = """
import gc, pickle, sys
class Mine: ...
assert type(pickle.loads(pickle.dumps(Mine()))) is Mine, "found in the main module"
print(__name__, sys.argv[1:], gc.get_threshold()[0] > 10_000)
sys.exit(3)
"""


def test_a_module_is_run_as_the_main_one_with_its_arguments_and_its_status(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, "-m", "infra.start", "program", "--one", "two words"]
    done = subprocess.run(command, env={"PYTHONPATH": f"{tmp_path}:{REPOSITORY}"}, capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("__main__ ['--one', 'two words'] True\n", 3), done.stderr


def test_a_prepared_process_runs_what_it_hears_later_and_ends_where_it_hears_nothing(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, "-m", "infra.start", "--prepared", "json,program_needs"]
    (tmp_path / "program_needs.py").write_text("print('imported')")
    for heard, said in (('["program", "one"]', ("imported\n__main__ ['one'] True\n", 3)), ("", ("imported\n", 0))):
        environment = {"PYTHONPATH": f"{tmp_path}:{REPOSITORY}"}
        done = subprocess.run(command, input=heard, env=environment, capture_output=True, text=True, check=False)
        assert (done.stdout, done.returncode) == said, done.stderr
