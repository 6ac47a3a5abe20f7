"""MVBench (Li et al. 2024, https://arxiv.org/abs/2311.17005): 20 tasks of 200 questions; the headline is the mean of the tasks' accuracies.

The NTU RGB+D videos (task fine_grained_pose) have to be requested from their owners. Without them, 19 tasks (3,800 questions) remain:
remove that task's annotations from the folder, and compare only with numbers for the same tasks.
"""

from pathlib import PurePath

from fvlm_core.eval.annotations import Row, find_media
from fvlm_core.eval.benchmarks.benchmark import Benchmark, Prompt, groups, video
from fvlm_core.eval.items import Item, gold_index
from fvlm_core.eval.media import relative_key

FOLDERS = {
    "object_interaction": "star/Charades_segment",
    "action_sequence": "star/Charades_segment",
    "action_prediction": "star/Charades_segment",
    "action_localization": "sta/sta_video_segment",
    "moving_count": "clevrer/video_validation",
    "fine_grained_pose": "nturgbd_convert",
    "character_order": "perception/videos",
    "object_shuffle": "perception/videos",
    "egocentric_navigation": "vlnqa",
    "moving_direction": "clevrer/video_validation",
    "episodic_reasoning": "tvqa/video_fps3_hq_segment",
    "fine_grained_action": "Moments_in_Time_Raw/videos",
    "scene_transition": "scene_qa/video",
    "state_change": "perception/videos",
    "moving_attribute": "clevrer/video_validation",
    "action_antonym": "ssv2_video_mp4",
    "unexpected_action": "FunQA_test/test",
    "counterfactual_inference": "clevrer/video_validation",
    "object_existence": "clevrer/video_validation",
    "action_count": "perception/videos",
}
"""Folder of each task's videos in the archive that lmms-eval uses (tasks/mvbench/utils.py)."""
AUTHORS = {
    "object_interaction": "star/Charades_v1_480",
    "action_sequence": "star/Charades_v1_480",
    "action_prediction": "star/Charades_v1_480",
    "action_localization": "sta/sta_video",
    "fine_grained_pose": "nturgbd",
    "episodic_reasoning": "tvqa/frames_fps3_hq",
    "action_antonym": "ssv2_video",
}
"""Folders in the authors' release, where they differ (their mvbench.ipynb); the rows give the start and end of the part asked about."""
CUT = "_segment"
"""Suffix of folders whose videos are already cut to the part asked about."""


def item(row: Row) -> Item:
    """Convert a row of a task's file: `json/<task>.json`, or `<task>/test-*.parquet` on the hub."""
    task = row.file.stem if row.file.suffix == ".json" or row.file.parent == row.root else row.file.parent.name
    folder = FOLDERS.get(task, task)
    choices = row.texts("candidates")
    published = [f"{above}{folder}" for folder in (folder, AUTHORS.get(task, folder)) for above in ("video/", "", "data0613/")]
    found = find_media(row.root, row.text("video"), (*published, f"video/{task}", "video", "videos", ""))
    place = relative_key(row.root, found)
    cut = any(part.endswith(CUT) for part in PurePath(place).parent.parts)
    start, end = (None, None) if cut else (row.get("start"), row.get("end"))
    return Item(
        id=f"{task}/{row.number}",
        media=video(found, start, end),
        question=row.text("question"),
        choices=choices,
        gold=gold_index(choices, row.text("answer")),
        groups=groups(place, task),
    )


BENCHMARK = Benchmark(
    name="mvbench",
    title="MVBench",
    item=item,
    files=("json/*.json", "*/test-*.parquet", "*/*.parquet", "*.json", "*.jsonl"),
    columns=("video", "question", "candidates", "answer"),
    hub=("OpenGVLab/MVBench",),
    prompt=Prompt(question="Question: {question}\nOptions:", option="({letter}) {text}", after="Only give the best option."),
    macro="task",
)
