"""Pictures as rows of an array, all of one size: what is accepted, converted and refused.

- Grey of 16 bits is scaled by 1/257 to 8 bits. 16 bits a colour channel are cut to 8 by Pillow.
- Floating-point pixels and 32-bit integers are refused, as nothing says which value is white; so is CIELAB, which
  Pillow does not convert.
- Transparent pixels are composited on white, as a page shows them: the colours below transparency are arbitrary.
- EXIF orientation is applied. Of animations and files with several pages, the first picture is taken.
- CMYK, YCbCr, HSV and palettes are converted by Pillow's formulas; colour profiles are not applied.
- Grey from colours is the luma of ITU-R 601 (Pillow's mode L).
- Resizing is bilinear with antialiasing, of the centre square: the aspect ratio stays as it is.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from study.training.data.array_cache import create
from study.training.data.dataset import DataError, Images, printable

if TYPE_CHECKING:
    from PIL import Image

DECODER = 3
"""Grows with every change of the pixels that the same files give: cached images of another version are not used."""
FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""The formats that are opened. Pillow knows more, some of which start other programs (EPS) or hold no photographs."""
MAX_PIXELS = 50_000_000
"""Pixels of the largest image that is decoded. It takes 200 MB as RGB, 480 MB as a palette with transparency."""
BACKGROUND = (255, 255, 255)
"""Red, green and blue behind transparent pixels."""
CHUNK = 500
"""Images that a process decodes at a time."""
SHOWN_FAULTS = 5
SHOWN_SIZES = 3

TURNED = "turned by their EXIF orientation"
COMPOSITED = "with transparency composited on white"
SCALED = "scaled from 16 to 8 bits"
FIRST = "first pictures of animations or pages"


@dataclass(frozen=True)
class Form:
    """What every picture becomes."""

    height: int
    width: int
    channels: int
    """1: grey. 3: red, green, blue. Other numbers only where the source has as many."""
    resize: bool = True
    """Pictures of other sizes are resized and cropped. False: they are refused."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of an image in the array."""
        return self.height, self.width, self.channels


@dataclass
class Report:
    """What happened to pictures as they were converted."""

    changes: Counter[str] = field(default_factory=Counter)
    """Number of images by what was done to them."""
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    """Number of resized images by (width, height)."""
    faults: list[str] = field(default_factory=list)
    """The pictures that cannot be used, and why."""
    labels: list[int] = field(default_factory=list)
    """Of pictures that come with their labels."""

    def add(self, other: Report) -> None:
        """Append what happened to other pictures."""
        self.changes += other.changes
        self.sizes += other.sizes
        self.faults += other.faults
        self.labels += other.labels

    def notes(self, form: Form) -> list[str]:
        """A line on what was resized, and one on other conversions."""
        lines = []
        if self.sizes:
            skewed = sum(count for (width, height), count in self.sizes.items() if width != height)
            skew = f"; {skewed:,} not square: the centre square is used" if skewed else ""
            total = self.sizes.total()
            lines.append(
                f"{total:,} {'image' if total == 1 else 'images'} resized to {form.width}x{form.height} "
                f"(from {common_sizes(self.sizes)}{skew})"
            )
        if self.changes:
            lines.append("images " + ", ".join(f"{what}: {count:,}" for what, count in sorted(self.changes.items())))
        return lines


def common_sizes(sizes: Counter[tuple[int, int]]) -> str:
    """`640x480, 480x640, 64x64 and 7 other sizes`: the most common first."""
    common = ", ".join(f"{width}x{height}" for (width, height), _ in sizes.most_common(SHOWN_SIZES))
    others = len(sizes) - SHOWN_SIZES
    return common + (f" and {others} other {'size' if others == 1 else 'sizes'}" if others > 0 else "")


def differing_sizes(sizes: Counter[tuple[int, int]]) -> DataError:
    """Of pictures that have no size in common."""
    proposed = min(*sizes.most_common(1)[0][0], 224)
    return DataError(
        f"the images have {len(sizes):,} different sizes ({common_sizes(sizes)}), and all must have one: "
        f"set data.size, for example data.size={proposed}"
    )


class Pictures(Protocol):
    """A sequence of pictures that processes can share: it can be pickled."""

    def __len__(self) -> int: ...

    def called(self, i: int) -> str:
        """The name of a picture in messages."""

    def convert(self, i: int, form: Form, report: Report) -> Images:
        """A picture as an array of `form.shape`. Any exception says that it cannot be used."""


@dataclass(frozen=True)
class Files:
    """Image files."""

    paths: Sequence[str]

    def __len__(self) -> int:
        return len(self.paths)

    def called(self, i: int) -> str:
        return printable(self.paths[i])

    def convert(self, i: int, form: Form, report: Report) -> Images:
        changes: list[str] = []
        with _opened(self.paths[i]) as image:
            several = image.format != "MPO" and getattr(image, "is_animated", False)  # MPO: a photo and its preview
            image.load()
            if several:
                changes.append(FIRST)
            turn = _turn(image)
            colour = to_rgb(image, changes)
        if turn is not None:
            changes.append(TURNED)
        array = fit(colour, form, report, turn)
        report.changes.update(changes)
        return array


@dataclass(frozen=True)
class Rows:
    """Images of an array: uint8, shape [N, height, width, channels]."""

    images: Images

    def __len__(self) -> int:
        return len(self.images)

    def called(self, i: int) -> str:
        return f"image {i}"

    def convert(self, i: int, form: Form, report: Report) -> Images:
        from PIL import Image

        row = np.ascontiguousarray(self.images[i])
        if row.shape[-1] == 3:
            return fit(Image.fromarray(row), form, report)
        if row.shape[-1] == 1:
            return fit(Image.fromarray(row[..., 0]), form, report)
        plane, first = replace(form, channels=1), report
        planes = []
        for channel in range(row.shape[-1]):
            planes.append(fit(Image.fromarray(np.ascontiguousarray(row[..., channel])), plane, first))
            first = Report()  # an image is counted once
        return np.concatenate(planes, axis=-1)


@cache
def accepted_endings() -> frozenset[str]:
    """Endings of file names, in lower case with their dot, that this machine's Pillow decodes."""
    from PIL import Image

    return frozenset(ending for ending, name in Image.registered_extensions().items() if name in FORMATS)


def measure(paths: Sequence[str]) -> Counter[tuple[int, int]]:
    """Number of image files by (width, height), upright, from their headers. Files without a header are left out."""
    chunks = [paths[i : i + CHUNK] for i in range(0, len(paths), CHUNK)]
    return sum(_in_processes(_measure_chunk, chunks) if len(chunks) > 1 else map(_measure_chunk, chunks), Counter())


def _measure_chunk(paths: Sequence[str]) -> Counter[tuple[int, int]]:
    sizes: Counter[tuple[int, int]] = Counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for path in paths:
            try:
                with _opened(path) as image:
                    # The size of a TIFF file is that of the upright picture already.
                    turned = image.format != "TIFF" and _turn(image) in _sideways()
                    sizes[_turned(image.size) if turned else image.size] += 1
            except Exception:  # noqa: BLE001 - a decoder may raise anything; `fill` says what
                continue
    return sizes


def fill(folder: Path, sources: Mapping[str, Pictures], form: Form, *, processes: bool = True) -> dict[str, Report]:
    """Write each source's pictures to the array `<name>_images` in `folder`, uint8, shape [N, *form.shape].

    Args:
        processes: decode in processes where there are many pictures.

    Returns:
        What happened, by source.

    Raises:
        DataError: some cannot be used, with their names and reasons; the decoding processes were killed; the disk has
            no room.
    """
    create(folder, {f"{name}_images": (len(pictures), *form.shape) for name, pictures in sources.items()})
    spans = [(name, i, min(i + CHUNK, len(of))) for name, of in sources.items() for i in range(0, len(of), CHUNK)]
    if processes and sum(map(len, sources.values())) > CHUNK:
        parts = _in_processes(_fill_span, spans, _share, folder, dict(sources), form)
    else:
        parts = (_fill(folder, sources, form, *span) for span in spans)
    reports = {name: Report() for name in sources}
    for (name, _, _), part in zip(spans, parts, strict=True):
        reports[name].add(part)
    faults = [fault for report in reports.values() for fault in report.faults]
    if faults:
        shown = "; ".join(faults[:SHOWN_FAULTS])
        more = f"; and {len(faults) - SHOWN_FAULTS:,} more" if len(faults) > SHOWN_FAULTS else ""
        which = "1 image" if len(faults) == 1 else f"{len(faults):,} images"
        raise DataError(f"cannot use {which}: {shown}{more}; repair, convert or remove them")
    return reports


def fill_all(folder: Path, sources: Mapping[str, Pictures], form: Form, *, processes: bool = True) -> tuple[str, ...]:
    """`fill`, and the labels that come with the pictures as `<name>_labels`; the notes.

    Raises:
        DataError: as `fill`.
    """
    whole = Report()
    for name, report in fill(folder, sources, form, processes=processes).items():
        if report.labels:
            np.save(folder / f"{name}_labels.npy", np.array(report.labels, dtype=np.int64))
        whole.add(report)
    return tuple(whole.notes(form))


def key(*parts: Any) -> str:
    """A name in the cache for what depends on `parts`, on this module and on Pillow."""
    import PIL

    return hashlib.sha256(repr((DECODER, PIL.__version__, *parts)).encode()).hexdigest()[:24]


def _in_processes(
    work: Callable[[Any], Any], tasks: Sequence[Any], start: Callable[..., None] | None = None, *shared: Any
) -> Iterator[Any]:
    """Results in the order of the tasks, from processes that `start` prepares with what is `shared`."""
    # Processes, not threads: Pillow's share of the interpreter lock leaves threads no gain (20,000 JPEGs of 32x32 on
    # 2 cores: 3.1 s alone, 3.4 s with threads, 1.6 s with processes). Spawned, because torch's threads may be running.
    workers = min(len(tasks), os.cpu_count() or 1)
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(workers, mp_context=context, initializer=start, initargs=shared) as pool:
            yield from pool.map(work, tasks)
    except BrokenProcessPool:
        raise DataError("the processes that decode the images were killed; is there enough memory?") from None


_shared: tuple[Path, Mapping[str, Pictures], Form]
"""Of a process that fills arrays: given once, not with every span."""


def _share(folder: Path, sources: Mapping[str, Pictures], form: Form) -> None:
    global _shared
    _shared = folder, sources, form


def _fill_span(span: tuple[str, int, int]) -> Report:
    return _fill(*_shared, *span)


def _fill(folder: Path, sources: Mapping[str, Pictures], form: Form, name: str, start: int, stop: int) -> Report:
    """Convert the pictures from `start` to `stop` of a source in this process."""
    array, pictures, report = np.load(folder / f"{name}_images.npy", mmap_mode="r+"), sources[name], Report()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, on damaged EXIF and on sizes between our limit and its own
        for i in range(start, stop):
            try:
                array[i] = pictures.convert(i, form, report)
            except Exception as error:  # noqa: BLE001 - a decoder may raise anything on damaged files
                report.faults.append(f"{pictures.called(i)}: {reason(error)}")
    return report


def fit(image: Image.Image, form: Form, report: Report, turn: Image.Transpose | None = None) -> Images:
    """An image in mode RGB or L as an array of `form.shape`.

    Its centre square is resized, where its size is another one.

    Args:
        turn: what makes it upright.

    Raises:
        DataError: another size, where the form does not resize.
    """
    from PIL import Image

    size = _turned(image.size) if turn in _sideways() else image.size
    if size != (form.width, form.height):
        if not form.resize:
            raise DataError(f"it has {size[0]}x{size[1]} pixels, the others {form.width}x{form.height}; set data.size")
        report.sizes[size] += 1
        side = min(image.size)
        left, top = ((length - side) / 2 for length in image.size)
        # Cropped first: an image of 1 x 50,000,000 pixels would not fit into memory when its shorter side is enlarged.
        box = (left, top, left + side, top + side)
        image = image.resize((form.width, form.height), Image.Resampling.BILINEAR, box)
    if turn is not None:  # of the resized image, to spare memory
        image = image.transpose(turn)
    mode = "L" if form.channels == 1 else "RGB"
    array = np.asarray(image if image.mode == mode else image.convert(mode))
    return array.reshape(form.shape)


def reason(error: Exception) -> str:
    """Why a picture cannot be used, on one line."""
    from PIL import Image, UnidentifiedImageError

    if isinstance(error, Image.DecompressionBombError):
        return f"it has more than {MAX_PIXELS // 10**6} megapixels; scale it down"
    if isinstance(error, UnidentifiedImageError):  # its text is the path
        return f"it is no image in a known format ({', '.join(FORMATS)})"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return printable(str(error)) or type(error).__name__


@contextmanager
def _opened(path: str) -> Iterator[Image.Image]:
    """An image file of an accepted format and size, before its pixels are decoded."""
    from PIL import Image

    with Image.open(path, formats=_formats()) as image:
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise DataError(
                f"it has {width * height / 1e6:.0f} megapixels ({width}x{height}), "
                f"at most {MAX_PIXELS // 10**6} are decoded; scale it down"
            )
        yield image


@contextmanager
def photographs_only() -> Iterator[None]:
    """The same limits on formats and sizes for `PIL.Image.open` in other people's code."""
    from PIL import Image

    Image.init()
    formats, pixels = Image.ID.copy(), Image.MAX_IMAGE_PIXELS
    Image.ID[:] = _formats()
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # Pillow refuses twice as many
    try:
        yield
    finally:
        Image.ID[:] = formats
        Image.MAX_IMAGE_PIXELS = pixels


@cache
def _formats() -> list[str]:
    """Those that this machine's Pillow decodes: it warns of others, which it knows by name."""
    from PIL import Image

    known = set(Image.registered_extensions().values())
    return [name for name in FORMATS if name in known]


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What makes a picture upright. TIFF files, once loaded, are upright already."""
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


@cache
def _sideways() -> frozenset[Image.Transpose | None]:
    """What exchanges width and height."""
    from PIL import Image

    turns = Image.Transpose
    return frozenset((turns.TRANSPOSE, turns.ROTATE_270, turns.TRANSVERSE, turns.ROTATE_90))


def _turned(size: tuple[int, int]) -> tuple[int, int]:
    return size[1], size[0]


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
