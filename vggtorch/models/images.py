"""Image files and PIL images as upright RGB of 8 bits: the one reader of training and prediction.

What an image says of itself is followed: its EXIF orientation, its palette, its transparency (over
`BACKGROUND`), the range of its values. Where it doesn't say enough, it is refused with the reason.
Of a file with several frames the first is read. Colour profiles are not applied.
"""

from __future__ import annotations

import re
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from os import PathLike
from pathlib import Path
from typing import IO

import numpy as np
import PIL
from PIL import Image, ImageOps, UnidentifiedImageError, features

from vggtorch.files import first_line
from vggtorch.paths import IMAGES

HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}

BACKGROUND = (255, 255, 255)  # white, behind what is transparent
MAX_PIXELS = 2**27  # 134 million; the cameras with the largest sensors make images of 102 million
MAX_RATIO = 1000  # of an image's sides; resizing makes a longer strip too large for the memory

SEVERAL_FRAMES = "several frames"  # in an image's `info`: whether only the first one was read
BRIGHTEST = "brightest"  # in the `info` of one that had 16 bits: its largest value of 0 ... 255
DARK = 64  # what one value at least reaches where 16 bits are used as such
ADVICE_IF_DARK = (
    "White is 65535 in 16 bits, so that a camera's 12 or 14 look nearly black. Scale all images "
    "alike (12 bits: values / 4095 * 255) and save them with 8 bits."
)

_UPRIGHT = {  # what makes an image upright, by its EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION = 0x0112  # the EXIF tag
_BITS, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # TIFF tags, and what the second may be
_LOWEST, _HIGHEST = 340, 341  # the TIFF tags SMinSampleValue and SMaxSampleValue
_KIND, _IS_REDUCED = 254, 1  # the TIFF tag NewSubfileType, and a bit of it
_FORMAT, _SIGNED = 339, 2  # the TIFF tag SampleFormat, and one of its values
_COMPRESSION = 259  # the TIFF tag; 1 is none
_PLANES, _SEPARATE = 284, 2  # the TIFF tag PlanarConfiguration, and one of its values


class PixelGate:
    """Lets threads decode images only while those in memory have at most so many pixels together.

    An image with more pixels than that is let through when no other is in memory.
    """

    def __init__(self, limit: int) -> None:
        self._limit, self._held, self._changed = limit, 0, threading.Condition()

    @contextmanager
    def hold(self, pixels: int) -> Iterator[None]:
        """Wait until there is room for so many pixels, and keep it."""
        with self._changed:
            self._changed.wait_for(lambda: self._held == 0 or self._held + pixels <= self._limit)
            self._held += pixels
        try:
            yield
        finally:
            with self._changed:
                self._held -= pixels
                self._changed.notify_all()


def read_image(path: str | PathLike, gate: PixelGate | None = None) -> Image.Image:
    """The image in a file, as `to_rgb` makes it; `info[SEVERAL_FRAMES]` says if there are more.

    Args:
        path: a file of one of `IMAGES`, whatever its ending; of several frames the first is read.
        gate: where other threads decode images too, holds this one back until there is room.

    Raises:
        OSError: the file can't be opened.
        ValueError: it isn't an image, is damaged, has more than `MAX_PIXELS` pixels, or has values
            whose range can't be known.
    """
    if re.match(r"[a-z]+://", str(path)):
        raise ValueError(f"Can't read {path}: it is an address, not a file. Download it first.")
    path = Path(path)
    if "\0" in str(path):
        raise ValueError(f"Can't read {str(path)!r}: a file's name holds no null character.")
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError(f"Can't read {path}: it is not a regular file. Expected an image.")
    with path.open("rb") as file:
        try:
            with _opened(file) as image:
                pixels = _checked_size(image)
                # The other images of MPO are views of the same.
                several = image.format != "MPO" and getattr(image, "is_animated", False)
                with gate.hold(pixels) if gate else nullcontext():
                    found = to_rgb(image)
                found.info[SEVERAL_FRAMES] = several
                return found
        # A damaged file makes PIL raise all kinds of exceptions, RuntimeError, IndexError and
        # struct.error among them.
        except Exception as error:
            raise ValueError(f"Can't read {path}: {first_line(error)[:300]}") from error


def _opened(file: IO[bytes]) -> Image.Image:
    """The image whose header has been read; ValueError where no format is recognised."""
    head = file.read(12)
    if not head:
        raise ValueError("it is empty.")
    Image.init()  # loads the plugins of all formats
    try:
        return Image.open(file, formats=[name for name in IMAGES if name in Image.OPEN])
    except Image.DecompressionBombError:
        raise ValueError(_too_large("more")) from None
    except UnidentifiedImageError:
        if head[4:8] == b"ftyp" and head[8:] in HEIF_BRANDS and "HEIF" not in Image.OPEN:
            _add_heif()
            return Image.open(file, formats=["HEIF"])
        if head[4:12] in (b"ftypavif", b"ftypavis") and not features.check("avif"):
            raise ValueError("this Pillow reads no AVIF; from version 11.3 on it does.") from None
        if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
            raise ValueError(
                f"it is damaged, or a TIFF file of a kind that Pillow {PIL.__version__} doesn't "
                f"read, such as one of floating-point colours. Save it with 8 bits."
            ) from None
        raise ValueError(
            f"it is damaged, or of no kind that Pillow {PIL.__version__} reads here: "
            f"{', '.join(IMAGES)}."
        ) from None


def _add_heif() -> None:
    """Teach PIL to read HEIF files, or raise a ValueError that says what it takes."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        raise ValueError(
            "HEIC and HEIF files need another package: pip install pillow-heif."
        ) from None
    register_heif_opener()


def _checked_size(image: Image.Image) -> int:
    """The number of pixels; ValueError where there are too many, or none but a strip's."""
    pixels = image.width * image.height
    if pixels > MAX_PIXELS:
        raise ValueError(_too_large(f"{image.width}x{image.height}"))
    if max(image.size) > MAX_RATIO * min(image.size):
        raise ValueError(
            f"it has {image.width}x{image.height} pixels; expected one side at most {MAX_RATIO:,} "
            f"times as long as the other. Cut a part out of it."
        )
    return pixels


def _too_large(size: str) -> str:
    return f"it has {size} pixels; expected at most {MAX_PIXELS:,}. Make it smaller."


def to_rgb(image: Image.Image) -> Image.Image:
    """An image as RGB of 8 bits, turned upright as its EXIF orientation says.

    Grey values of 16 bits are scaled from 0 ... 65535, those of 12 bits in a TIFF file from
    0 ... 4095. 32-bit and floating-point values are scaled from the range that a TIFF file's
    SMinSampleValue and SMaxSampleValue state, and refused without them. What is transparent shows
    `BACKGROUND`, white. The `info` of an image that had 16 bits has its `BRIGHTEST` value.

    Raises:
        ValueError: more than `MAX_PIXELS` pixels, or values whose range can't be known.
    """
    _checked_size(image)
    _check_tiff(image)
    levels = _grey_levels(image)
    # A file's form of pixels, which PIL makes 8 bits of in colours, is told by its tiles alone.
    has_16_bits = ";16" in f"{image.mode} {getattr(image, 'tile', '')}"
    image.load()
    orientation = _orientation(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _scaled(image)
    key = image.info.get("transparency")
    if levels and isinstance(key, int):
        # PIL spreads the grey values over 0 ... 255, but not the one that is transparent.
        key = key * 255 // (levels - 1)
    elif image.mode == "RGB" and isinstance(key, tuple) and max(key) > 255:
        # PIL keeps the upper 8 bits of 16-bit RGB, but the transparent colour whole.
        key = tuple(value >> 8 for value in key)
    if key != image.info.get("transparency"):
        image = image.copy()
        image.info["transparency"] = key
    if image.mode == "La":  # which PIL turns into nothing but LA
        image = image.convert("LA")
    if image.mode in ("LA", "PA", "RGBA", "RGBa") or (
        key is not None and image.mode in ("1", "L", "P", "RGB")
    ):
        background = Image.new("RGBA", image.size, (*BACKGROUND, 255))
        image = Image.alpha_composite(background, image.convert("RGBA"))
    if image.mode != "RGB":
        image = image.convert("RGB")
    upright = _UPRIGHT.get(orientation)
    if upright is not None:
        image = image.transpose(upright)
    if has_16_bits:
        image = image.copy()  # it may be the user's own
        image.info[BRIGHTEST] = int(np.max(image.getextrema()))
    return image


def _check_tiff(image: Image.Image) -> None:
    """Refuse what stands in a TIFF file otherwise than PIL reads it."""
    tags = getattr(image, "tag_v2", {})
    kind = tags.get(_KIND)
    if isinstance(kind, int) and kind & _IS_REDUCED:
        raise ValueError(
            "its first page is a smaller copy of another one, as cameras' raw files have it. "
            "Develop it into a JPEG, PNG or TIFF file."
        )
    if image.mode == "L" and _SIGNED in np.ravel(tags.get(_FORMAT, ())):
        raise ValueError(
            "it has signed values, and nothing says which of them are black and white. Scale them "
            "to 0 ... 255 and save them without a sign."
        )
    # Without compression PIL takes the bytes of such planes for pixels; two it can't read at all.
    bits = np.ravel(tags.get(_BITS, 8))  # of each plane
    is_deep = tags.get(_PLANES) == _SEPARATE and max(bits) > 8
    if is_deep and (len(bits) == 2 or (len(bits) > 1 and tags.get(_COMPRESSION, 1) == 1)):
        raise ValueError(
            "it has a plane for each colour and more than 8 bits in a form which Pillow doesn't "
            "read rightly. Save it with 8 bits."
        )


def _grey_levels(image: Image.Image) -> int | None:
    """How many values a PNG file of grey has whose pixels have 2 or 4 bits."""
    tiles = getattr(image, "tile", None)  # which an image that was read has no more
    if image.format != "PNG" or not tiles:
        return None
    *_, packed = tiles[0]
    return {"L;2": 4, "L;4": 16}.get(packed)


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # The EXIF data is damaged. Viewers show such an image as it is stored.
        return 1


def _scaled(image: Image.Image) -> Image.Image:
    """Grey values of more than 8 bits as 8 bits, with alpha if one value means transparent."""
    low, high = _value_range(image)
    values = np.asarray(image)
    if not (values.min() >= low and values.max() <= high):  # NaN fails too
        raise ValueError(
            f"it has values from {values.min():.6g} to {values.max():.6g} and says that they lie "
            f"between {low:.6g} and {high:.6g}."
        )
    scaled = (values.astype(np.float32) - np.float32(low)) * np.float32(255 / (high - low))
    grey = Image.fromarray(np.rint(scaled).astype(np.uint8))
    if getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == _WHITE_IS_ZERO:  # PIL knows it of 8 bits
        grey = ImageOps.invert(grey)
    if (key := image.info.get("transparency")) is not None:
        grey.putalpha(Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)))
    return grey


def _value_range(image: Image.Image) -> tuple[float, float]:
    """The values that are black and white."""
    tags = getattr(image, "tag_v2", {})
    bits = np.ravel(tags.get(_BITS, 16))
    if image.mode.startswith("I;16") and len(bits) == 1 and 8 < bits[0] < 16:
        return 0, float(2 ** int(bits[0]) - 1)  # TIFF has 12 bits too
    # PIL opens 16-bit PNG and PGM files with 32 bits for each pixel, some or all by its version.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return 0, 65535
    stated = (*np.ravel(tags.get(_LOWEST, ())), *np.ravel(tags.get(_HIGHEST, ())))
    if len(stated) == 2 and stated[0] < stated[1]:
        return float(stated[0]), float(stated[1])
    kind = "floating-point" if image.mode == "F" else "32-bit or signed"
    raise ValueError(
        f"it has {kind} values (PIL's mode {image.mode}), and nothing says which of them are black "
        f"and white. Scale them to 0 ... 255 and save them with 8 bits."
    )
