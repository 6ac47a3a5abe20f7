"""Published numbers: each has a source, and stands only beside a benchmark that was run."""

from pathlib import Path

from PIL import Image

from fvlm_core.eval.answerers.foveated import FoveatedAnswerer
from fvlm_core.eval.benchmarks import NAMES
from fvlm_core.eval.published import comparison, comparison_table, published
from tests.eval.test_benchmark_result import records, result_of


def test_every_number_has_a_source_and_is_of_a_benchmark_that_can_be_run():
    for one in published():
        assert one.source.startswith("https://")
        assert set(one.scores) <= set(NAMES)
    assert {"SmolVLM2-256M", "SmolVLM2-2.2B", "VideoChat-Flash-2B", "InternVL2.5-1B", "LLaMA-VID-7B"} <= {one.model for one in published()}


def test_rows_stand_only_beside_benchmarks_that_were_run(answerer: FoveatedAnswerer, tmp_path: Path):
    videomme, gaze = result_of("videomme", records(60, 0, tasks=["a"])), result_of("gaze", records(60, 0, tasks=["a"]))
    assert comparison_table({"gaze": gaze}, "ours", 1) is None
    assert comparison({"gaze": gaze}, answerer, tmp_path) is None
    table = comparison_table({"videomme": videomme, "gaze": gaze}, "ours", 1)
    assert table is not None
    assert table.head == ["model", "tokens per frame", "mode", "Video-MME"]
    rows = {(row[0], row[2]): row for row in table.rows}
    value = videomme.conditions["question_first/coarse_fine"].score.value
    assert rows["ours (measured here)", "coarse_fine"][3].startswith(f"{100 * value:.1f} [")
    assert rows["SmolVLM2-256M", ""] == ["SmolVLM2-256M", "64", "", "33.7"]
    assert ("LFM2.5-VL-450M", "") not in rows, "it reports no Video-MME"
    assert "Without subtitles." in table.note
    figure = comparison({"videomme": videomme, "gaze": gaze}, answerer, tmp_path)
    assert figure is not None
    with Image.open(tmp_path / figure.file) as image:
        assert min(image.size) > 300
