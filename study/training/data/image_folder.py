"""Folders of images in torchvision's ImageFolder layout, decoded once into a cached array."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from study.training.data.dataset import DataError, Dataset, Images, Say, _locked, cache_dir

SIDE = 32


ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")


IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff")


def _imagefolder(root: Path, say: Say) -> Dataset:
    """torchvision's ImageFolder layout; decoded once, then one array file in the cache.

    The cache is keyed by every file's name, size and modification time: a changed folder is decoded again.
    """
    if not root.is_dir():
        raise DataError(f"no folder {root}: --data-root must be a folder with train/ and test/ (or val/)")
    tests = [root / name for name in ("test", "val") if (root / name).is_dir()]
    if not (root / "train").is_dir() or not tests:
        raise DataError(f"{root} must hold train/ and test/ (or val/), one folder a class in each")
    listings = [_listing(part) for part in (root / "train", tests[0])]
    classes = sorted({label for label, _, _ in listings[0]})
    strangers = sorted({label for label, _, _ in listings[1]} - set(classes))
    if strangers:
        raise DataError(f"{tests[0]} has classes that {root / 'train'} has not: {', '.join(strangers)}")

    key = hashlib.sha256(repr([str(root.resolve()), listings]).encode()).hexdigest()[:24]
    cached = cache_dir() / f"imagefolder-{key}.npz"
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        with _locked(cached.with_suffix(".lock")):
            if not cached.exists():
                say(f"decoding {sum(map(len, listings))} images under {root} (once)")
                images = [_decode([path for _, path, _ in listing]) for listing in listings]
                labels = [np.array([classes.index(label) for label, _, _ in listing]) for listing in listings]
                decoded = Dataset(images[0], labels[0], images[1], labels[1], tuple(classes))
                _write_atomically(cached, decoded)
    except OSError as error:
        raise DataError(f"cannot cache decoded images in {cached.parent}: {error.strerror}; set STUDY_CACHE") from None
    with np.load(cached) as stored:
        parts = (stored[part] for part in ARRAYS)
        dataset = Dataset(*parts, tuple(str(name) for name in stored["classes"]))  # type: ignore[call-arg]
        # Hashing 180 MB again would cost more than reading them.
        dataset.__dict__["fingerprint"] = str(stored["fingerprint"])
    return dataset


def _listing(part: Path) -> list[tuple[str, str, tuple[int, int]]]:
    """(class, path, (size, mtime)) of every image of a split, in the order of class and file name."""
    found = []
    for folder in sorted(entry.name for entry in os.scandir(part) if entry.is_dir()):
        with os.scandir(part / folder) as entries:
            files = [e for e in entries if e.name.lower().endswith(IMAGE_ENDINGS) and e.is_file()]
        for entry in sorted(files, key=lambda e: e.name):
            status = entry.stat()
            found.append((folder, entry.path, (status.st_size, status.st_mtime_ns)))
    if not found:
        raise DataError(f"no classes with images under {part}: it must hold one folder of images a class")
    return found


def _decode(paths: list[str]) -> Images:
    # Processes, not threads: Pillow's share of the interpreter lock leaves threads no gain (20,000 JPEGs of 32x32 on
    # 2 cores: 3.1 s alone, 3.4 s with threads, 1.6 s with processes). Spawned, because torch's threads may be running.
    chunks = [paths[i : i + 500] for i in range(0, len(paths), 500)]
    if len(chunks) == 1:
        return _decode_chunk(paths)
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        return np.concatenate(list(pool.map(_decode_chunk, chunks)))


def _decode_chunk(paths: list[str]) -> Images:
    from PIL import Image

    images = np.empty((len(paths), SIDE, SIDE, 3), np.uint8)
    for i, path in enumerate(paths):
        try:
            with Image.open(path) as image:
                colour = image.convert("RGB")
                if colour.size != (SIDE, SIDE):
                    colour = colour.resize((SIDE, SIDE), Image.Resampling.BILINEAR)
                images[i] = np.asarray(colour)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(f"cannot decode the image {path}: {error}; mend or remove it") from None
    return images


def _write_atomically(path: Path, dataset: Dataset) -> None:
    arrays = {part: getattr(dataset, part) for part in ARRAYS}
    names, fingerprint = np.array(dataset.classes), np.array(dataset.fingerprint)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
        try:
            np.savez(file, allow_pickle=False, classes=names, fingerprint=fingerprint, **arrays)
            file.close()
            os.replace(file.name, path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise
