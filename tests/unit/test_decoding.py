"""Image files as pixels: every mode of Pillow, bit depths, transparency, orientation, animations, sizes and limits."""

from __future__ import annotations

import struct
import subprocess
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from study.training.data import decoding
from study.training.data.dataset import DataError
from study.training.data.decoding import Files, Form

FORM = Form(32, 32, 3)
RAMP = np.linspace(0, 255, 32).round().astype(np.uint8)[None].repeat(32, 0)


class Decoded(NamedTuple):
    images: Any
    changes: Counter[str]
    notes: list[str]


def decoded_files(paths: Iterable[Path], form: Form = FORM) -> Decoded:
    with tempfile.TemporaryDirectory() as folder:
        report = decoding.fill(Path(folder), {"a": Files(list(map(str, paths)))}, form)["a"]
        return Decoded(np.load(Path(folder) / "a_images.npy"), report.changes, report.notes(form))


def decode(path: Path, form: Form = FORM) -> Any:
    return decoded_files([path], form).images[0]


def refusal(path: Path) -> str:
    with pytest.raises(DataError) as error:
        decode(path)
    return str(error.value)


def filled(mode: str, pixel: Any) -> Image.Image:
    image = Image.new(mode, (2, 1))
    if mode in ("P", "PA"):
        image.putpalette([0, 0, 0, 10, 20, 30])
    image.putpixel((0, 0), pixel)
    image.putpixel((1, 0), pixel)
    return image


MODES: dict[str, tuple[Any, tuple[int, int, int] | str]] = {
    "1": (1, (255, 255, 255)),
    "L": (66, (66, 66, 66)),
    "LA": ((100, 51), (224, 224, 224)),  # a fifth of 100 and four fifths of white
    "La": ((20, 51), (224, 224, 224)),  # the same, multiplied already
    "P": (1, (10, 20, 30)),
    "PA": ((1, 255), (10, 20, 30)),
    "RGB": ((1, 2, 3), (1, 2, 3)),
    "RGBA": ((100, 0, 255, 51), (224, 204, 255)),
    "RGBa": ((20, 0, 51, 51), (224, 204, 255)),
    "RGBX": ((1, 2, 3, 0), (1, 2, 3)),
    "CMYK": ((255, 0, 0, 0), (0, 255, 255)),
    "YCbCr": ((99, 128, 128), (99, 99, 99)),
    "HSV": ((0, 255, 200), (200, 0, 0)),
    "LAB": ((50, 0, 0), "CIELAB"),
    "I": (66, "32-bit"),
    "I;16": (132 * 257, (132, 132, 132)),
    "I;16B": (132 * 257, (132, 132, 132)),
    "I;16L": (132 * 257, (132, 132, 132)),
    "I;16N": (132 * 257, (132, 132, 132)),
    "F": (0.5, "floating-point"),
}


def test_every_mode_of_pillow_has_an_answer() -> None:
    assert set(MODES) == set(Image.MODES)


@pytest.mark.parametrize("mode", MODES)
def test_modes(mode: str) -> None:
    pixel, expected = MODES[mode]
    if isinstance(expected, str):
        with pytest.raises(DataError, match=expected):
            decoding.to_rgb(filled(mode, pixel), [])
        return
    rgb = decoding.to_rgb(filled(mode, pixel), [])
    assert rgb.mode == "RGB"
    assert np.abs(np.asarray(rgb)[0, 1].astype(int) - expected).max() <= 1


def tiff(path: Path, bits: int, photometric: int, row: bytes) -> Path:
    """A TIFF of 32x32 grey pixels with equal rows."""
    tags = [(256, 32), (257, 32), (258, bits), (259, 1), (262, photometric), (273, 0), (277, 1), (278, 32)]
    tags.append((279, 32 * len(row)))
    offset = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, offset if tag == 273 else value) for tag, value in tags)
    path.write_bytes(b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4) + row * 32)
    return path


def twelve_bits(values: list[int]) -> bytes:
    number = "".join(f"{value:012b}" for value in values)
    return int(number, 2).to_bytes(len(number) // 8, "big")


def test_grey_of_16_bits_becomes_what_8_bits_are(tmp_path: Path) -> None:
    wide = RAMP.astype(np.uint16) * 257
    Image.fromarray(wide).save(tmp_path / "a.png")
    Image.fromarray(wide).save(tmp_path / "b.tif")
    Image.fromarray(wide).save(tmp_path / "c.pgm")
    Image.fromarray(wide.astype(">u2")).save(tmp_path / "d.tif")
    tiff(tmp_path / "white_is_zero.tif", 16, 0, (65535 - wide[0]).astype("<u2").tobytes())
    tiff(tmp_path / "12bits.tif", 12, 1, twelve_bits([round(int(v) * 4095 / 255) for v in RAMP[0]]))
    paths = sorted(tmp_path.iterdir())
    decoded = decoded_files(paths)
    for path, image in zip(paths, decoded.images, strict=True):
        assert np.array_equal(image, RAMP[..., None].repeat(3, 2)), path
    assert decoded.notes == ["images scaled from 16 to 8 bits: 6"]
    # Round, not cut: 384 / 257 is nearer to 1, 386 / 257 to 2.
    Image.fromarray(np.full((32, 32), 386, np.uint16)).save(tmp_path / "a.png")
    assert decode(tmp_path / "a.png").max() == 2


def test_floats_and_wide_integers_are_refused_by_name(tmp_path: Path) -> None:
    Image.fromarray(RAMP.astype(np.float32) / 255).save(tmp_path / "float.tif")
    Image.fromarray(RAMP.astype(np.int32) * 1000).save(tmp_path / "wide.tif")
    Image.new("LAB", (32, 32)).save(tmp_path / "lab.tif")
    Image.fromarray(RAMP).save(tmp_path / "good.png")
    with pytest.raises(DataError) as error:
        decoded_files(sorted(tmp_path.iterdir()))
    for part in ("cannot use 3 images", "float.tif: its pixels are floating", "wide.tif: its pixels are 32", "lab.tif"):
        assert part in str(error.value)
    assert "good.png" not in str(error.value)


def test_transparency_shows_white(tmp_path: Path) -> None:
    """As an alpha channel, as a colour of a palette, as one grey of 8 or 16 bits, as one colour."""
    rgba = np.full((32, 32, 4), 9, np.uint8)
    rgba[..., 3] = 255
    rgba[0, 0] = (50, 60, 70, 0)
    grey = np.full((32, 32), 9, np.uint8)
    grey[0, 0] = 77
    Image.fromarray(rgba).save(tmp_path / "alpha.png")
    Image.fromarray(rgba).save(tmp_path / "alpha.webp", lossless=True)
    Image.fromarray(grey).save(tmp_path / "grey.png", transparency=77)
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "wide.png", transparency=77 * 257)
    Image.fromarray(grey[..., None].repeat(3, 2)).save(tmp_path / "colour.png", transparency=(77, 77, 77))
    palette = Image.fromarray(grey).convert("P")
    palette.save(tmp_path / "palette.png", transparency=77)
    palette.save(tmp_path / "palette.gif", transparency=77)
    paths = sorted(tmp_path.iterdir())
    decoded = decoded_files(paths)
    for path, image in zip(paths, decoded.images, strict=True):
        assert image[0, 0].tolist() == [255, 255, 255], path
        assert image[9, 9].tolist() == [9, 9, 9], path
    assert decoded.changes["with transparency composited on white"] == 7
    rgba[..., 3] = 255  # an alpha channel that hides nothing changes nothing
    Image.fromarray(rgba).save(tmp_path / "opaque.png")
    whole = decoded_files([tmp_path / "opaque.png"])
    assert whole.images[0, 0, 0].tolist() == [50, 60, 70]
    assert whole.notes == []


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["png", "tif", "webp", "jpg"])
def test_orientation_of_exif_is_applied(tmp_path: Path, orientation: int, kind: str) -> None:
    """The stored pixels are made from the upright picture by the standard's definition of each orientation."""
    upright = np.zeros((32, 32, 3), np.uint8)
    upright[:16, :16] = 255  # top left
    upright[:16, 16:] = 100  # top right
    first_row_is, first_column_is = {
        1: ("top", "left"), 2: ("top", "right"), 3: ("bottom", "right"), 4: ("bottom", "left"),
        5: ("left", "top"), 6: ("right", "top"), 7: ("right", "bottom"), 8: ("left", "bottom"),
    }[orientation]  # fmt: skip
    stored = upright
    if first_row_is in ("left", "right"):
        stored = stored.transpose(1, 0, 2)
    stored = stored[::-1] if first_row_is in ("bottom", "right") else stored
    stored = stored[:, ::-1] if first_column_is in ("right", "bottom") else stored
    exif = Image.Exif()
    exif[0x112] = orientation
    path = tmp_path / f"turned.{kind}"
    lossless: dict[str, dict[str, Any]] = {"webp": {"lossless": True}, "jpg": {"quality": 100}}
    Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif, **lossless.get(kind, {}))
    assert np.abs(decode(path).astype(int) - upright)[::4, ::4].max() <= 3


def test_damaged_exif_is_no_fault(tmp_path: Path) -> None:
    Image.fromarray(RAMP).save(tmp_path / "a.png", exif=b"Exif\0\0II*\0\xff\xff\xff\xff garbage")
    assert np.array_equal(decode(tmp_path / "a.png")[..., 0], RAMP)


def test_animations_give_their_first_picture(tmp_path: Path) -> None:
    pictures = [Image.new("RGB", (32, 32), colour) for colour in ((200, 0, 0), (0, 200, 0))]
    paths = [tmp_path / f"a.{kind}" for kind in ("gif", "png", "webp", "tif")]
    for path in paths:
        options: dict[str, Any] = {"lossless": True} if path.suffix == ".webp" else {}
        pictures[0].save(path, save_all=True, append_images=pictures[1:], **options)
    decoded = decoded_files(paths)
    assert (decoded.images == (200, 0, 0)).all()
    assert decoded.notes == ["images first pictures of animations or pages: 4"]


def test_resizing_is_noted(tmp_path: Path) -> None:
    for i, size in enumerate([(32, 32), (48, 48), (48, 48), (20, 10)]):
        Image.new("RGB", size, (1, 2, 3)).save(tmp_path / f"{i}.png")
    decoded = decoded_files(sorted(tmp_path.iterdir()))
    assert decoded.notes == ["3 images resized to 32x32 (from 48x48, 20x10; 1 not square: the centre square is used)"]
    assert (decoded.images == (1, 2, 3)).all()


def png_header(width: int, height: int) -> bytes:
    """A PNG of those sizes whose pixels are damaged."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"damaged") + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("width", "height"), [(12000, 12000), (16000, 12000), (60000, 60000), (1, 2**31 - 1), (50001, 1000)]
)
def test_huge_images_are_refused_before_they_are_decoded(tmp_path: Path, width: int, height: int) -> None:
    (tmp_path / "huge.png").write_bytes(png_header(width, height))
    message = refusal(tmp_path / "huge.png")
    assert "huge.png" in message
    assert "megapixels" in message
    assert "scale it down" in message


def test_an_image_at_the_limit_is_decoded_without_a_word(tmp_path: Path) -> None:
    (tmp_path / "damaged.png").write_bytes(png_header(50000, 1000))
    assert "megapixels" not in refusal(tmp_path / "damaged.png")


def test_the_refusal_of_a_huge_image_takes_little_memory(tmp_path: Path) -> None:
    """In a process of its own, which reports the most that it had."""
    Image.new("L", (12000, 12000)).save(tmp_path / "huge.png")
    program = (
        "import resource, sys, tempfile; from pathlib import Path; from study.training.data import decoding\n"
        "from PIL import Image\n"
        "pictures, form = decoding.Files(sys.argv[1:]), decoding.Form(32, 32, 3)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: decoding.fill(Path(tempfile.mkdtemp(dir=Path(sys.argv[1]).parent)), {'a': pictures}, form)\n"
        "except decoding.DataError as error: assert 'megapixels' in str(error)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    command = [sys.executable, "-W", "error", "-c", program, str(tmp_path / "huge.png")]
    grown = subprocess.run(command, check=True, capture_output=True, text=True)
    assert int(grown.stdout) < 50_000  # KiB; decoding would take 144 MB
    assert grown.stderr == ""


def test_only_formats_of_photographs_are_opened(tmp_path: Path) -> None:
    """PostScript starts Ghostscript, whatever the file is called."""
    Image.new("RGB", (32, 32)).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.png")
    assert "no image in a known format" in refusal(tmp_path / "a.png")


def test_many_faults_are_counted_and_some_named(tmp_path: Path) -> None:
    for i in range(8):
        (tmp_path / f"{i}.png").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"cannot use 8 images: .*0\.png: .*4\.png: .*; and 3 more;"):
        decoded_files(sorted(tmp_path.iterdir()))


def test_endings_of_common_images_are_accepted() -> None:
    assert {".jfif", ".gif", ".avif", ".jpe", ".png", ".webp", ".tiff", ".bmp"} <= decoding.accepted_endings()
    assert not {".heic", ".eps", ".pdf", ".mpg", ".ico"} & decoding.accepted_endings()
