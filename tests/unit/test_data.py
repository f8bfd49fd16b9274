"""Data sets, their cache and fingerprint, and the splits of the two protocols."""

from __future__ import annotations

import logging
import os
import pickle
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from study.training.data import sources
from study.training.data.dataset import DataError, Dataset
from study.training.data.split import split_dataset, split_notes, split_off_test

REAL = os.environ.get("STUDY_TEST_IMAGES")
real_images = pytest.mark.skipif(not REAL, reason="STUDY_TEST_IMAGES names no folder of images")


def folder(root: Path, sizes: dict[str, int], side: int = 32, kind: str = "png") -> Path:
    """An imagefolder: `sizes` images a class in train/, one in test/; colours tell class and number."""
    for part in ("train", "test"):
        for c, (name, size) in enumerate(sizes.items()):
            (root / part / name).mkdir(parents=True)
            for i in range(size if part == "train" else 1):
                Image.new("RGB", (side, side), (10 * c, i, 7)).save(root / part / name / f"{i:04}.{kind}")
    return root


def test_digits_are_all_there_and_balanced() -> None:
    digits = sources.load("digits")
    assert digits.train_images.shape == (1438, 32, 32, 3)
    assert digits.test_images.shape == (359, 32, 32, 3)
    assert digits.train_images.dtype == np.uint8
    assert digits.train_images.max() == 255
    assert np.ptp(np.bincount(digits.test_labels)) <= 3
    # As scikit-learn's copy of the file gave them: a study on digits can be resumed after an upgrade.
    assert digits.fingerprint == "f5b89c37eda2e6a4853c2c1616b14bed594509afd2e69bd73e6fb75f1c98831d"


def test_digits_need_no_other_package() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert not [line for line in project["dependencies"] if line.startswith("scikit-learn")]
    program = (
        "import sys; sys.modules['sklearn'] = None; from study.training.data import sources; sources.load('digits')"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_fingerprint_sees_every_pixel_and_label() -> None:
    one = sources.load("digits")
    images, labels = one.train_images.copy(), one.train_labels.copy()
    images[700, 3, 4, 1] ^= 1
    labels[3] += 1
    parts = (one.test_images, one.test_labels, one.classes)
    prints = {
        one.fingerprint,
        Dataset(images, one.train_labels, *parts).fingerprint,
        Dataset(one.train_images, labels, *parts).fingerprint,
    }
    validation = Dataset(one.train_images, one.train_labels, *parts, images[:5], labels[:5])
    prints.add(validation.fingerprint)
    images[2] ^= 1
    prints.add(Dataset(one.train_images, one.train_labels, *parts, images[:5], labels[:5]).fingerprint)
    assert len(prints) == 5


def test_imagefolder_is_decoded_once_and_again_when_it_changes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "study.training.data")
    root = folder(tmp_path / "images", {"a": 3, "b": 700})
    first = sources.load("imagefolder", str(root))
    assert first.classes == ("a", "b")
    assert np.bincount(first.train_labels).tolist() == [3, 700]
    assert first.train_images[3 + 200, 0, 0].tolist() == [10, 200, 7]
    again = sources.load("imagefolder", str(root))
    assert caplog.messages == [f"decoding 705 images under {root} (once)"]
    assert again.fingerprint == first.fingerprint
    assert np.array_equal(again.train_images, first.train_images)
    Image.new("RGB", (32, 32), (1, 2, 3)).save(root / "train" / "a" / "0001.png")
    changed = sources.load("imagefolder", str(root))
    assert len(caplog.messages) == 2
    assert changed.fingerprint != first.fingerprint


def test_imagefolder_takes_other_sizes_val_and_grey(tmp_path: Path) -> None:
    root = folder(tmp_path / "images", {"a": 2, "b": 2}, side=48, kind="jpg")
    (root / "test").rename(root / "val")
    Image.new("L", (20, 10), 99).save(root / "train" / "a" / "grey.PNG")
    (root / "train" / "a" / "notes.txt").write_text("not an image")
    loaded = sources.load("imagefolder", str(root), size=32)
    assert loaded.train_images.shape == (5, 32, 32, 3)
    assert loaded.train_images[2, 0, 0].tolist() == [99, 99, 99]


def test_workers_that_start_together_decode_once(tmp_path: Path) -> None:
    root = folder(tmp_path / "images", {"a": 300, "b": 300})
    program = (
        "import logging, sys; from study.training.data.sources import load; "
        "logging.basicConfig(level=logging.INFO, stream=sys.stdout); "
        "print(load('imagefolder', sys.argv[1]).fingerprint)"
    )
    environment = os.environ | {"STUDY_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-c", program, str(root)]
    workers = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    outputs = [worker.communicate(timeout=100)[0].splitlines() for worker in workers]
    assert sorted(map(len, outputs)) == [1, 1, 1, 2]  # one decodes
    assert len({lines[-1] for lines in outputs}) == 1


def test_a_torn_jpeg_is_not_half_decoded(tmp_path: Path) -> None:
    root = folder(tmp_path / "images", {"a": 1, "b": 1})
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(root / "train" / "a" / "whole.jpg")
    torn = root / "train" / "a" / "whole.jpg"
    torn.write_bytes(torn.read_bytes()[:1200])
    with pytest.raises(DataError, match=r"whole\.jpg"):
        sources.load("imagefolder", str(root))


@pytest.mark.parametrize("protocol", ["holdout", "paper"])
def test_splits_share_nothing_and_repeat(protocol: str) -> None:
    digits = sources.load("digits")
    options = {"holdout": 0.2, "train_images": 500}
    part = split_dataset(digits, protocol, **options)  # type: ignore[arg-type]
    assert len(part.train_labels) == 500
    assert np.ptp(np.bincount(part.train_labels)) <= 4  # stratified
    if protocol == "paper":
        assert np.array_equal(part.validation_images, digits.test_images)
    else:
        assert len(part.validation_labels) == round(0.2 * 1438)
        rows = [digits.train_images.tobytes().count(i.tobytes()) for i in part.validation_images[:3]]
        assert all(rows)
    again = split_dataset(digits, protocol, **options)  # type: ignore[arg-type]
    assert np.array_equal(part.train_images, again.train_images)
    assert np.array_equal(part.test_images, digits.test_images)


def test_holdout_takes_no_training_image() -> None:
    """With images that carry their own number."""
    numbers = np.arange(200, dtype=np.uint8)
    images = np.broadcast_to(numbers[:, None, None, None], (200, 32, 32, 3))
    labels = np.arange(200, dtype=np.int64) % 4
    part = split_dataset(Dataset(images, labels, images[:4], labels[:4], tuple("abcd")), "holdout", holdout=0.3)
    train, validation = (set(i[:, 0, 0, 0].tolist()) for i in (part.train_images, part.validation_images))
    assert train | validation == set(range(200))
    assert not train & validation
    assert np.bincount(part.validation_labels).tolist() == [15, 15, 15, 15]


def test_a_split_of_a_mapped_file_copies_nothing(tmp_path: Path) -> None:
    digits = sources.load("digits")
    np.save(tmp_path / "images.npy", digits.train_images)
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    whole = Dataset(mapped, digits.train_labels, mapped, digits.train_labels, digits.classes)
    part, plain = (split_dataset(of, "holdout", holdout=0.2, train_images=500) for of in (whole, digits))
    assert part.train.images is part.validation.images is part.test.images is mapped
    assert (len(part.train), len(part.validation), len(part.test)) == (500, 288, 1438)
    assert part.train.index is not None
    assert np.array_equal(part.train.labels, digits.train_labels[part.train.index])
    assert np.array_equal(part.train_images, plain.train_images)
    assert np.array_equal(part.validation_images, plain.validation_images)
    for images in (part.train_images, part.validation_images, part.test_images):
        assert type(images) is np.ndarray
        assert images.flags.writeable  # else torch.from_numpy warns


def test_splits_that_cannot_be_are_refused() -> None:
    digits = sources.load("digits")
    with pytest.raises(DataError, match="at most the 1294"):
        split_dataset(digits, "holdout", holdout=0.1, train_images=1295)
    with pytest.raises(DataError, match="0 to validate"):
        split_dataset(digits, "holdout", holdout=0.0001)


def test_a_validation_split_of_its_own_validates() -> None:
    digits = sources.load("digits")
    images, labels = digits.test_images[:50] ^ np.uint8(1), digits.test_labels[:50]
    own = Dataset(digits.train_images, digits.train_labels, digits.test_images, digits.test_labels, digits.classes,
                  images, labels)  # fmt: skip
    part = split_dataset(own, "holdout", holdout=0.3)
    assert part.validation_images is images
    assert part.train_images is digits.train_images
    assert "data.holdout is not used" in split_notes(own, part, "holdout")[0]
    part = split_dataset(own, "paper")
    assert part.validation_images is digits.test_images
    assert "under the paper protocol the test split validates" in split_notes(own, part, "paper")[0]
    assert split_notes(digits, split_dataset(digits, "holdout"), "holdout") == []


def test_classes_without_images_in_a_part_are_named() -> None:
    images = np.zeros((21, 32, 32, 3), np.uint8)
    labels = np.array([0] * 10 + [1] * 10 + [2])
    rare = Dataset(images, labels, images, labels, ("cat", "dog", "bird"))
    notes = split_notes(rare, split_dataset(rare, "holdout", holdout=0.2), "holdout")
    assert notes == ["there are no images to validate of 1 of 3 classes: bird"]


def test_a_test_split_of_ours_has_a_fifth_of_each_class() -> None:
    labels = np.repeat([0, 1, 2], [50, 2, 7])
    test = split_off_test(labels)
    assert np.bincount(labels[test]).tolist() == [10, 1, 1]
    assert np.array_equal(test, split_off_test(labels))
    assert test[:10].tolist() != list(range(10))  # drawn, not the first of each class


def test_cifar10_is_read_as_torchvision_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The archive's own layout, with few images: pickled rows of 3,072 bytes, channels first."""
    from torchvision.datasets import CIFAR10

    base = tmp_path / CIFAR10.base_folder
    base.mkdir()
    rng = np.random.default_rng(0)
    rows = {}
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        rows[name] = rng.integers(0, 256, (4, 3072), dtype=np.uint8)
        (base / name).write_bytes(pickle.dumps({"data": rows[name], "labels": [0, 1, 2, 3]}))
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    loaded = sources.load("cifar10", str(tmp_path))
    assert loaded.train_images.shape == (20, 32, 32, 3)
    assert np.array_equal(loaded.test_images[1], rows["test_batch"][1].reshape(3, 32, 32).transpose(1, 2, 0))
    assert loaded.classes[:2] == ("a", "b")


@real_images
@pytest.mark.usefixtures("shared_cache")
def test_real_images_load_and_come_back_within_a_second() -> None:
    first = sources.load("imagefolder", REAL)
    started = time.monotonic()
    again = sources.load("imagefolder", REAL)
    seconds = time.monotonic() - started
    assert again.fingerprint == first.fingerprint
    assert len(first.classes) > 1
    print(f"{len(again.train_labels):,} images from the cache in {seconds:.2f} s")  # noqa: T201
