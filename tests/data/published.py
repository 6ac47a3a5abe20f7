"""Small datasets in the published form of each source, with real media: what an adapter has to read, in a temporary folder.

Each function writes the files and returns the settings of their source. The forms are those of the dataset cards: see the adapters.
"""

import csv
import io
import json
import tarfile
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

RATE = 8
"""Frames per second of the clips."""
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
TEXTS = pa.list_(pa.struct([("user", pa.string()), ("assistant", pa.string()), ("source", pa.string())]))
SPOKEN = pa.list_(pa.struct([("role", pa.string()), ("content", pa.list_(pa.struct([("type", pa.string()), ("text", pa.string())])))]))
STAMP = pa.struct([("end_timestamp", pa.string()), ("start_timestamp", pa.string())])
ABOUT = pa.struct(
    [
        ("content_fine_category", pa.string()),
        (
            "content_metadata",
            pa.struct(
                [
                    ("description", pa.string()),
                    ("fps", pa.float64()),
                    ("qAndA", pa.list_(pa.struct([("answer", pa.string()), ("question", pa.string())]))),
                    (
                        "scenes",
                        pa.list_(
                            pa.struct(
                                [
                                    ("activities", pa.list_(pa.struct([("description", pa.string()), ("timestamp", STAMP)]))),
                                    ("sceneId", pa.int64()),
                                    ("timestamps", STAMP),
                                    ("title", pa.string()),
                                ]
                            )
                        ),
                    ),
                ]
            ),
        ),
        ("duration_seconds", pa.int64()),
    ]
)

Settings = dict[str, Any]


@cache
def clip(seconds: int, seed: int = 0, *, width: int = 64, height: int = 48) -> bytes:
    """An mp4 file (H.264) whose second t is grey level 40 * (t + 1), with a little noise that is the seed's."""
    rng = np.random.default_rng(seed)
    content = io.BytesIO()
    with av.open(content, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"crf": "20", "g": str(RATE)})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(seconds * RATE):
            level = 40 * (number // RATE + 1)
            pixels = np.clip(level + rng.integers(-8, 8, (height // 8, width // 8, 3)), 0, 255).astype(np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels.repeat(8, axis=0).repeat(8, axis=1), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return content.getvalue()


def picture(seed: int, kind: str = "JPEG", size: tuple[int, int] = (60, 50)) -> bytes:
    """An image file of noise in large squares."""
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1] // 10, size[0] // 10, 3)).astype(np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels.repeat(10, axis=0).repeat(10, axis=1)).save(content, kind)
    return content.getvalue()


def pictures(*seeds: int) -> list[dict[str, Any]]:
    """Images as Hugging Face keeps them in parquet."""
    return [{"bytes": picture(seed), "path": f"{seed}.jpg"} for seed in seeds]


def webvid(folder: Path) -> Settings:
    rows = []
    for number in range(3):
        (folder / f"{number}.mp4").write_bytes(clip(2 + number, number))
        rows.append([100 + number, f"A grey wall {number}", 1, "001", f"PT00H00M0{2 + number}S", f"file://{folder}/{number}.mp4"])
    _csv(folder / "results_2M_train.csv", ["videoid", "name", "page_idx", "page_dir", "duration", "contentUrl"], rows)
    return {"files": [folder / "results_2M_train.csv"]}


OPENVID = ["video", "caption", "aesthetic score", "motion score", "temporal consistency score", "camera motion", "frame", "fps", "seconds"]


def openvid(folder: Path) -> Settings:
    """One archive, and one that was cut into two parts within a video."""
    _csv(folder / "OpenVid-1M.csv", OPENVID, [[f"clip_{n}.mp4", f"Grey {n}", 5 + n, 3.1, 0.9, "static", 16, 8.0, 2.0] for n in range(4)])
    _zip(folder / "OpenVid_part0.zip", {"clip_0.mp4": clip(2, 10), "clip_1.mp4": clip(2, 11)})
    _zip(folder / "joined.zip", {"video/clip_2.mp4": clip(2, 12), "video/clip_3.mp4": clip(2, 13)})
    content = (folder / "joined.zip").read_bytes()
    (folder / "joined.zip").unlink()
    cut = len(clip(2, 12)) // 2
    (folder / "OpenVid_part1_partaa").write_bytes(content[:cut])
    (folder / "OpenVid_part1_partab").write_bytes(content[cut:])
    return {"files": [folder / "OpenVid-1M.csv"], "archives": [folder / "OpenVid_part*"]}


def cauldron(folder: Path) -> Settings:
    """Two configurations: one image and several turns; two images; and a row without any."""
    turn = {"user": "Question: which colour?\nAnswer briefly.", "assistant": "Grey.", "source": "VQAv2"}
    rows = {
        "vqav2/train-00000-of-00001-abc": ([pictures(1), pictures(2)], [[turn, turn | {"user": "And how dark?"}], [turn]]),
        "nlvr2/train-00000-of-00001-def": ([pictures(3, 4), pictures(5, 6, 7), []], [[turn], [turn], [turn]]),
    }
    for name, (images, texts) in rows.items():
        table = pa.table({"images": pa.array(images, pa.list_(IMAGE)), "texts": pa.array(texts, TEXTS)})
        _parquet(folder / f"{name}.parquet", table)
    return {"files": [folder / "*" / "train-*.parquet"]}


def llava_video(folder: Path) -> Settings:
    config = folder / "0_30_s_academic_v0_1"
    config.mkdir()
    names = [f"academic_source/Charades/{name}.mp4" for name in ("Q04US", "A1B2C", "ZZTOP")]
    said = [{"from": "human", "value": "<image>\nWhat is shown?"}, {"from": "gpt", "value": "A wall."}]
    more = [{"from": "human", "value": "How bright?"}, {"from": "gpt", "value": "Ever brighter."}]
    records = [
        {
            "id": number if number else "academic-0",
            "conversations": said + more * number,
            "data_source": "0_30_s_academic_v0_1",
            "video": name,
        }
        for number, name in enumerate(names)
    ]
    (config / "0_30_s_academic_oe_v0_1_qa_processed.json").write_text(json.dumps(records, indent=2))
    _tar(config / "0_30_s_academic_v0_1_videos_1.tar", {name: clip(2, 20 + number) for number, name in enumerate(names)})
    return {"files": [config / "*_oe_*.json"], "archives": [config / "*_videos_*.tar"]}


def vista(folder: Path) -> Settings:
    """Two subsets: the path in `video`, and in `image` as the authors' loader reads it."""
    for place, subset in (("video", "temporal_niah_qa"), ("image", "hr_video_grid_mcq")):
        said = [{"from": "human", "value": "<video>\nWhen is it brightest?"}, {"from": "gpt", "value": "At the end."}]
        records = [{"id": f"{subset}_{n}", "conversations": said, place: f"{subset}/{n}.mp4"} for n in range(2)]
        (folder / f"{subset}.json").write_text(json.dumps(records))
        (folder / subset).mkdir()
        _tar(folder / subset / f"{subset}_1.tar", {f"{subset}/{n}.mp4": clip(3, 30 + n + len(place)) for n in range(2)})
    return {"files": [folder / "*.json"], "archives": [folder / "*" / "*.tar"]}


def finevideo(folder: Path) -> Settings:
    def scene(number: int, start: str, end: str, **own: Any) -> dict[str, Any]:
        stamp = {"start_timestamp": start, "end_timestamp": end}
        said = [{"description": f"Part {number} is grey.", "timestamp": stamp}, {"description": "Nobody moves", "timestamp": stamp}]
        return {"activities": said, "sceneId": number, "timestamps": stamp, "title": f"Scene {number}"} | own

    scenes = [
        scene(1, "00:00:00.000", "00:00:02.000"),
        scene(2, "00:00:02.000", "00:00:06.000", timestamps=None),
        scene(3, "unknown", "00:00:09.000"),
        scene(4, "00:00:03.000", "00:00:03.000"),
    ]
    about = [
        {
            "content_fine_category": "Painting",
            "content_metadata": {
                "description": f"Film {number} of a wall.",
                "fps": float(RATE),
                "qAndA": [{"question": "What is painted?", "answer": "A wall."}, {"question": "By whom?", "answer": "Nobody."}],
                "scenes": scenes,
            },
            "duration_seconds": 6 + number,
        }
        for number in range(2)
    ]
    table = pa.table({"mp4": pa.array([clip(6 + n, 40 + n) for n in range(2)], pa.binary()), "json": pa.array(about, ABOUT)})
    _parquet(folder / "data" / "train-00000-of-00001.parquet", table)
    return {"files": [folder / "data" / "train-*.parquet"]}


def smoltalk(folder: Path) -> Settings:
    chats = [
        [{"content": f"Count to {n}.", "role": "user"}, {"content": " ".join(map(str, range(1, n + 1))), "role": "assistant"}]
        for n in range(2, 6)
    ]
    shape = pa.list_(pa.struct([("content", pa.string()), ("role", pa.string())]))
    _parquet(folder / "data" / "all" / "train-0.parquet", pa.table({"messages": pa.array(chats, shape), "source": ["smol-magpie"] * 4}))
    return {"files": [folder / "data" / "all" / "train-*.parquet"]}


def rlaif_v(folder: Path) -> Settings:
    """The layout of openbmb/RLAIF-V-Dataset."""
    table = pa.table(
        {
            "ds_name": ["RLAIF-V"] * 3,
            "image": pa.array([pictures(50 + n)[0] for n in range(3)], IMAGE),
            "question": [f"Question {n}: what is it?" for n in range(3)],
            "chosen": ["Coloured squares."] * 3,
            "rejected": ["A dog on a beach."] * 3,
            "origin_dataset": ["COCO"] * 3,
            "origin_split": ['{"model": "llava"}'] * 3,
            "idx": [0, 1, 2],
            "image_path": ["a.jpg", "b.jpg", "c.jpg"],
        }
    )
    _parquet(folder / "RLAIF-V-Dataset_000.parquet", table)
    return {"files": [folder / "*.parquet"]}


def rlaif_v_formatted(folder: Path) -> Settings:
    """The layout of HuggingFaceH4/rlaif-v_formatted."""

    def spoken(role: str, *parts: dict[str, str | None]) -> list[dict[str, Any]]:
        return [{"role": role, "content": list(parts)}]

    def words(text: str) -> dict[str, str | None]:
        return {"type": "text", "text": text}

    table = pa.table(
        {
            "images": pa.array([pictures(60 + n) for n in range(3)], pa.list_(IMAGE)),
            "prompt": pa.array([spoken("user", {"type": "image", "text": None}, words(f"Question {n}?")) for n in range(3)], SPOKEN),
            "chosen": pa.array([spoken("assistant", words("Squares."))] * 3, SPOKEN),
            "rejected": pa.array([spoken("assistant", words("A dog."))] * 3, SPOKEN),
        }
    )
    _parquet(folder / "data" / "train-00000-of-00001.parquet", table)
    return {"files": [folder / "data" / "train-*.parquet"]}


def vript(folder: Path) -> Settings:
    (folder / "vript_captions").mkdir()
    (folder / "vript_long_videos_clips").mkdir()
    captions: dict[str, bytes] = {}
    clips: dict[str, bytes] = {}
    for number, video in enumerate(("007EvOaWFOA", "339dXVNQXac")):
        data = {}
        for scene in (1, 2):
            name = f"{video}-Scene-{scene:03d}"
            words = {"shot_type": "Close-up", "camera_movement": "Static", "content": f"Grey scene {scene}.", "scene_title": "Wall"}
            data[name] = {"video_id": video, "clip_id": name, "video_title": "Walls", "caption": words, "voiceover": ["..."]}
            clips[f"{video}/{name}.mp4"] = clip(2, 70 + 2 * number + scene)
        meta = {"video_id": video, "video_title": "Walls", "num_clips": 2, "integrity": True}
        captions[f"{video}_caption.json"] = json.dumps({"meta": meta, "data": data}).encode()
    _zip(folder / "vript_captions" / "vript_long_videos_captions.zip", captions, method=zipfile.ZIP_DEFLATED)
    _zip(folder / "vript_long_videos_clips" / "clips_1_of_1095.zip", clips, method=zipfile.ZIP_DEFLATED)
    return {"files": [folder / "vript_captions" / "*.zip"], "archives": [folder / "vript_long_videos_clips" / "*.zip"]}


def sharegpt4video(folder: Path) -> Settings:
    lines = []
    for number in range(3):
        said = [{"idx": "1", "content": "First it is dark."}, {"idx": "-1", "content": f"Video {number} grows brighter."}]
        lines.append(
            {
                "video_id": f"id{number}",
                "video_path": f"panda/id{number}.mp4",
                "zip_folder": "panda/panda_videos_1.zip",
                "timestamp": ["00:00:00.000", "00:00:02.000"],
                "keyframe": [0, 1],
                "captions": said,
            }
        )
    (folder / "sharegpt4video_40k.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "zip_folder" / "panda").mkdir(parents=True)
    _zip(folder / "zip_folder" / "panda" / "panda_videos_1.zip", {f"id{n}.mp4": clip(2, 80 + n) for n in range(3)})
    return {"files": [folder / "sharegpt4video_40k.jsonl"], "archives": [folder / "zip_folder" / "*" / "*.zip"]}


def user(folder: Path) -> Settings:
    """A jsonl table: a file, seconds of it, and several images; captions, and questions of one's own."""
    (folder / "film.mp4").write_bytes(clip(5, 90))
    for number in range(3):
        (folder / f"{number}.png").write_bytes(picture(91 + number, "PNG"))
    asked = [[{"question": "Are they equal?", "answer": "No."}]]
    rows: list[dict[str, Any]] = [
        {"url": "film.mp4", "caption": "A wall that grows brighter."},
        {"url": "film.mp4#t=1,3", "caption": "A part of it."},
        {"url": ["0.png", "1.png", "2.png"], "kind": "image", "conversations": asked},
    ]
    (folder / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {"files": [folder / "mine.jsonl"]}


PUBLISHED: dict[str, Callable[[Path], Settings]] = {
    "webvid": webvid,
    "openvid": openvid,
    "cauldron": cauldron,
    "llava_video": llava_video,
    "vista": vista,
    "finevideo": finevideo,
    "finevideo_scenes": finevideo,
    "smoltalk": smoltalk,
    "smol_smoltalk": smoltalk,
    "rlaif_v": rlaif_v,
    "vript": vript,
    "sharegpt4video": sharegpt4video,
    "user": user,
}
"""By the format's name."""


def _csv(path: Path, head: list[str], rows: list[list[Any]]) -> None:
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([head, *rows])


def _parquet(path: Path, table: pa.Table) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=2)  # rows are looked for in several


def _zip(path: Path, files: dict[str, bytes], *, method: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)


def _tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
