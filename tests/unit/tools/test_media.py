"""Videos and images of the demo and the tests: reading a file gives what was encoded."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from sglang_mminfer.tools.media import make_image, make_video, read_video, video_frames


def test_a_video_reads_back_as_it_was_drawn(tmp_path):
    path = make_video(tmp_path / "folder" / "a.mp4", frames=20, width=112, height=84, fps=8, seed=3)
    decoded, fps = read_video(path)
    drawn = np.stack(list(video_frames(20, 112, 84, 8, seed=3)))
    assert decoded.shape == drawn.shape == (20, 84, 112, 3)
    assert fps == 8
    # Frame by frame, so that a dropped or doubled frame shows.
    error = np.abs(decoded.astype(int) - drawn).mean(axis=(1, 2, 3))
    assert error.max() < 8


def test_a_video_moves_smoothly():
    frames = np.stack(list(video_frames(48, 112, 112, 24, seed=0))).astype(int)
    steps = np.abs(np.diff(frames, axis=0)).mean(axis=(1, 2, 3))
    assert steps.min() > 0 and steps.max() < 16
    assert np.abs(frames[-1] - frames[0]).mean() > 2 * steps.mean()


def test_the_same_seed_gives_the_same_bytes_and_another_one_does_not(tmp_path):
    one, two, other = (
        make_video(tmp_path / f"{i}.mp4", frames=6, width=56, height=56, fps=4, seed=seed).read_bytes()
        for i, seed in enumerate((1, 1, 2))
    )
    assert one == two != other
    first, second = (make_image(tmp_path / f"{i}.png", 40, 30, seed=5).read_bytes() for i in range(2))
    assert first == second != make_image(tmp_path / "2.png", 40, 30, seed=6).read_bytes()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_one_frame_is_a_video(tmp_path):
    decoded, _ = read_video(make_video(tmp_path / "one.mp4", frames=1, width=56, height=56, fps=24))
    assert decoded.shape == (1, 56, 56, 3)


def test_an_image_has_the_size_asked_for(tmp_path):
    with Image.open(make_image(tmp_path / "a.png", width=90, height=60, seed=1)) as image:
        assert image.size == (90, 60) and image.mode == "RGB"


@pytest.mark.parametrize("content", [b"", b"not a video", b"\0" * 5000])
def test_an_unreadable_file_is_named(tmp_path, content):
    path = tmp_path / "broken.mp4"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"broken\.mp4: expected a video file .*\({len(content)} bytes\)"):
        read_video(path)


def test_a_truncated_video_is_named(tmp_path):
    whole = make_video(tmp_path / "whole.mp4", frames=30, width=112, height=112).read_bytes()
    path = tmp_path / "half.mp4"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"half\.mp4: expected a video file"):
        read_video(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.mp4: no such file"):
        read_video(tmp_path / "nowhere.mp4")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"frames": 0}, "frames: expected a number > 0, got 0"),
        ({"frames": 2, "width": -4}, "width: expected a number > 0"),
        ({"frames": 2, "width": 57}, "width: expected an even number"),
        ({"frames": 2, "fps": 0}, "fps: expected a number > 0"),
    ],
)
def test_impossible_videos_are_refused(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_video(tmp_path / "a.mp4", **arguments)
    assert not list(tmp_path.iterdir())


def test_names_without_the_right_ending_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"a\.avi: expected a name that ends in \.mp4"):
        make_video(tmp_path / "a.avi", frames=2)
    with pytest.raises(ValueError, match=r"a\.jpg: expected a name that ends in \.png"):
        make_image(tmp_path / "a.jpg")
