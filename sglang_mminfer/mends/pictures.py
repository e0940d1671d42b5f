"""Pictures as every viewer shows them: upright, 8-bit RGB, transparent pixels on white.

SGLang asks PIL for "RGB" and uses the result. So photos lie on their side, grey of more than 8 bits becomes white or
black, and transparent pixels show their hidden colour, which may be anything that the writing program left there.
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

ORIENTATION = 0x0112  # the EXIF tag
WHITE = (255, 255, 255)

_JPEG = "/9j/"
"""How the base64 text of every JPEG file begins. SGLang takes such a text for a path."""

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
    """Replaces BaseMultimodalProcessor._load_single_item for a picture.

    Args:
        original: SGLang's method. It still loads JPEG files that a GPU decodes, and everything that needs no mend.
        family: the processor's class.
        data, modality, frame_count_limit, audio_sample_rate, discard_alpha_channel: as for SGLang's method.

    Returns:
        A PIL image, upright, in RGB; or what `original` returns.

    Raises:
        ValueError: if it is no picture, or larger than `limits` allow. Sizes are checked before anything is decoded.
    """
    source, request_options = options.of(data, family, "image")
    picture = source if _is_picture(source) else opened(source)
    if picture is None:
        return original(data, modality, frame_count_limit, audio_sample_rate, discard_alpha_channel)
    if mends.active("odd_sizes"):
        limits.check_size("image", *picture.size)
    # The GPU decoder turns no picture, and returns another number of channels for any mode but RGB.
    if not request_options and picture.format == "JPEG" and picture.mode == "RGB" and not _turned(picture):
        from sglang.srt.utils import common

        file = _file_of(picture)
        if file and common.is_jpeg_with_cuda(file, family.gpu_image_decode):
            return original(file, modality, frame_count_limit, audio_sample_rate, discard_alpha_channel)
    # Some families treat transparent pixels in a way of their own.
    keeps_alpha = not discard_alpha_channel or family.smart_rgb_conversion
    picture = shown(picture, request_options, flat=not keeps_alpha)
    if keeps_alpha:
        return original(picture, modality, frame_count_limit, audio_sample_rate, discard_alpha_channel)
    return picture


def as_file(family: Any, data: Any, *, squared: bool = False) -> Any:
    """A picture for code that decodes files itself and looks at pixels only.

    Args:
        squared: whether the family puts the picture into a square.

    Returns:
        The file as it came, if its pixels are already right; else a BMP file with the right pixels. A PIL image gives a
        PIL image.

    Raises:
        ValueError: as `load`; also if the square is too large.
    """
    source, request_options = options.of(data, family, "image")
    picture = source if _is_picture(source) else opened(source)
    if picture is None:
        return data
    if mends.active("odd_sizes"):
        limits.check_size("image", *picture.size)
        if squared:
            limits.check_square(*picture.size)
    file = _file_of(picture)
    pixels_are_right = picture.mode == "RGB" and "transparency" not in picture.info and not _turned(picture)
    if pixels_are_right and not request_options and picture is not source:
        return file
    shown_picture = shown(picture, request_options)
    if picture is source:
        return shown_picture
    bmp = BytesIO()
    shown_picture.save(bmp, "BMP")
    return bmp.getvalue()


def snapshot(original: Callable[..., Any], family: Any, data: Any, modality: Any) -> Any:
    """Replaces MediaArtifactCacheMixin.snapshot_media_source: what SGLang keeps of a picture to decode it later.

    The snapshot also carries the picture's options. A PIL image is turned upright first, because SGLang's hash of it
    does not cover EXIF.
    """
    import dataclasses

    from sglang.srt.utils import ImageData

    source, request_options = options.of(data, family, "image")
    if _is_picture(source):
        return original(load(original, family, data, modality), modality)
    stored = original(source, modality)
    return (
        dataclasses.replace(stored, data=ImageData(url=stored.data, preprocess_kwargs=request_options))
        if request_options
        else stored
    )


def shown(picture: Image.Image, request_options: dict[str, Any], flat: bool = True) -> Image.Image:
    """A picture as a viewer shows it, in RGB.

    Args:
        request_options: the options that came with the picture; the result carries them.
        flat: False: transparent pixels stay, in the mode that the picture has.

    Raises:
        ValueError: if it cannot be decoded.
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
    if longest := request_options.get("max_long_side_pixel"):
        picture = smaller(picture, longest)
    if request_options:
        picture.mminfer_options = request_options  # type: ignore[attr-defined]
    return picture


def upright(picture: Image.Image) -> Image.Image:
    """The picture, turned and mirrored as its EXIF orientation says."""
    from PIL import ImageOps

    if not _turned(picture):
        return picture
    return ImageOps.exif_transpose(picture)


def _turned(picture: Image.Image) -> bool:
    return orientation(picture) != 1


def orientation(picture: Image.Image) -> int:
    """The EXIF orientation, 1 (upright) to 8. A PNG may store it after its pixels, so a PNG is decoded here."""
    try:
        value = picture.getexif().get(ORIENTATION, 1)
    except Exception:  # PIL raises a different error for each kind of broken EXIF
        return 1
    return value if value in range(1, 9) else 1


def eight_bit(picture: Image.Image) -> Image.Image:
    """Grey of more than 8 bits as 8-bit grey; any other picture as it is.

    For 16 bits white is 65,535, so the upper 8 bits are kept. Files of 32-bit integers or floats do not say which value
    is white. It is then the least of 1 (floats only), 255, 65,535 and 2**31 - 1 that no value exceeds; if a value
    exceeds all of them, the largest value is white. Values below 0 and NaN are black.
    """
    import numpy as np
    from PIL import Image

    if not (picture.mode.startswith("I") or picture.mode == "F"):
        return picture
    values = np.asarray(picture)
    if picture.mode.startswith("I;16"):
        return Image.fromarray((values.astype(np.uint16) >> 8).astype(np.uint8))
    grey = np.nan_to_num(values.astype(np.float64), nan=0.0).clip(0)
    largest = float(grey.max(initial=0.0))
    for white in (1.0, 255.0, 65535.0, 2.0**31 - 1):
        if largest <= white and (white > 1 or picture.mode == "F"):
            break
    else:
        white = largest
    scale = {1.0: 255.0, 255.0: 1.0, 65535.0: 1 / 256}.get(white, 255.0 / white)
    return Image.fromarray((grey * scale + (0.5 if white == 1.0 else 0.0)).clip(0, 255).astype(np.uint8))


def on_white(picture: Image.Image) -> Image.Image:
    """The picture over white in RGB, if it has transparent pixels; else as it is."""
    from PIL import Image

    if picture.mode not in _ALPHA and "transparency" not in picture.info:
        return picture
    if picture.mode in ("La", "RGBa"):  # premultiplied alpha is undone first
        picture = picture.convert(picture.mode.upper())
    picture = picture.convert("RGBA")
    white = Image.new("RGBA", picture.size, (*WHITE, 255))
    return Image.alpha_composite(white, picture).convert("RGB")


def smaller(picture: Image.Image, longest: int) -> Image.Image:
    """The picture, made smaller if its longer side has more than `longest` pixels."""
    from PIL import Image

    width, height = shrunk(*picture.size, longest)
    return picture if (width, height) == picture.size else picture.resize((width, height), Image.Resampling.BICUBIC)


def shrunk(width: int, height: int, longest: int) -> tuple[int, int]:
    """(width, height) in the same proportion, both at most `longest`."""
    if max(width, height) <= longest:
        return width, height
    scale = longest / max(width, height)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _is_picture(source: Any) -> bool:
    from PIL import Image

    return isinstance(source, Image.Image)


def is_file(data: Any) -> bool:
    """Whether a picture is still a file in memory (bytes, or SGLang's ImageData around bytes), not yet decoded."""
    return isinstance(getattr(data, "url", data), bytes)


def opened(source: Any) -> Image.Image | None:
    """Opens a file and reads its header only; None for a source that is neither text nor bytes, which SGLang judges.

    Raises:
        ValueError: if it cannot be read, is no picture, or PIL finds it too large.
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
    """The bytes that an undecoded picture was opened from; b"" for a picture that came from no file."""
    file = getattr(picture, "fp", None)
    return file.getvalue() if isinstance(file, BytesIO) else b""


def _bytes_of(source: str | bytes) -> bytes:
    """The bytes of a file that came in any form SGLang takes: bytes, a path, a URL, base64."""
    import pybase64
    from sglang.srt.multimodal.cache.identity import _read_media_bytes

    if isinstance(source, str) and source.startswith(_JPEG) and not os.path.isfile(source):
        return pybase64.b64decode(source, validate=True)
    return _read_media_bytes(source)


def _named(source: Any) -> str:
    text = source.decode(errors="replace") if isinstance(source, bytes) else str(source)
    return repr(text if len(text) <= 60 else f"{text[:60]}...")
