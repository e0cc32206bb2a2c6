"""One picture: from a file to 8-bit RGB or greyscale, and on to the network's input.

Pillow is never asked to be lenient or fast at the cost of the pixels: no LOAD_TRUNCATED_IMAGES, no JPEG `draft`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from deploykit.artifact import Preprocess
from deploykit.errors import DataError, printable

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".gif")

# A PNG of 50 kB can hold 400 million pixels. Pillow's own limit is a global of the process and only warns.
PIXEL_LIMIT = 50_000_000

# Only what EXTENSIONS promises: Pillow also knows formats that start other programs (EPS runs Ghostscript).
_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "PPM", "GIF")
_16_BIT_MODES = ("I;16", "I;16L", "I;16B", "I;16N")
_8_BIT_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")
_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}


def open_image(path: Path) -> Image.Image:
    """Read a picture as 8-bit RGB, or as L when the file has no colour; upright by its EXIF orientation.

    Transparent pixels are composited on white. 16-bit greyscale is divided by 257, so that 0..65535 becomes 0..255; 16-bit colour
    keeps the high byte, which is less than one level from that.
    CMYK becomes RGB without its ICC profile. Of an animation, the first frame is taken.

    Raises DataError, whose `why` is the reason alone, for a file that is missing, empty, damaged, not a picture, of
    more than 50 million pixels, or whose pixels have no known range (float, 32-bit integers).
    """
    with pillow_warnings_ignored():
        return decode(path)


def preprocess(image: Image.Image, how: Preprocess) -> NDArray[Any]:
    """Make the network's input of a picture: float32 (C, H, W), or with frames (C, T, H, W); C-contiguous.

    Where `how.feeds` says so, these are the pixels themselves, uint8 (C, H, W) or (H, W, C), for a graph that normalises them.

    On RGB pictures this gives what torchvision's classification preset gives on PIL images
    (torchvision/transforms/_presets.py and functional.py: `_compute_resized_output_size`, `center_crop`), zero
    padding of pictures smaller than the crop included.

    Raises DataError when the picture is so narrow that resizing its shorter side would make more than 50 million
    pixels, or when its pixels have no known range.
    """
    image = _to_8_bits(image)
    if image.mode != how.channels:
        image = image.convert(how.channels)
    height, width = how.crop
    if how.fit == "stretch":
        image = image.resize((width, height), _RESAMPLING[how.interpolation])
    elif how.resize is not None:
        image = image.resize(with_shorter_side(image.size, how.resize), _RESAMPLING[how.interpolation])
    centre = _offset(image.width, width), _offset(image.height, height)
    if how.frames is None:
        return _cropped(image, centre, how)
    return np.ascontiguousarray(np.stack([_cropped(image, corner, how) for corner in _path(image, centre, how)], axis=1))


def _cropped(image: Image.Image, corner: tuple[int, int], how: Preprocess) -> NDArray[Any]:
    """The crop whose left upper corner (x, y) is there: normalised (C, H, W), or pixels as a program feeds them."""
    (left, top), (height, width) = corner, how.crop
    image = image.crop((left, top, left + width, top + height))  # Pillow fills what lies outside with zeros
    pixels = np.asarray(image).reshape(height, width, len(how.channels))
    if how.feeds != "float":
        return np.array(pixels if how.feeds == "uint8 NHWC" else pixels.transpose(2, 0, 1), np.uint8, order="C")
    return _normalised(pixels.transpose(2, 0, 1), how)


def normalised(fed: NDArray[Any], how: Preprocess) -> NDArray[np.float32]:
    """The network's inputs (N, C, H, W) of what a program feeds: floats are that already, pixels are scaled and normalised."""
    if how.feeds == "float":
        return fed
    return _normalised(fed.transpose(0, 3, 1, 2) if how.feeds == "uint8 NHWC" else fed, how)


def _normalised(pixels: NDArray[np.uint8], how: Preprocess) -> NDArray[np.float32]:
    """(..., C, H, W) from 0 to 255 to the network's values, each step rounded to float32."""
    scaled = np.ascontiguousarray(pixels, np.float32) / np.float32(255)
    mean, std = (np.array(values, np.float32).reshape(-1, 1, 1) for values in (how.mean, how.std))
    result: NDArray[np.float32] = (scaled - mean) / std
    return result


def _path(image: Image.Image, centre: tuple[int, int], how: Preprocess) -> list[tuple[int, int]]:
    """Where the crop of each frame lies (x, y): from one end of the picture's longer side to the other."""
    assert how.frames is not None
    (left, top), (height, width) = centre, how.crop
    ways = [index / max(how.frames - 1, 1) for index in range(how.frames)]
    if image.width - width >= image.height - height:
        return [(round(way * (image.width - width)) if image.width > width else left, top) for way in ways]
    return [(left, round(way * (image.height - height)) if image.height > height else top) for way in ways]


def check_header(path: Path) -> None:
    """Read a picture's format and size, but not its pixels. Raises DataError as `open_image` does."""
    with pillow_warnings_ignored(), _opened(path):
        pass


def has_colours(path: Path) -> bool:
    """Whether a picture's header says that it may have colours: a palette counts as colours. Raises DataError as `open_image`."""
    with pillow_warnings_ignored(), _opened(path) as image:
        return not (image.mode in ("1", "L", "LA") or _has_16_bits(image))


def decode(path: Path) -> Image.Image:
    """What `open_image` does, for threads whose caller holds `pillow_warnings_ignored`."""
    with _opened(path) as image:
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return _to_8_bits(image)


@contextmanager
def pillow_warnings_ignored() -> Iterator[None]:
    """Keep Pillow's remarks on odd metadata from the user: a picture is readable here, or it is an error.

    The filters of `warnings` belong to the whole process, and two threads that change them in turn can leave them
    changed. So the thread that starts others and waits for them holds this, and they do not.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """A picture whose header was read and judged; anything that fails inside the block becomes a DataError."""
    try:
        with path.open("rb") as file:
            start = file.read(16)
            with Image.open(file, formats=_FORMATS) as image:
                _refuse_what_has_no_meaning(image)
                yield image
    except UnidentifiedImageError as error:
        why = f"it is not a picture that can be read; it begins with {start!r}" if start else "the file is empty"
        raise _unusable(path, why) from error
    except Image.DecompressionBombError as error:  # twice Pillow's own limit, found while it reads the header
        raise _unusable(path, f"it has more than {PIXEL_LIMIT:,} pixels") from error
    except DataError as error:
        raise _unusable(path, error.why) from error
    except OSError as error:
        raise _unusable(path, (error.strerror or str(error)).lower()) from error
    except Exception as error:
        # Pillow's decoders raise whatever their parsing trips over: SyntaxError, struct.error, EOFError, KeyError...
        raise _unusable(path, str(error) or type(error).__name__) from error


def _unusable(path: Path, why: str) -> DataError:
    return DataError(f"cannot use the picture {printable(path)}", why=why)


def _refuse_what_has_no_meaning(image: Image.Image) -> None:
    """Raise DataError for pictures that are too large, or whose pixel values have no known range."""
    if image.width * image.height > PIXEL_LIMIT:
        why = f"it has {image.width} x {image.height} pixels, more than {PIXEL_LIMIT:,}"
    elif image.mode == "F":
        why = "its pixels are floats (mode F), whose range is not known: save it with 8 or 16 bits"
    elif image.mode not in _8_BIT_MODES and not _has_16_bits(image):
        why = f"its pixels have mode {image.mode}: save it as RGB or greyscale with 8 or 16 bits"
    else:
        return
    raise DataError(f"cannot use a picture of mode {image.mode} with {image.width} x {image.height} pixels", why=why)


def _has_16_bits(image: Image.Image) -> bool:
    """Whether the values are 0..65535. Pillow gives 16-bit PPM files mode I, which otherwise has no known range."""
    return image.mode in _16_BIT_MODES or (image.mode == "I" and image.format == "PPM")


def _to_8_bits(image: Image.Image) -> Image.Image:
    """The picture as RGB or L, apart from its file; itself when it is that already and in memory."""
    _refuse_what_has_no_meaning(image)
    if _has_16_bits(image):
        # Pillow's own convert() clips at 255, which turns nearly every picture white.
        values = np.asarray(image).astype(np.uint32)
        values[values == image.info.get("transparency", -1)] = 65535
        return Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if image.has_transparency_data:
        # Without this, the colours that a drawing program left under fully transparent pixels become visible.
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    if type(image) is Image.Image and image.mode in ("RGB", "L"):
        return image
    return image.convert("L" if image.mode in ("1", "L") else "RGB")


def with_shorter_side(size: tuple[int, int], shorter: int) -> tuple[int, int]:
    """(width, height) with the aspect ratio kept and the longer side rounded down, as torchvision rounds it."""
    width, height = size
    longer = int(shorter * max(size) / min(size))
    if shorter * longer > PIXEL_LIMIT:
        raise DataError(
            f"cannot resize a picture of {width} x {height} pixels",
            why=f"with its shorter side at {shorter} it has {shorter * longer:,} pixels, more than {PIXEL_LIMIT:,}",
        )
    return (shorter, longer) if width <= height else (longer, shorter)


def _offset(size: int, crop: int) -> int:
    """Where a centre crop starts; negative, and rounded the other way, where torchvision would pad first."""
    return -((crop - size) // 2) if crop > size else round((size - crop) / 2.0)
