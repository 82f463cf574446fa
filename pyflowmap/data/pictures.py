"""One picture file as numbers: bounded, turned as its camera says, cropped to its centre."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

__all__ = ["FORMATS", "MAX_PIXELS", "check_size", "decode", "pillow", "read"]

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".bmp": "BMP"}
MAX_PIXELS = 64_000_000  # a few kilobytes of PNG can ask for gigabytes
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")  # 8 bits a channel; others would be cut off


def pillow() -> Any:
    try:
        import PIL.Image
        import PIL.ImageOps
    except ModuleNotFoundError:
        raise ModuleNotFoundError("pictures are read by Pillow, which is missing; run pip install pillow") from None
    return PIL


def check_size(size: Any) -> tuple[int, int]:
    """(height, width) of `size`, a number or a pair."""
    pair = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, (tuple, list)) else ()
    if len(pair) != 2 or any(isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= 8192 for n in pair):
        raise ValueError(f"size = {size!r}; pixels, e.g. 64 or (height, width), from 1 to 8192")
    return pair


def read(path: str | os.PathLike, size: tuple[int, int], channels: int, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The picture in a file, as `decode` gives it. Raises ValueError, one line that names the file."""
    library = pillow()
    try:
        with library.Image.open(path, formats=sorted(set(FORMATS.values()))) as image:
            return decode(image, size, channels, max_pixels)
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, library.Image.DecompressionBombError) as error:
        # Pillow's decoders raise all of these on damaged files.
        raise ValueError(f"{path} cannot be read ({error}); replace or remove it") from None


def decode(image: Any, size: tuple[int, int], channels: int, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """(channels, H, W) uint8 of a Pillow image: the largest centred part with the aspect of `size`, bicubic.

    EXIF orientation is applied. What is transparent is laid on white.
    """
    library = pillow()
    if image.width * image.height > max_pixels:  # known from the header: nothing has been decoded yet
        raise ValueError(f"{image.width} x {image.height} pixels are more than max_pixels = {max_pixels}")
    if image.mode not in _MODES:
        raise ValueError(f"mode {image.mode} is not 8 bits a channel; convert the picture first")
    image = library.ImageOps.exif_transpose(image)
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = library.Image.alpha_composite(library.Image.new("RGBA", image.size, "white"), image)
    image = image.convert("L" if channels == 1 else "RGB")
    height, width = size
    scale = min(image.width / width, image.height / height)
    wide, high = max(1, round(scale * width)), max(1, round(scale * height))
    left, top = (image.width - wide) // 2, (image.height - high) // 2
    # Cropped first: resize(box=) lets its filter see what lies outside the box.
    image = image.crop((left, top, left + wide, top + high))
    image = image.resize((width, height), library.Image.Resampling.BICUBIC)
    pixels = np.asarray(image, dtype=np.uint8).reshape(height, width, channels)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))
