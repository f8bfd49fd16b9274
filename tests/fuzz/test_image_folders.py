"""Random image folders: each is a data set or refused in one line, in bounded time, and leaves nothing half-made.

A failure names its seed: FUZZ_SEED=<seed> FUZZ_SECONDS=0 repeats that folder alone.
"""

from __future__ import annotations

import io
import os
import random
import shutil
import signal
import stat
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from study.training.data import sources
from study.training.data.dataset import DataError
from tests.support.users import permissions_count

SECONDS = float(os.environ.get("FUZZ_SECONDS", 30))
SEED = int(os.environ.get("FUZZ_SEED", random.SystemRandom().randrange(2**32)))
LONGEST = 30
"""Seconds that a folder may take."""
FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "AVIF", "TIFF", "BMP", "PPM")
ENDINGS = ("png", "jpg", "jfif", "gif", "webp", "avif", "tif", "bmp", "ppm", "pfm", "heic", "txt", "")
MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I", "I;16", "F", "LAB")
NAMES = (b"cat", b"dog", b"train", b"test", b"val", b".hidden", b"__MACOSX", b"Thumbs.db")
TARGETS = (".", "..", "../..", "loop", "nothing", "/dev/zero", "/proc/self/mem", "/proc/self/fd")


def name(draw: random.Random) -> bytes:
    if draw.random() < 0.6:
        return draw.choice(NAMES)
    length = draw.choice((1, 3, 8, 200))
    return bytes(draw.choice((b"a", b"\x1b", b"\n", b"\xff", b" ", b"[", b"%"))[0] for _ in range(length))


def image(draw: random.Random) -> bytes:
    """A small image of some mode and format, and perhaps EXIF data that are none."""
    size = draw.choice(((32, 32), (1, 1), (7, 50), (100, 3)))
    picture = Image.new(draw.choice(MODES), size)
    options: dict[str, Any] = {}
    if draw.random() < 0.3:
        options["exif"] = b"Exif\0\0MM\0*" + draw.randbytes(40)
    if draw.random() < 0.2:
        options |= {"save_all": True, "append_images": [picture.copy()]}
    for _ in range(20):
        file = io.BytesIO()
        try:
            picture.save(file, draw.choice(FORMATS), **options)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError):  # a mode or options that the format has not
            continue
        return file.getvalue()
    return b""


def damaged(draw: random.Random, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(draw.choice((0, 0, 1, 3, 30))):
        if changed:
            changed[draw.randrange(min(len(changed), draw.choice((64, 10**9))))] = draw.randrange(256)
    if draw.random() < 0.2:
        del changed[draw.randrange(len(changed) + 1) :]
    return bytes(changed)


def fill(draw: random.Random, folder: bytes, depth: int) -> None:
    """Files, folders and links below `folder`, some of them without permissions. Nothing is done through a link."""
    for _ in range(draw.choice((1, 2, 4))):
        kind = draw.random()
        path = os.path.join(folder, name(draw))
        if os.path.lexists(path):
            continue
        try:
            if kind < 0.1:
                os.symlink(draw.choice(TARGETS), path)
            elif kind < 0.5 and depth:
                os.mkdir(path)
                fill(draw, path, depth - 1)
            else:
                content = draw.randbytes(draw.choice((0, 10, 1000))) if draw.random() < 0.1 else image(draw)
                path += f".{draw.choice(ENDINGS)}".encode()
                with open(path, "xb") as file:
                    file.write(damaged(draw, content) if draw.random() < 0.3 else content)
            if draw.random() < 0.02 and not os.path.islink(path):
                os.chmod(path, 0)
        except OSError:  # a name that is taken or too long, or a folder without permissions
            continue


def make_folder(draw: random.Random, root: Path) -> None:
    layout = draw.random()
    classes = [b"cat", b"dog", *(name(draw) for _ in range(draw.choice((0, 0, 1))))]
    parts = [b"."] if layout < 0.2 else [b"train", b"test", *([b"val"] if layout < 0.4 else [])]
    for part in parts:
        for each in classes:
            folder = os.path.join(os.fsencode(root), part, each)
            os.makedirs(folder, exist_ok=True)
            for i in range(2):
                Image.new("RGB", (32, 32), (i, 0, 0)).save(os.fsdecode(os.path.join(folder, b"good%d.png" % i)))
            if draw.random() < 0.5:
                fill(draw, folder, 2)
    if draw.random() < 0.3:
        fill(draw, os.fsencode(root), 2)


def too_long(*_: object) -> None:
    raise TimeoutError(f"more than {LONGEST} s")


def attempt(root: Path, cache: Path, size: int | None, channels: int | None) -> str:
    """Load the folder; what came of it."""
    before = set(cache.glob("imagefolder-*/*"))
    signal.alarm(LONGEST)
    try:
        loaded = sources.load("imagefolder", str(root), size=size, channels=channels)
    except DataError as error:
        message = str(error)
        assert message.isprintable(), message
        assert set(cache.glob("imagefolder-*/*")) == before
        return "refused"
    finally:
        signal.alarm(0)
        assert not list(cache.glob("*.tmp"))
    for images, labels in ((loaded.train_images, loaded.train_labels), (loaded.test_images, loaded.test_labels)):
        assert images.shape[::3] == (len(labels), channels or 3)
        assert size is None or images.shape[1:3] == (size, size)
        assert images.dtype == np.uint8
        assert set(labels.tolist()) <= set(range(len(loaded.classes)))
    assert all(note.isprintable() for note in loaded.notes)
    assert all(text.isprintable() for text in loaded.classes)
    return "loaded"


@pytest.mark.fuzz
@pytest.mark.timeout(int(SECONDS) + 10 * LONGEST)
def test_random_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("STUDY_CACHE", str(cache))
    signal.signal(signal.SIGALRM, too_long)
    outcomes: Counter[str] = Counter()
    deadline, seed = time.monotonic() + SECONDS, SEED
    while True:
        draw = random.Random(seed)
        root = Path(tempfile.mkdtemp(dir=tmp_path))
        form = draw.choice((32, 32, 1, 77, None)), draw.choice((None, None, 1, 3))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of Pillow, as it saves what is odd
                make_folder(draw, root)
                warnings.simplefilter("error")
                with permissions_count():
                    first = attempt(root, cache, *form)
                    if first == "loaded" and draw.random() < 0.5:
                        for path in cache.glob("imagefolder-*/*"):
                            path.write_bytes(damaged(draw, path.read_bytes()))
                        assert attempt(root, cache, *form) == "loaded"
        except BaseException as error:
            raise AssertionError(f"FUZZ_SEED={seed}") from error
        finally:
            for folder, _, _ in os.walk(os.fsencode(root)):
                os.chmod(folder, stat.S_IRWXU)
            shutil.rmtree(root)
            shutil.rmtree(cache, ignore_errors=True)
        outcomes[first] += 1
        seed += 1
        if time.monotonic() >= deadline:
            break
    printed = capfd.readouterr()
    assert printed.err == ""  # neither Pillow nor its libraries write past us
    with capfd.disabled():
        print(f"\n{outcomes.total()} image folders from FUZZ_SEED={SEED}: {dict(outcomes)}")  # noqa: T201
