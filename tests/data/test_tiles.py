"""Frames stored as tiles: squares of one are those of all of it decoded, and only the tiles that are touched are."""

import io
from dataclasses import replace

import numpy as np
import pytest
import simplejpeg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fvlm_core.data.frames import encode_jpeg
from fvlm_core.data.shard_io import CorruptSampleError
from fvlm_core.data.shard_set import ShardSet
from fvlm_core.data.tiles import TiledFrame, TiledFrames, TiledSample, tiled, tiles_of
from fvlm_core.errors import UserError
from tests.tiny import tiled_shards


def picture(side: int, seed: int = 0) -> np.ndarray:
    """Smooth colours, as a photograph's: uint8 [side, side, 3]."""
    rough = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(rough).resize((side, side), Image.Resampling.BICUBIC))


def stored(side: int, tile_px: int, small_px: int, seed: int = 0) -> TiledFrame:
    frame = TiledFrame.parse(tiled(encode_jpeg(picture(side, seed)), tile_px, small_px))
    assert frame is not None
    return frame


def in_full(frame: TiledFrame) -> np.ndarray:
    """Every tile by Pillow, put together."""
    n = round(len(frame.tiles) ** 0.5)
    opened = [np.asarray(Image.open(io.BytesIO(tile))) for tile in frame.tiles]
    return np.concatenate([np.concatenate(opened[row * n : (row + 1) * n], axis=1) for row in range(n)])


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 4), tile_px=st.sampled_from([7, 16, 24]), side=st.integers(1, 12), seed=st.integers(0, 99))
def test_squares_are_those_of_the_frame_decoded_in_full_and_untouched_tiles_stay_as_they_are(n, tile_px, side, seed):
    """Squares of any side, across tiles' edges too, of two frames in any order."""
    frames = TiledFrames([stored(n * tile_px, tile_px, tile_px, number) for number in (0, 1)], "here")
    rng = np.random.default_rng(seed)
    cells = max(1, n * tile_px // side)
    side = min(side, n * tile_px)
    frame, down, right = (torch.from_numpy(rng.integers(0, high, size)) for high, size in ((2, 3), (cells, (3, 2)), (cells, (3, 2))))
    found = frames.squares(frame, down, right, side).numpy().reshape(3, 2, side, side, 3)
    full = [in_full(one) for one in frames.frames]
    touched = set()
    for row in range(3):
        for place in range(2):
            top, left = int(down[row, place]) * side, int(right[row, place]) * side
            assert np.array_equal(found[row, place], full[int(frame[row])][top : top + side, left : left + side])
            corners = [(y // tile_px, x // tile_px) for y in range(top, top + side) for x in range(left, left + side)]
            touched |= {(id(frames.frames[int(frame[row])]), y * n + x) for y, x in corners}
    assert set(frames.decoded) == touched


def test_a_tiled_frame_is_the_frame_and_a_reader_of_jpegs_sees_it_small():
    content = tiled(encode_jpeg(picture(96)), 24, 32)
    assert Image.open(io.BytesIO(content)).size == (32, 32)
    assert simplejpeg.decode_jpeg(content, "RGB").shape == (32, 32, 3)
    frame = TiledFrame.parse(content)
    assert frame is not None
    out = np.empty((96, 96, 3), np.uint8)
    frame.decode(out)
    assert np.array_equal(out, in_full(frame))
    assert np.abs(out.astype(int) - picture(96)).mean() < 3, "quality 90, twice"
    means = picture(96).reshape(32, 3, 32, 3, 3).mean((1, 3))
    assert np.abs(simplejpeg.decode_jpeg(frame.small, "RGB") - means).mean() < 6, "colours at half the resolution"
    assert TiledFrame.parse(encode_jpeg(picture(96))) is None


@pytest.mark.parametrize(("tile_px", "small_px"), [(25, 32), (24, 33)])
def test_sizes_that_do_not_divide_the_frame_are_refused(tile_px, small_px):
    with pytest.raises(ValueError, match=f"tiles of {tile_px} px and a small frame of {small_px} px"):
        tiled(encode_jpeg(picture(96)), tile_px, small_px)


@settings(max_examples=25, deadline=None)
@given(cut=st.integers(1, 400), at=st.integers(0, 400))
def test_a_frame_that_lost_bytes_is_no_frame(cut, at):
    content = tiled(encode_jpeg(picture(48)), 24, 24)
    at = min(at, len(content) - cut - 8)
    with pytest.raises(ValueError, match="not as long as its parts"):
        TiledFrame.parse(content[:at] + content[at + cut :])


def test_a_damaged_tile_is_an_error_where_it_is_opened_and_names_its_sample():
    good = stored(48, 24, 24)
    frames = TiledFrames([replace(good, tiles=[good.tiles[0], good.tiles[1][:20], *good.tiles[2:]])], "train/a.tar, sample 7")
    first = torch.zeros(1, dtype=torch.int64)
    frames.squares(first, torch.tensor([[0]]), torch.tensor([[0]]), 24)
    with pytest.raises(UserError, match=r"tile 1 of a frame is damaged(.|\n)*sample 7"):
        frames.squares(first, torch.tensor([[0]]), torch.tensor([[1]]), 24)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiled_shards(tmp_path_factory.mktemp("tiled"))


def test_a_set_of_tiled_shards_reads_in_full_or_small(folder):
    """In full as training reads it; small where a glance of that size looks; another size is read in full."""
    shards = ShardSet(folder)
    row = int(shards.rows("val", "gaze_caption").index[0])
    full, small = shards.read(row, image_repeats=1), shards.read_tiled(row, image_repeats=1, small_px=42)
    assert isinstance(small, TiledSample)
    assert small.tiles is not None
    assert (full.frames.shape, small.frames.shape, len(small.tiles)) == ((3, 84, 84, 3), (3, 42, 42, 3), 3)
    assert (small.turns, small.media, small.key) == (full.turns, full.media, full.key)
    for frame, expected in zip(small.tiles.frames, full.frames, strict=True):
        assert np.array_equal(in_full(frame), expected)
    other = shards.read_tiled(row, image_repeats=1, small_px=28)
    assert not isinstance(other, TiledSample)
    assert np.array_equal(other.frames, full.frames)
    text = int(shards.rows("val", "text").index[0])
    assert not len(shards.read_tiled(text, image_repeats=1, small_px=42).frames)
    assert tiles_of([small, full]) is None
    together = tiles_of([small, replace(small, turns=[])])
    assert together is not None
    assert len(together) == 3, "frames that two samples hold once"


def test_a_damaged_tiled_frame_is_a_damaged_sample(folder):
    shards = ShardSet(folder)
    row = int(shards.rows("val", "gaze_caption").index[0])
    first, end = shards._place(row)
    content = bytearray(shards._file(row).read(first, end - first))
    sizes = shards._sizes[row].values.to_numpy()
    content[sizes[0] - 12 : sizes[0] - 8] = b"\xff\xff\xff\x7f"
    with pytest.raises(CorruptSampleError, match="not as long as its parts"):
        shards.read(row, image_repeats=1, content=bytes(content))
