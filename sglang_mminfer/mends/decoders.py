"""Decoders with the interface of SGLang's: a video of single frames, and a file whose frames stay within `limits`.

Frames of a file come from the cache of media if they are there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from sglang.srt.utils.video_decoder import VideoDecoderWrapper

from sglang_mminfer.mends import limits, media_cache, pictures, stages


class _Decoder(VideoDecoderWrapper):
    """The interface that SGLang's processors use, on top of one method that reads frames."""

    def __init__(self) -> None:
        # The base class would open a file here, and would close one of these later.
        self._source = self._source_bytes = self._source_path = self._tmp_path = self._decoder = None

    def _tensor(self, indices: Sequence[int]) -> torch.Tensor:
        """uint8 [frames, height, width, 3]: the frames at `indices`."""
        raise NotImplementedError

    def __getitem__(self, index: Any) -> Any:
        frame = self._tensor([range(len(self))[int(index)]])[0]
        return frame if frame.is_cuda else frame.numpy()

    def get_frames_at(self, indices: Any) -> Any:
        """uint8 [frames, height, width, 3]: an array, or a tensor if the frames are on a GPU."""
        frames = self._tensor([int(i) for i in indices])
        return frames if frames.is_cuda else frames.numpy()

    def get_frames_as_tensor(self, indices: Any) -> torch.Tensor:
        """uint8 [frames, height, width, 3]; in pinned memory if there is a GPU and the frames are not on it."""
        frames = self._tensor([int(i) for i in indices])
        return frames.pin_memory() if not frames.is_cuda and torch.cuda.is_available() else frames


class Frames(_Decoder):
    """A video that came as single frames.

    Args:
        frames: one object for each frame, of any type that `read` takes. A frame is decoded when it is asked for.
        read: decodes one of `frames` to uint8 [height, width, 3].
        size: (height, width) of every frame.
        fps: frames per second.
    """

    def __init__(
        self, frames: Sequence[Any], read: Callable[[Any], np.ndarray], size: tuple[int, int], fps: float
    ) -> None:
        super().__init__()
        self._frames, self._read, self._size, self._fps = frames, read, size, fps

    def __len__(self) -> int:
        return len(self._frames)

    @property
    def avg_fps(self) -> float:
        """Frames per second."""
        return self._fps

    @property
    def frame_shape(self) -> tuple[int, int]:
        """(height, width) of every frame."""
        return self._size

    def _tensor(self, indices: Sequence[int]) -> torch.Tensor:
        limits.check_frames(len(indices), self._size[1], self._size[0])
        latest: dict[int, np.ndarray] = {}  # the frame read last: indices often repeat one
        out = np.empty((len(indices), *self._size, 3), np.uint8)
        for row, index in enumerate(indices):
            if index not in latest:
                latest = {index: self._read(self._frames[index])}
            out[row] = latest[index]
        return torch.from_numpy(out)


class Bounded(_Decoder):
    """SGLang's decoder of a file; it holds no more frames at a time than `limits` allow.

    Args:
        inner: SGLang's decoder.
        size: (height, width) to which frames are resized as they are decoded; None: they keep their size.
    """

    def __init__(self, inner: Any, size: tuple[int, int] | None = None) -> None:
        super().__init__()
        self._inner, self._resized = inner, size
        self._whole: tuple[int, int] | None = None
        self._one_by_one = False

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_inner":
            raise AttributeError(name)
        return getattr(self._inner, name)

    def __len__(self) -> int:
        return len(self._inner)

    @property
    def avg_fps(self) -> float:
        """Frames per second of the file; 0 if unknown."""
        return float(self._inner.avg_fps or 0.0)

    @property
    def source_bytes(self) -> bytes | None:
        """The file, if SGLang's decoder keeps it."""
        return self._inner.source_bytes

    @property
    def whole(self) -> tuple[int, int]:
        """(height, width) of the frames in the file."""
        if self._whole is None:
            frame = None if _tells_its_size(self._inner) else self._inner[0]
            self._whole = self._inner.frame_shape if frame is None else (int(frame.shape[0]), int(frame.shape[1]))
            # decord pads the rows of frames narrower than 32 pixels, reports a wrong shape, and cannot copy a batch.
            self._one_by_one = frame is not None and frame.shape[2] != 3
        return self._whole

    @property
    def frame_shape(self) -> tuple[int, int]:
        """(height, width) of the frames that are returned."""
        return self._resized or self.whole

    def resized(self, height: int, width: int) -> Bounded:
        """The same video with frames of [height, width]."""
        _ = self.whole  # read once, so that the copy has it too
        other = copy.copy(self)
        other._resized = (height, width)
        return other

    def _tensor(self, indices: Sequence[int]) -> torch.Tensor:
        height, width = self.frame_shape
        limits.check_frames(len(indices), width, height)
        origin = getattr(self._inner, media_cache.ORIGIN, None)
        if origin is None:
            return self._decoded(indices)
        key = (media_cache.FRAMES, origin.digest, height, width, tuple(indices))
        (frames,) = media_cache.of_process().get(key, lambda: (self._decoded(indices),), origin.unchanged)
        return frames.clone()

    def _decoded(self, indices: Sequence[int]) -> torch.Tensor:
        height, width = self.frame_shape
        _ = self.whole  # sets _one_by_one, which _read needs
        if (height, width) == self.whole:
            return self._read(list(indices))
        import torchvision

        batch, parts = limits.batch_of(self.whole[1], self.whole[0], len(indices)), []
        for start in range(0, len(indices), batch):
            frames = self._read(list(indices[start : start + batch])).permute(0, 3, 1, 2)
            with stages.timed("resize_ms"):
                # SGLang resizes frames for Qwen in the same way.
                smaller = torchvision.transforms.functional.resize(
                    frames, [height, width], interpolation=torchvision.transforms.InterpolationMode.BILINEAR
                )
                parts.append(smaller.permute(0, 2, 3, 1))
        return torch.cat(parts).contiguous()

    def _read(self, indices: list[int]) -> torch.Tensor:
        with stages.timed("decode_ms"):
            if not self._one_by_one:
                return self._inner.get_frames_as_tensor(indices)
            height, width = self.whole
            frames = [np.asarray(self._inner[i]).reshape(height, -1, 3)[:, :width] for i in indices]
            return torch.from_numpy(np.stack(frames))

    def __del__(self) -> None:
        """The file stays open: a copy with another size may still read it."""

    def close(self) -> None:
        """Closes the file."""
        inner = self.__dict__.get("_inner")
        if inner is not None:
            inner.close()
            self._inner = None


def _tells_its_size(decoder: Any) -> bool:
    metadata = getattr(decoder._decoder, "metadata", None)
    return bool(getattr(metadata, "height", None) and getattr(metadata, "width", None))


def shrunk(video: Bounded, longest: int) -> Bounded:
    """The video with frames whose longer side has at most `longest` pixels."""
    height, width = video.whole
    new_width, new_height = pictures.shrunk(width, height, longest)
    return video if (new_height, new_width) == (height, width) else video.resized(new_height, new_width)
