"""--mminfer-media-root: local files outside one directory are refused, however a request names them.

SGLang's own loaders say what a name would open, so the tests compare with what really happens without the directory.
"""

from __future__ import annotations

import asyncio
import base64
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.managers.io_struct import EmbeddingReqInput, GenerateReqInput
from sglang.srt.plugins import load_plugins
from sglang.srt.utils import ImageData, VideoData, common
from sglang.srt.utils.video_decoder import VideoDecoderWrapper

from sglang_mminfer import settings
from sglang_mminfer.mends import asked, pictures, videos
from sglang_mminfer.serving import clip_sender, flags, hooks, media_root
from sglang_mminfer.serving.media_root import ForbiddenFile, check
from sglang_mminfer.tools.media import make_image, make_video

load_plugins()


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with files and links, beside a folder that no client may read."""
    folder = tmp_path_factory.mktemp("disk")
    for name in ("root", "root/deep", "secret"):
        (folder / name).mkdir()
    for name in ("root/a b", "root/deep/c", "secret/x"):
        make_image(folder / f"{name}.png", 56, 84, seed=1)
        make_video(folder / f"{name}.mp4", 4, 64, 64, 2, seed=1)
    (folder / "root/out.png").symlink_to(folder / "secret/x.png")
    (folder / "root/out.mp4").symlink_to("../secret/x.mp4")
    (folder / "root/outside").symlink_to(folder / "secret")
    (folder / "root/inner.png").symlink_to(folder / "root/deep/c.png")
    (folder / "rooted.png").write_bytes((folder / "secret/x.png").read_bytes())
    (folder / "rooted.mp4").write_bytes((folder / "secret/x.mp4").read_bytes())
    return folder


@pytest.fixture
def in_root(disk: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory is the parent of the root, so that relative names lead in and out."""
    monkeypatch.chdir(disk)
    return disk / "root"


OUTSIDE = [
    "{disk}/secret/x{end}",
    "{disk}/rooted{end}",  # begins with the root's letters
    "{disk}/root/../secret/x{end}",
    "{disk}/root/deep/../../secret/x{end}",
    "{disk}/root/out{end}",
    "{disk}/root/outside/x{end}",
    "//{disk}/secret/x{end}",
    "secret/x{end}",
    "root/../secret/x{end}",
    "root/out{end}",
    "file://{disk}/secret/x{end}",
    "file://{disk}/root/../secret/x{end}",
    "file://{disk}/root/%2e%2e/secret/x{end}",
    "file://{disk}/root%2f..%2fsecret%2fx{end}",
    "file://{disk}/root/out{end}",
    "file://localhost{disk}/secret/x{end}",
    "file://{disk}/secret/x{end}?a=1#b",
    "file:{disk}/secret/x{end}",
    "FILE://{disk}/secret/x{end}",
    "concat:{disk}/secret/x{end}",
    "subfile:{disk}/secret/x{end}",
]
INSIDE = [
    "{disk}/root/a b{end}",
    "{disk}/root/deep/../deep/c{end}",
    "{disk}/root/deep/c{end}",
    "root/deep/c{end}",
    "file://{disk}/root/a b{end}",
    "file://{disk}/root/a%20b{end}",
    "file://localhost{disk}/root/deep/c{end}",
]
NOTHING_THERE = ["/nowhere.png", "file:///nowhere.png", "../nowhere.png", "{disk}/root/../nowhere.mp4", "/", ".."]


def named(form: str, disk: Path, end: str = ".png") -> str:
    return form.format(disk=disk, end=end)


@pytest.mark.parametrize("end", [".png", ".mp4"])
@pytest.mark.parametrize("form", OUTSIDE)
def test_a_file_outside_is_refused(form: str, end: str, in_root: Path, disk: Path) -> None:
    name = named(form, disk, end)
    with pytest.raises(ForbiddenFile) as refused:
        check("video", [name], str(in_root))
    for words in (repr(name), str(in_root), "--mminfer-media-root", "video: "):
        assert words in str(refused.value)


@pytest.mark.parametrize("form", [*OUTSIDE, *INSIDE])
def test_what_sglang_and_the_mends_would_open_is_what_is_checked(form: str, in_root: Path, disk: Path) -> None:
    """A file that a loader opens for a name is refused exactly if it lies outside."""
    for end, opened in ((".png", _picture), (".mp4", _video)):
        name = named(form, disk, end)
        if (content := opened(name)) is None:
            continue
        inside = {path.read_bytes() for path in in_root.rglob(f"*{end}") if not path.is_symlink()}
        allowed = form in INSIDE
        assert content in inside  # all of one kind are equal; so at least a file of ours was opened
        if allowed:
            check("image", name, str(in_root))
        else:
            with pytest.raises(ForbiddenFile):
                check("image", name, str(in_root))


def _picture(name: str) -> bytes | None:
    try:
        picture = pictures.opened(name)
    except ValueError:
        return None
    return picture.fp.getvalue()


def _video(name: str) -> bytes | None:
    try:
        return common.get_video_bytes(name)
    except (ValueError, OSError):
        return None


def test_loaders_really_open_names_of_many_forms(in_root: Path, disk: Path) -> None:
    """Without this the test above could pass because nothing was opened."""
    forms = [*OUTSIDE, *INSIDE]
    assert sum(_picture(named(form, disk, ".png")) is not None for form in forms) >= 20
    assert sum(_video(named(form, disk, ".mp4")) is not None for form in forms) >= 20


@pytest.mark.parametrize("form", NOTHING_THERE)
def test_what_does_not_exist_gets_the_same_answer(form: str, in_root: Path, disk: Path) -> None:
    """Nobody learns which files there are."""
    with pytest.raises(ForbiddenFile, match="does not lie in"):
        check("image", named(form, disk), str(in_root))


@pytest.mark.parametrize("form", INSIDE)
def test_a_file_inside_is_taken(form: str, in_root: Path, disk: Path) -> None:
    for end in (".png", ".mp4"):
        check("image", named(form, disk, end), str(in_root))
    check("image", str(in_root / "inner.png"), str(in_root))
    check("image", str(in_root / "not there yet.png"), str(in_root))


def test_a_root_may_be_a_link_and_may_be_everything(in_root: Path, disk: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(in_root)
    check("image", str(in_root / "deep/c.png"), str(link))
    check("image", str(link / "deep/c.png"), str(in_root))
    check("image", str(disk / "secret/x.png"), "/")
    with pytest.raises(ForbiddenFile):
        check("image", str(link / "out.png"), str(link))


def test_urls_data_and_contents_are_not_affected(in_root: Path, disk: Path) -> None:
    from PIL import Image

    content = (disk / "secret/x.png").read_bytes()
    encoded = base64.b64encode(content).decode()
    jpeg = base64.b64encode(b"\xff\xd8\xff\xe0" + bytes(60)).decode()
    assert jpeg.startswith("/9j/")
    taken: list[Any] = [
        *("http://127.0.0.1:9/etc/passwd", "https://h/../x.png", f"data:image/png;base64,{encoded}", encoded, jpeg),
        *(content, Image.open(disk / "secret/x.png"), None, [], {}, "x", "", 3, [[1.5, 2]]),
        {"format": "processor_output", "feature": [[0.5] * 3], "url": f"data:,{encoded}", "fps": 1, "detail": "auto"},
        f"data:video/jpeg;base64,{jpeg},{jpeg}",
        ImageData(url=encoded),
    ]
    check("image", taken, str(in_root))


def test_a_name_is_seen_however_it_is_packed(in_root: Path, disk: Path) -> None:
    name = str(disk / "secret/x.png")
    for packed in (
        *([name], [[name]], ("x", [name]), {"url": name}, [{"image": name, "fps": 1}], {"frames": [[name]]}),
        *(ImageData(url=name), VideoData(url=name), [VideoData(url=name)], Path(name)),
        *({"type": name}, f"data:video/jpeg;base64,{name}", f"DATA:VIDEO/JPEG;base64,AAAA,{name}"),
        [str(disk / "root/deep/c.png"), name],
    ):
        with pytest.raises(ForbiddenFile, match="secret"):
            check("image", packed, str(in_root))


def test_frames_that_are_paths_are_files_for_the_mends(disk: Path) -> None:
    """Why a list of frames in a data: URL is looked into."""
    name = str(disk / "secret/x.png")
    video = videos.as_video(videos.frames_in(f"data:video/jpeg;base64,{name},{name}") or (), 1.0)
    assert len(video.get_frames_at([0])) == 1


def test_null_bytes_and_endless_names_are_refused_or_read_by_nobody(in_root: Path) -> None:
    for name in ("/etc/\0passwd", f"{in_root}/\0", "file:///" + "a/" * 100_000, "/etc/" + "a" * 3000):
        with pytest.raises(ForbiddenFile) as refused:
            check("image", name, str(in_root))
        assert len(str(refused.value)) < 800
    check("image", "/etc/" + "a" * 5000, str(in_root))  # longer than any path, so base64 for SGLang
    with pytest.raises(ForbiddenFile):
        check("video", f"cache:{in_root.parent}/secret/x.mp4?{'a' * 5000}", str(in_root))


# ---- requests ----------------------------------------------------------------------------------------------


class Manager:
    """Stands for a TokenizerManager: generate_request shows that the request went on."""

    def __init__(self, root: str | None, backend: str = "mminfer") -> None:
        self.server_args = SimpleNamespace(attention_backend=backend, **{flags.MEDIA_ROOT_ATTRIBUTE: root})

    def generate(self, request: Any) -> list[str]:
        async def gather() -> list[str]:
            return [answer async for answer in clip_sender.generate_request(Manager.original, self, request)]

        return asyncio.run(gather())

    async def original(self, obj: Any) -> Any:
        yield "answer"


def requests(name: str) -> Iterator[Any]:
    """Requests of all kinds with a file, as the HTTP server and Engine make them."""
    for kind in ("image", "video", "audio"):
        field = f"{kind}_data"
        yield GenerateReqInput(text="a", **{field: name})
        yield GenerateReqInput(text=["a", "b"], **{field: [[name], ["http://h/a"]]})
        yield GenerateReqInput(input_ids=[1, 2], **{field: [name], "sampling_params": {"n": 2}})
        yield EmbeddingReqInput(text="a", **{field: name})


def test_every_request_is_checked(in_root: Path, disk: Path) -> None:
    root = str(in_root)
    for request in requests(str(disk / "secret/x.png")):
        with pytest.raises(ValueError, match=r"^(image|video|audio): '.*/secret/x.png' does not lie in .*/root, "):
            Manager(root).generate(request)
    for request in requests(str(disk / "root/deep/c.png")):
        assert Manager(root).generate(request) == ["answer"]
    for request in requests(str(disk / "secret/x.png")):
        assert Manager(None).generate(request) == Manager(root, backend="triton").generate(request) == ["answer"]
    assert Manager(root).generate(GenerateReqInput(text="/etc/passwd")) == ["answer"]


def test_an_array_is_no_name(in_root: Path) -> None:
    import numpy as np

    request = GenerateReqInput(text="a", video_data=np.zeros((2, 4, 4, 3), np.uint8))
    assert media_root.refused(Manager(str(in_root)).server_args, request) is None


@pytest.fixture
def server_with_a_root(in_root: Path) -> Iterator[None]:
    before = asked.server_args()
    hooks.note(Manager(str(in_root)).server_args)  # as SGLang's own call, which installs the hooks
    yield
    asked.note(before or SimpleNamespace(attention_backend=None))


@pytest.mark.usefixtures("server_with_a_root")
def test_a_picture_that_is_read_before_there_is_a_request(disk: Path) -> None:
    with pytest.raises(ForbiddenFile):
        media_root.before_decision(0, ImageData(url=str(disk / "secret/x.png")))
    media_root.before_decision(0, ImageData(url=str(disk / "root/deep/c.png")))


PLAYLISTS = [
    b"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nfile://%s\n#EXT-X-ENDLIST\n",
    b"\xef\xbb\xbf#EXTM3U\n%s\n",
    b"ffconcat version 1.0\nfile %s\n",
    b'<?xml version="1.0"?>\n<MPD><BaseURL>%s</BaseURL></MPD>\n',
    b"\n\n  <CompositionPlaylist>%s</CompositionPlaylist>",
]


@pytest.mark.parametrize("playlist", PLAYLISTS)
@pytest.mark.usefixtures("server_with_a_root")
def test_a_playlist_is_no_video(playlist: bytes, disk: Path, tmp_path: Path) -> None:
    content = playlist % os.fsencode(disk / "secret/x.mp4")
    path = tmp_path / "a.mp4"
    path.write_bytes(content)
    for source in (content, str(path)):
        with pytest.raises(ForbiddenFile, match="video: it is a playlist"):
            VideoDecoderWrapper(source)
    for source in (f"data:audio/wav;base64,{base64.b64encode(content).decode()}", str(path), content):
        with pytest.raises(ForbiddenFile, match="audio: it is a playlist"):
            common.load_audio(source)


@pytest.mark.usefixtures("server_with_a_root")
def test_videos_are_no_playlists(disk: Path) -> None:
    path = disk / "root/deep/c.mp4"
    for source in (str(path), path.read_bytes(), b"", "/nowhere", "\0", 3):
        media_root.before_video(source)
    media_root.before_video(b"\0\0\0<ftypisom")  # a box of 60 bytes, no XML
    for head in (b"RIFF....WAVEfmt ", b"\xff\xfbabc", b"ID3abc", b"OggS", b""):
        media_root.before_audio(head)
    assert len(VideoDecoderWrapper(path.read_bytes())) == 4


def test_without_a_root_a_playlist_is_sglangs_matter() -> None:
    asked.note(SimpleNamespace(attention_backend="mminfer"))
    media_root.before_video(PLAYLISTS[0])
    media_root.before_audio(PLAYLISTS[0])


# ---- the flag ----------------------------------------------------------------------------------------------


def test_flag_and_variable(in_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings.directory("root") == str(in_root)
    for path in ("nowhere", "rooted.png", ""):
        with pytest.raises(Exception, match=f"expected a directory that exists, got '{path}'"):
            settings.directory(path)
    variable = settings.MEDIA_ROOT.variable
    by_flag = SimpleNamespace(**{flags.MEDIA_ROOT_ATTRIBUTE: str(in_root)})
    assert flags.media_root(by_flag, {variable: str(tmp_path)}) == str(in_root)
    assert flags.media_root(SimpleNamespace(), {variable: str(tmp_path)}) == str(tmp_path)
    assert flags.media_root(SimpleNamespace(), {}) is None
