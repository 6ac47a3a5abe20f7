import json

import pandas as pd
import pytest

from fvlm_core.data.sources import caption_prompt, smoltalk, table, webvid
from fvlm_core.errors import UserError


def write(path, rows):
    frame = pd.DataFrame(rows)
    frame.to_csv(path, index=False) if path.suffix == ".csv" else frame.to_parquet(path)
    return path


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_url_and_caption_are_enough(tmp_path, suffix):
    path = write(tmp_path / f"videos{suffix}", [{"url": "a.mp4", "caption": "NA"}, {"url": "b.mp4", "caption": None}])
    rows = table.read_videos(path, source="mine")
    assert [row["url"] for row in rows] == ["a.mp4", "b.mp4"]
    assert rows[0] | {"conversations": "", "probes": ""} == {
        "url": "a.mp4",
        "caption": "NA",
        "source": "mine",
        "kind": "video",
        "split": "",
        "conversations": "",
        "probes": "",
        "extra": "{}",
    }
    assert json.loads(rows[0]["conversations"]) == [[{"question": caption_prompt("mine"), "answer": "NA"}]]
    assert rows[1]["caption"] == ""


def test_webvid_is_asked_for_what_it_is(tmp_path):
    path = write(
        tmp_path / "part.csv", [{"videoid": 1, "name": "a dog", "page_dir": "x", "contentUrl": "http://h/1.mp4", "duration": "PT5S"}]
    )
    [row] = webvid.read_videos(path)
    assert (row["url"], row["caption"], row["source"]) == ("http://h/1.mp4", "a dog", "webvid")
    assert json.loads(row["conversations"])[0][0]["question"] == "What would be the WebVid caption for this video?"
    with pytest.raises(UserError, match="no column contentUrl"):
        webvid.read_videos(write(tmp_path / "other.csv", [{"name": "a", "url": "b"}]))


GOOD = {"url": "a.mp4", "caption": "a"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"link": "a.mp4", "caption": "a"}], "lacks the column url"),
        ([{"x": 1}], "lacks the columns url and caption"),
        ([GOOD | {"source": "My Videos"}], "source that is not allowed: 'My Videos' \\(row 1\\)"),
        ([GOOD, GOOD | {"kind": "audio"}], "kind that is not allowed: 'audio' \\(row 2\\)"),
        ([GOOD | {"split": "test"}], "split that is not allowed"),
        ([GOOD | {"conversations": "{"}], "conversations, probes or extra are wrong"),
        ([GOOD | {"conversations": "[[]]"}], "conversations, probes or extra are wrong"),
        ([GOOD | {"conversations": '[[{"question": "q"}]]'}], "conversations, probes or extra are wrong"),
        ([GOOD | {"probes": "[null, null]"}], "conversations, probes or extra are wrong"),
        ([GOOD | {"extra": "[]"}], "extra must be a JSON object"),
    ],
)
def test_bad_tables(tmp_path, rows, message):
    with pytest.raises(UserError, match=message):
        table.read_videos(write(tmp_path / "videos.csv", rows), source="mine")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("videos.csv", b"url,caption\n", "no rows"),
        ("videos.csv", b"", "lacks the columns"),
        ("videos.csv", b"url,caption\na,b\na,b,c,d\n", "cannot be read"),
        ("videos.csv", b"url,caption\n\xff\xfe\xfa,b\n", "cannot be read"),
        ("videos.parquet", b"no parquet", "cannot be read"),
        ("videos.xlsx", b"", "cannot be a .xlsx"),
        ("missing.csv", None, "does not exist"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        table.read_videos(tmp_path / name, source="mine")


def test_smoltalk_chats(tmp_path):
    turn = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": " Hello! "}]
    chats = [
        turn,
        [{"role": "system", "content": "Be brief"}, *turn],
        turn + turn,
        turn[:1],
        [turn[0], {"role": "assistant", "content": " "}],
    ]
    (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps({"messages": chat, "source": "x"}) for chat in chats))
    pd.DataFrame({"messages": chats}).to_parquet(tmp_path / "chats.parquet")
    pair = {"question": "Hi", "answer": "Hello!"}
    for name in ("chats.jsonl", "chats.parquet"):
        assert list(smoltalk.read_chats(tmp_path / name)) == [[pair], [pair, pair]]


@pytest.mark.parametrize(
    ("name", "content"), [("a.jsonl", '{"text": 1}'), ("a.jsonl", "{"), ("a.parquet", "x"), ("a.txt", "x"), ("b.jsonl", None)]
)
def test_bad_chats(tmp_path, name, content):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=r"not a file of chats|does not exist"):
        list(smoltalk.read_chats(tmp_path / name))
