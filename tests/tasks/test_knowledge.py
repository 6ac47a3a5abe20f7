"""The experiment log: every phase's entries once, in a file that only grows."""

from pathlib import Path

from fvlm_core.experiments import LOG_FILE, Experiment
from tasks.knowledge import append_experiments

COOL = Experiment(run="cool", hypothesis="sharper is sooner", change="model.temperature = 0.5", result="2.1 nats (n=2)", verdict="worse")


def test_entries_are_appended_once(tmp_path: Path) -> None:
    for digest in ("a" * 64, "a" * 64, "b" * 64):
        append_experiments(tmp_path, "ablations", digest, "2026-11-25T21:37:11+00:00", [COOL])
    append_experiments(tmp_path, "precompute", "c" * 64, "2026-11-25T21:37:11+00:00", [])
    text = (tmp_path / LOG_FILE).read_text()
    assert text.startswith("# Knowledge")
    assert text.count("## 2026-11-25 21:37 UTC, ablations") == 2, "again with another result, not again with the same"
    assert text.count("| cool | sharper is sooner | model.temperature = 0.5 | 2.1 nats (n=2) | worse |") == 2
    assert "precompute" not in text


def test_what_stood_there_stays(tmp_path: Path) -> None:
    (tmp_path / LOG_FILE).write_text("# Knowledge\n\nby hand\n")
    append_experiments(tmp_path, "ablations", "a" * 64, "2026-11-25T21:37:11+00:00", [COOL])
    assert "by hand\n\n## 2026-11-25" in (tmp_path / LOG_FILE).read_text()
