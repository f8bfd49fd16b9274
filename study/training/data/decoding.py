"""Image files as 32x32 pixels of red, green and blue: what is accepted, converted and refused.

- Grey of 16 bits is scaled by 1/257 to 8 bits. 16 bits a colour channel are cut to 8 by Pillow.
- Floating-point pixels and 32-bit integers are refused, as nothing says which value is white; so is CIELAB, which
  Pillow does not convert.
- Transparent pixels are composited on white, as a page shows them: the colours below transparency are arbitrary.
- EXIF orientation is applied. Of animations and files with several pages, the first picture is taken.
- CMYK, YCbCr, HSV and palettes are converted by Pillow's formulas; colour profiles are not applied.
- Other sizes are resized bilinearly with antialiasing to 32x32, whatever their aspect ratio.
"""

from __future__ import annotations

import multiprocessing
import os
import warnings
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from study.training.data.dataset import DataError, Images, printable

if TYPE_CHECKING:
    from PIL import Image

DECODER = 2
"""Grows with every change of the pixels that the same files give: cached images of another version are not used."""
SIDE = 32
"""Height and width of decoded images, in pixels."""
FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""The formats that are opened. Pillow knows more, some of which start other programs (EPS) or hold no photographs."""
MAX_PIXELS = 50_000_000
"""Pixels of the largest image that is decoded. It takes 200 MB as RGB, 480 MB as a palette with transparency."""
BACKGROUND = (255, 255, 255)
"""Red, green and blue behind transparent pixels."""
CHUNK = 500
"""Images that a process decodes at a time."""
SHOWN_FAULTS = 5

RESIZED = "resized"
TURNED = "turned by their EXIF orientation"
COMPOSITED = "with transparency composited on white"
SCALED = "scaled from 16 to 8 bits"
FIRST = "first pictures of animations or pages"


@dataclass
class Decoded:
    """Images in the order of their files, and what happened to them."""

    images: Images
    changes: Counter[str] = field(default_factory=Counter)
    """Number of images by what was done to them."""
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    """Number of resized images by (width, height)."""
    faults: list[str] = field(default_factory=list)
    """The files that cannot be used, and why."""

    def notes(self) -> list[str]:
        """A line on what was resized, and one on other conversions."""
        lines = []
        if self.sizes:
            common = ", ".join(f"{width}x{height}" for (width, height), _ in self.sizes.most_common(3))
            more = f" and {len(self.sizes) - 3} other sizes" if len(self.sizes) > 3 else ""
            skewed = sum(count for (width, height), count in self.sizes.items() if width != height)
            skew = f"; {skewed:,} not square" if skewed else ""
            total = self.sizes.total()
            lines.append(
                f"{total:,} {'image' if total == 1 else 'images'} resized to {SIDE}x{SIDE} (from {common}{more}{skew})"
            )
        if self.changes:
            lines.append("images " + ", ".join(f"{what}: {count:,}" for what, count in sorted(self.changes.items())))
        return lines


@cache
def accepted_endings() -> frozenset[str]:
    """Endings of file names, in lower case with their dot, that this machine's Pillow decodes."""
    from PIL import Image

    return frozenset(ending for ending, name in Image.registered_extensions().items() if name in FORMATS)


def decode_files(paths: Sequence[str]) -> Decoded:
    """Decode image files, in processes where they are many.

    Raises:
        DataError: some cannot be used, with their names and reasons; the decoding processes were killed.
    """
    # Processes, not threads: Pillow's share of the interpreter lock leaves threads no gain (20,000 JPEGs of 32x32 on
    # 2 cores: 3.1 s alone, 3.4 s with threads, 1.6 s with processes). Spawned, because torch's threads may be running.
    chunks = [paths[i : i + CHUNK] for i in range(0, len(paths), CHUNK)]
    if len(chunks) == 1:
        parts = [decode_chunk(paths)]
    else:
        workers = min(len(chunks), os.cpu_count() or 1)
        try:
            with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
                parts = list(pool.map(decode_chunk, chunks))
        except BrokenProcessPool:
            raise DataError("the processes that decode the images were killed; is there enough memory?") from None
    faults = [fault for part in parts for fault in part.faults]
    if faults:
        shown = "; ".join(faults[:SHOWN_FAULTS])
        more = f"; and {len(faults) - SHOWN_FAULTS:,} more" if len(faults) > SHOWN_FAULTS else ""
        which = "1 image" if len(faults) == 1 else f"{len(faults):,} images"
        raise DataError(f"cannot use {which}: {shown}{more}; repair, convert or remove them")
    return Decoded(
        np.concatenate([part.images for part in parts]),
        sum((part.changes for part in parts), Counter()),
        sum((part.sizes for part in parts), Counter()),
    )


def decode_chunk(paths: Sequence[str]) -> Decoded:
    """Decode some files in this process. Files that cannot be used are noted and leave zeros."""
    decoded = Decoded(np.zeros((len(paths), SIDE, SIDE, 3), np.uint8))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, on damaged EXIF and on sizes between our limit and its own
        for i, path in enumerate(paths):
            try:
                decoded.images[i] = _decode(path, decoded)
            except Exception as error:  # noqa: BLE001 - a decoder may raise anything on damaged files
                decoded.faults.append(f"{printable(path)}: {_reason(error)}")
    return decoded


def _reason(error: Exception) -> str:
    from PIL import Image, UnidentifiedImageError

    if isinstance(error, Image.DecompressionBombError):
        return f"it has more than {MAX_PIXELS // 10**6} megapixels; scale it down"
    if isinstance(error, UnidentifiedImageError):  # its text is the path
        return f"it is no image in a known format ({', '.join(FORMATS)})"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return printable(str(error)) or type(error).__name__


def _decode(path: str, decoded: Decoded) -> Images:
    from PIL import Image

    with Image.open(path, formats=_formats()) as image:
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise DataError(
                f"it has {width * height / 1e6:.0f} megapixels ({width}x{height}), "
                f"at most {MAX_PIXELS // 10**6} are decoded; scale it down"
            )
        several = image.format != "MPO" and getattr(image, "is_animated", False)  # MPO: a photo and its preview
        image.load()
        changes = [FIRST] if several else []
        turn = _turn(image)
        colour = to_rgb(image, changes)
    if colour.size != (SIDE, SIDE):
        decoded.sizes[colour.size] += 1
        colour = colour.resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    if turn is not None:  # of the small image, to spare memory: its sides are equal
        changes.append(TURNED)
        colour = colour.transpose(turn)
    decoded.changes.update(changes)
    return np.asarray(colour)


@cache
def _formats() -> list[str]:
    """Those that this machine's Pillow decodes: it warns of others, which it knows by name."""
    from PIL import Image

    known = set(Image.registered_extensions().values())
    return [name for name in FORMATS if name in known]


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What makes a picture upright. TIFF files are upright already: Pillow turns them as it loads them."""
    from PIL import ExifTags, Image

    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # noqa: BLE001 - damaged EXIF is no reason to refuse a picture that can be decoded
        return None
    turns = (
        Image.Transpose.FLIP_LEFT_RIGHT,
        Image.Transpose.ROTATE_180,
        Image.Transpose.FLIP_TOP_BOTTOM,
        Image.Transpose.TRANSPOSE,
        Image.Transpose.ROTATE_270,
        Image.Transpose.TRANSVERSE,
        Image.Transpose.ROTATE_90,
    )
    return turns[orientation - 2] if isinstance(orientation, int) and 2 <= orientation <= 8 else None


def to_rgb(image: Image.Image, changes: list[str]) -> Image.Image:
    """`image` in mode RGB, 8 bits a channel; what was done is appended to `changes`.

    Raises:
        DataError: a mode without a defined conversion.
    """
    from PIL import Image

    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        changes.append(SCALED)
        return _from_16_bits(image, changes).convert("RGB")
    match image.mode:
        case "RGB" if not image.has_transparency_data:
            return image
        case "F":
            raise DataError("its pixels are floating-point numbers, which have no defined white; save 8 or 16 bits")
        case "I":
            raise DataError("its pixels are 32-bit or signed integers, which have no defined white; save 8 or 16 bits")
        case "LAB":
            raise DataError("its colours are CIELAB; save it as RGB")
        case "La":  # Pillow converts it to LA alone
            image = image.convert("LA")
    if not image.has_transparency_data:
        return image.convert("RGB")
    if image.mode != "RGBA":
        image = image.convert("RGBA")
    alpha = image.getchannel("A")
    if alpha.getextrema()[0] == 255:
        return image.convert("RGB")
    changes.append(COMPOSITED)
    page = Image.new("RGB", image.size, BACKGROUND)
    page.paste(image, mask=alpha)
    return page


def _from_16_bits(image: Image.Image, changes: list[str]) -> Image.Image:
    """Mode L from unsigned grey of 16 bits, or of the 12 that TIFF knows. Pillow itself clips all above 255."""
    from PIL import Image

    values = np.asarray(image)
    tags = getattr(image, "tag_v2", {})  # of TIFF: 258 bits a sample, 262 photometric interpretation
    white = 4095 if tags.get(258) == (12,) else 65535
    table = np.minimum((np.arange(65536) * 255 + white // 2) // white, 255).astype(np.uint8)
    if tags.get(262) == 0:  # white is zero: Pillow inverts 8 bits, not 16
        table = 255 - table
    transparent = image.info.get("transparency")
    if isinstance(transparent, int) and (values == transparent).any():
        changes.append(COMPOSITED)
        table[transparent] = BACKGROUND[0]
    return Image.fromarray(table[np.minimum(values, 65535)])
