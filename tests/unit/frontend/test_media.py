"""Files of programs: what is refused before it is sent, and how often a file is read."""

from __future__ import annotations

import base64
import os
from pathlib import Path

import pytest
from PIL import Image

from sglang_mminfer.frontend.media import MediaError, MediaStore
from sglang_mminfer.tools.media import make_image, make_video


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("media")
    make_image(root / "a.png", 32, 48)
    make_video(root / "a.mp4", 4, 32, 32)
    (root / "text.mp4").write_text("this is no video, nor is ü")
    (root / "text.png").write_text("this is no image")
    (root / "empty.mp4").write_bytes(b"")
    (root / "image.mp4").write_bytes((root / "a.png").read_bytes())
    (root / "folder.mp4").mkdir()
    return root


@pytest.mark.parametrize(
    ("kind", "name", "told"),
    [
        ("video", "nothing.mp4", "cannot be read: No such file or directory"),
        ("video", "folder.mp4", "cannot be read: Is a directory"),
        ("video", "text.mp4", "not a video, but text"),
        ("video", "image.mp4", "not a video, but a PNG image"),
        ("video", "empty.mp4", "is empty"),
        ("image", "text.png", "not an image that can be read"),
        ("image", "a.mp4", "not an image that can be read"),
    ],
)
def test_a_bad_file_is_named(files: Path, kind: str, name: str, told: str) -> None:
    with pytest.raises(MediaError) as error:
        MediaStore().medium(kind, str(files / name))  # type: ignore[arg-type]
    assert str(error.value) == f"{files / name}: {told}"


def test_every_kind_of_source(files: Path) -> None:
    store, image, video = MediaStore(), files / "a.png", files / "a.mp4"
    coded = "data:image/png;base64," + base64.b64encode(image.read_bytes()).decode()
    for source in (image, str(image), image.as_uri(), image.read_bytes(), coded):
        assert store.data_url(store.medium("image", source)) == coded
    assert store.data_url(store.medium("video", str(video))).startswith("data:video/mp4;base64,")
    assert store.data_url(store.medium("video", "https://h/v.mp4")) == "https://h/v.mp4"
    with Image.open(image) as opened:
        pixels = opened.convert("RGB")
    assert store.data_url(store.medium("image", pixels)).startswith("data:image/png;base64,")
    with pytest.raises(MediaError, match="expected a path, a URL or bytes, got int"):
        store.medium("video", 3)
    with pytest.raises(MediaError, match=r"^the video of 4 bytes: not a video, but text$"):
        store.medium("video", b"text")


def test_a_file_is_read_once_until_it_changes(files: Path, tmp_path: Path) -> None:
    store, path = MediaStore(), tmp_path / "a.mp4"
    path.write_bytes((files / "a.mp4").read_bytes())
    first = {store.data_url(store.medium("video", str(path))) for _ in range(3)}
    assert (store.reads, len(first)) == (1, 1)
    path.write_bytes(path.read_bytes() + b"\0")
    os.utime(path, ns=(1, 1))
    assert store.data_url(store.medium("video", str(path))) not in first
    assert store.reads == 2


def test_encoded_files_are_kept_within_a_bound(files: Path) -> None:
    store = MediaStore(keep_bytes=1)
    image, video = store.medium("image", files / "a.png"), store.medium("video", files / "a.mp4")
    for medium in (image, image, video, image):
        store.data_url(medium)
    assert store.reads == 3
