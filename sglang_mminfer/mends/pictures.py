"""Pictures as every viewer shows them: upright, in 8-bit RGB, what is transparent on white.

SGLang asks PIL for "RGB" and takes what comes: photos lie on their side, more than 8 bits of grey are white or black,
and what is transparent shows the colours beneath, which are whatever the program that wrote the file left there.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from io import BytesIO
from typing import TYPE_CHECKING, Any

from sglang_mminfer import mends, settings
from sglang_mminfer.mends import limits, options

if TYPE_CHECKING:
    from PIL import Image

ORIENTATION = 0x0112
WHITE = (255, 255, 255)

_JPEG = "/9j/"
"""How base64 of every JPEG file begins; SGLang takes it for a path."""

_ALPHA = ("RGBA", "RGBa", "LA", "La", "PA")


def load(
    original: Callable[..., Any],
    family: Any,
    data: Any,
    modality: Any,
    frame_count_limit: int | None = None,
    audio_sample_rate: int | None = None,
    discard_alpha_channel: bool = True,
) -> Any:
    """In place of BaseMultimodalProcessor._load_single_item for a picture: RGB, upright.

    Args:
        original: SGLang's own, which still gets JPEG files that a GPU decodes, and all that no mend is for.
        family: the processor's class.

    Raises:
        ValueError: for what is no picture, or is larger than `limits` allow; before it is decoded.
    """
    source, wanted = options.of(data, family, "image")
    picture = source if _is_picture(source) else opened(source)
    if picture is None:
        return original(data, modality, frame_count_limit, audio_sample_rate, discard_alpha_channel)
    if mends.active("odd_sizes"):
        limits.check_size("image", *picture.size)
    # Other colours than RGB come off the GPU with another number of channels, and nothing there turns a picture.
    if not wanted and picture.format == "JPEG" and picture.mode == "RGB" and not _turned(picture):
        from sglang.srt.utils import common

        file = _file_of(picture)
        if file and common.is_jpeg_with_cuda(file, family.gpu_image_decode):
            return original(file, modality, frame_count_limit, audio_sample_rate, discard_alpha_channel)
    # Some families have a way of their own with what is transparent.
    own_way = not discard_alpha_channel or family.smart_rgb_conversion
    picture = shown(picture, wanted, flat=not own_way)
    if own_way:
        return original(picture, modality, frame_count_limit, audio_sample_rate, discard_alpha_channel)
    return picture


def as_file(family: Any, data: Any, *, squared: bool = False) -> Any:
    """A picture for code that decodes by itself and looks at nothing but pixels: the file as it came where that is
    right, else another of the same picture; a PIL image for a PIL image.

    Args:
        squared: whether the family puts it into a square.

    Raises:
        ValueError: as `load`.
    """
    source, wanted = options.of(data, family, "image")
    picture = source if _is_picture(source) else opened(source)
    if picture is None:
        return data
    if mends.active("odd_sizes"):
        limits.check_size("image", *picture.size)
        if squared:
            limits.check_square(*picture.size)
    file = _file_of(picture)
    plain = picture.mode == "RGB" and "transparency" not in picture.info and not _turned(picture)
    if plain and not wanted and picture is not source:
        return file
    seen = shown(picture, wanted)
    if picture is source:
        return seen
    other = BytesIO()
    seen.save(other, "BMP")
    return other.getvalue()


def snapshot(original: Callable[..., Any], family: Any, data: Any, modality: Any) -> Any:
    """In place of MediaArtifactCacheMixin.snapshot_media_source: what SGLang keeps of a picture to decode it later.

    With the options that came with it; and a PIL image upright, because its hash knows nothing of EXIF.
    """
    import dataclasses

    from sglang.srt.utils import ImageData

    source, wanted = options.of(data, family, "image")
    if _is_picture(source):
        return original(load(original, family, data, modality), modality)
    kept = original(source, modality)
    return dataclasses.replace(kept, data=ImageData(url=kept.data, preprocess_kwargs=wanted)) if wanted else kept


def shown(picture: Image.Image, wanted: dict[str, Any], flat: bool = True) -> Image.Image:
    """A picture as it is meant to be seen, in RGB.

    Args:
        wanted: the options that came with it; it carries them on.
        flat: False to keep what is transparent, in whatever mode.
    """
    try:
        picture.load()
    except (OSError, SyntaxError) as error:
        raise ValueError(f"image: it cannot be decoded: {error}") from error
    if mends.active("picture_orientation"):
        picture = upright(picture)
    if mends.active("picture_modes"):
        picture = eight_bit(picture)
        if flat:
            picture = on_white(picture)
    if flat and picture.mode != "RGB":
        picture = picture.convert("RGB")
    if longest := wanted.get("max_long_side_pixel"):
        picture = smaller(picture, longest)
    if wanted:
        picture.mminfer_options = wanted  # type: ignore[attr-defined]
    return picture


def upright(picture: Image.Image) -> Image.Image:
    """Turned and mirrored as its EXIF says."""
    from PIL import ImageOps

    if not _turned(picture):
        return picture
    return ImageOps.exif_transpose(picture)


def _turned(picture: Image.Image) -> bool:
    return orientation(picture) != 1


def orientation(picture: Image.Image) -> int:
    """1 to 8, as EXIF counts. A PNG may say it behind its pixels, and is decoded."""
    try:
        said = picture.getexif().get(ORIENTATION, 1)
    except Exception:  # broken EXIF says nothing; PIL has an error for each way of being broken
        return 1
    return said if said in range(1, 9) else 1


def eight_bit(picture: Image.Image) -> Image.Image:
    """Grey of more than 8 bits as grey of 8; any other picture as it is.

    What is white: of 16 bits 65,535, so that their upper 8 bits are what is seen. 32-bit integers and floats do not
    say it, and take the least of 255, 65,535 and the largest 32-bit integer that no value exceeds; floats also 1.
    Less than 0, and what is no number, is black.
    """
    import numpy as np
    from PIL import Image

    if not (picture.mode.startswith("I") or picture.mode == "F"):
        return picture
    values = np.asarray(picture)
    if picture.mode.startswith("I;16"):
        return Image.fromarray((values.astype(np.uint16) >> 8).astype(np.uint8))
    scaled = np.nan_to_num(values.astype(np.float64), nan=0.0).clip(0)
    most = float(scaled.max(initial=0.0))
    for levels in (1.0, 255.0, 65535.0, 2.0**31 - 1):
        if most <= levels and (levels > 1 or picture.mode == "F"):
            break
    else:
        levels = most
    steps = {1.0: 255.0, 255.0: 1.0, 65535.0: 1 / 256}.get(levels, 255.0 / levels)
    return Image.fromarray((scaled * steps + (0.5 if levels == 1.0 else 0.0)).clip(0, 255).astype(np.uint8))


def on_white(picture: Image.Image) -> Image.Image:
    """Over white where it is transparent; in any mode if nothing is."""
    from PIL import Image

    if picture.mode not in _ALPHA and "transparency" not in picture.info:
        return picture
    if picture.mode in ("La", "RGBa"):  # alpha is multiplied in: undone first
        picture = picture.convert(picture.mode.upper())
    picture = picture.convert("RGBA")
    white = Image.new("RGBA", picture.size, (*WHITE, 255))
    return Image.alpha_composite(white, picture).convert("RGB")


def smaller(picture: Image.Image, longest: int) -> Image.Image:
    """No side longer than `longest` pixels."""
    from PIL import Image

    width, height = shrunk(*picture.size, longest)
    return picture if (width, height) == picture.size else picture.resize((width, height), Image.Resampling.BICUBIC)


def shrunk(width: int, height: int, longest: int) -> tuple[int, int]:
    """A width and a height in the same relation, no more than `longest`."""
    if max(width, height) <= longest:
        return width, height
    scale = longest / max(width, height)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _is_picture(source: Any) -> bool:
    from PIL import Image

    return isinstance(source, Image.Image)


def is_file(data: Any) -> bool:
    """Whether it has yet to be decoded: bytes, or SGLang's ImageData around them."""
    return isinstance(getattr(data, "url", data), bytes)


def opened(source: Any) -> Image.Image | None:
    """The picture of a file, its header read and no more; None for what SGLang has to judge.

    Raises:
        ValueError: if it is no picture, or if PIL finds it too large.
    """
    from PIL import Image, UnidentifiedImageError

    if not isinstance(source, str | bytes):
        return None
    try:
        file = _bytes_of(source)
    except OSError as error:
        raise ValueError(f"image: {_named(source)} cannot be read: {error.strerror or error}") from error
    try:
        return Image.open(BytesIO(file))
    except Image.DecompressionBombError as error:
        if mends.active("odd_sizes"):
            raise ValueError(f"image: {error}; at most {settings.max_megapixels():g} megapixels are taken") from error
        raise
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"image: {_named(source)} is no picture that PIL can read: {error}") from error


def _file_of(picture: Image.Image) -> bytes:
    """What a picture that is not yet decoded was opened from; nothing of one that is no file's."""
    file = getattr(picture, "fp", None)
    return file.getvalue() if isinstance(file, BytesIO) else b""


def _bytes_of(source: str | bytes) -> bytes:
    """A file that came as SGLang lets it come: itself, a path, a URL, base64."""
    import pybase64
    from sglang.srt.multimodal.cache.identity import _read_media_bytes

    if isinstance(source, str) and source.startswith(_JPEG) and not os.path.isfile(source):
        return pybase64.b64decode(source, validate=True)
    return _read_media_bytes(source)


def _named(source: Any) -> str:
    said = source.decode(errors="replace") if isinstance(source, bytes) else str(source)
    return repr(said if len(said) <= 60 else f"{said[:60]}...")
