"""torchvision's data sets, in the files that torchvision itself reads; nothing is downloaded."""

from __future__ import annotations

import json
import logging
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torchvision import datasets

from study.training.data import decoding, sources
from study.training.data.dataset import DataError
from study.training.data.decoding import Form, Report
from study.training.data.torchvision_sets import SETS, Items


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STUDY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "root"


def load(name: str, root: Path, **options: Any) -> Any:
    return sources.load(f"torchvision:{name}", str(root), **options)


def refusal(name: str, root: Path, **options: Any) -> str:
    with pytest.raises(DataError) as error:
        load(name, root, **options)
    return str(error.value)


def write_idx(path: Path, array: Any) -> None:
    """The format of MNIST."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = b"".join(length.to_bytes(4, "big") for length in array.shape)
    path.write_bytes(bytes([0, 0, 8, array.ndim]) + shape + array.tobytes())


def make_mnist(root: Path, name: str = "MNIST", *, train: int = 30) -> dict[str, Any]:
    draws, written = np.random.default_rng(0), {}
    for part, count in (("train", train), ("t10k", 10)):
        written[part] = draws.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        write_idx(root / name / "raw" / f"{part}-images-idx3-ubyte", written[part])
        write_idx(root / name / "raw" / f"{part}-labels-idx1-ubyte", (np.arange(count) % 10).astype(np.uint8))
    return written


def save(path: Path, size: tuple[int, int] = (64, 64), pixel: Any = (1, 2, 3), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, pixel).save(path)


def make_food(root: Path, sizes: dict[str, list[tuple[int, int]]]) -> None:
    """Food-101 of two classes; `sizes` of each split's images, in turn of the classes."""
    base = root / "food-101"
    (base / "meta").mkdir(parents=True, exist_ok=True)
    for split, of in sizes.items():
        names: dict[str, list[str]] = {"apple_pie": [], "waffles": []}
        for i, size in enumerate(of):
            label = list(names)[i % 2]
            names[label].append(f"{label}/{split}{i}")
            save(base / "images" / label / f"{split}{i}.jpg", size)
        (base / "meta" / f"{split}.json").write_text(json.dumps(names))


def test_grey_sets_stay_grey(root: Path) -> None:
    written = make_mnist(root)
    loaded = load("MNIST", root)
    assert loaded.train_images.dtype == np.uint8
    assert np.array_equal(loaded.train_images, written["train"][..., None])
    assert np.array_equal(loaded.test_images, written["t10k"][..., None])
    assert loaded.test_labels.tolist() == list(range(10))
    assert loaded.classes[:2] == ("0 - zero", "1 - one")
    assert loaded.notes == ()
    colour = load("MNIST", root, channels=3)
    assert np.array_equal(colour.train_images, np.repeat(written["train"][..., None], 3, axis=3))
    larger = load("MNIST", root, size=40)
    assert larger.train_images.shape == (30, 40, 40, 1)
    assert larger.notes == ("40 images resized to 40x40 (from 28x28)",)


@pytest.mark.slow
def test_many_images_are_decoded_in_processes(root: Path) -> None:
    written = make_mnist(root, train=decoding.CHUNK + 100)
    loaded = load("MNIST", root)
    assert np.array_equal(loaded.train_images, written["train"][..., None])
    assert loaded.train_labels.tolist() == [i % 10 for i in range(decoding.CHUNK + 100)]
    assert np.array_equal(loaded.test_images, written["t10k"][..., None])


def test_a_set_is_converted_once(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_mnist(root)
    caplog.set_level(logging.INFO, "study.training.data")
    first, again = load("MNIST", root), load("MNIST", root)
    assert caplog.messages == ["decoding 40 images of torchvision:MNIST (once)"]
    assert again.fingerprint == first.fingerprint
    assert isinstance(again.train_images, np.memmap)
    assert again.classes == first.classes


def test_a_set_without_splits_is_split(root: Path) -> None:
    for label, count in (("Forest", 10), ("River", 5)):
        for i in range(count):
            save(root / "eurosat" / "2750" / label / f"{i}.png", pixel=(i, len(label), 0))
    loaded = load("EuroSAT", root)
    assert loaded.classes == ("Forest", "River")
    assert np.bincount(loaded.test_labels).tolist() == [2, 1]
    assert np.bincount(loaded.train_labels).tolist() == [8, 4]
    pixels = [image[0, 0].tolist() for image in (*loaded.train_images, *loaded.test_images)]
    assert sorted(pixels) == sorted([[i, 6, 0] for i in range(10)] + [[i, 5, 0] for i in range(5)])
    assert loaded.train_images[loaded.train_labels == 1][:, 0, 0, 1].tolist() == [5] * 4
    assert loaded.notes == ("torchvision:EuroSAT has no test split, so 20% of each class are the test split",)


def test_a_validation_split_of_its_own_is_kept(root: Path) -> None:
    for split, count in (("train", 4), ("valid", 2), ("test", 3)):
        for label in ("AD", "AE"):
            for i in range(count):
                save(root / "country211" / split / label / f"{i}.png", pixel=(i, count, 0))
    loaded = load("Country211", root)
    assert [len(of) for of in (loaded.train_labels, loaded.validation_labels, loaded.test_labels)] == [8, 4, 6]
    assert loaded.validation_images[:, 0, 0, 1].tolist() == [2] * 4


def test_differing_sizes_need_a_size(root: Path) -> None:
    make_food(root, {"train": [(64, 64)] * 5 + [(60, 80)], "test": [(64, 64)] * 2})
    message = refusal("Food101", root)
    assert "2 different sizes (64x64, 60x80)" in message
    assert "data.size=64" in message
    loaded = load("Food101", root, size=24)
    assert loaded.train_images.shape == (6, 24, 24, 3)
    assert loaded.notes == ("8 images resized to 24x24 (from 64x64, 60x80; 1 not square: the centre square is used)",)


def test_an_image_of_another_size_than_those_looked_at_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("study.training.data.torchvision_sets.SAMPLED", 1)
    make_food(root, {"train": [(64, 64)] * 3 + [(60, 80)], "test": [(64, 64)] * 2})
    message = refusal("Food101", root)
    assert "it has 60x80 pixels, the others 64x64; set data.size" in message
    assert "torchvision:Food101, image 3" in message


def test_colours_among_grey_images_are_not_lost() -> None:
    items = [(Image.new("L", (8, 8)), 0), (Image.new("RGB", (8, 8)), 1)]
    report = Report()
    assert Items("a", items, grey=True).convert(0, Form(8, 8, 1), report).shape == (8, 8, 1)
    with pytest.raises(DataError, match="it has colours"):
        Items("a", items, grey=True).convert(1, Form(8, 8, 1), report)
    assert Items("a", items).convert(1, Form(8, 8, 1), report).shape == (8, 8, 1)
    assert report.labels == [0, 1]


def test_labels_that_are_no_classes_are_refused() -> None:
    with pytest.raises(DataError, match="its label is no class but of type dict"):
        Items("a", [(Image.new("L", (8, 8)), {"boxes": []})]).item(0)


def test_formats_and_sizes_are_limited_as_in_folders(root: Path) -> None:
    """torchvision opens whatever Pillow can, such as PostScript, which starts Ghostscript."""
    save(root / "eurosat" / "2750" / "a" / "0.png")
    Image.new("RGB", (64, 64)).save(root / "eurosat" / "2750" / "a" / "1.jpg", "EPS")
    message = refusal("EuroSAT", root)
    assert "cannot use torchvision:EuroSAT, image 1: it is no image in a known format" in message
    Image.new("1", (7100, 7100)).save(root / "eurosat" / "2750" / "a" / "1.jpg", "PNG")
    assert "more than 50 megapixels" in refusal("EuroSAT", root)
    with Image.open(root / "eurosat" / "2750" / "a" / "1.jpg") as image:  # Pillow is as it was
        assert image.size == (7100, 7100)
    assert "EPS" in Image.ID


def test_cifar10_is_the_same_by_both_names(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = root / datasets.CIFAR10.base_folder
    base.mkdir(parents=True)
    draws = np.random.default_rng(0)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        rows = draws.integers(0, 256, (4, 3072), dtype=np.uint8)
        (base / name).write_bytes(pickle.dumps({"data": rows, "labels": [0, 1, 2, 3]}))
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    assert load("CIFAR10", root).fingerprint == sources.load("cifar10", str(root)).fingerprint


def test_fashion_mnist_is_framed_by_default_alone(root: Path) -> None:
    written = make_mnist(root, "FashionMNIST")["train"]
    named = sources.load("fashion-mnist", str(root))
    assert named.train_images.shape == (30, 32, 32, 3)
    assert np.array_equal(named.train_images[:, 2:-2, 2:-2, 1], written)
    assert named.notes == ()
    assert sources.load("fashion-mnist", str(root), size=32, channels=3).fingerprint == named.fingerprint
    assert np.array_equal(sources.load("fashion-mnist", str(root), size=28, channels=1).train_images[..., 0], written)
    grey = sources.load("fashion-mnist", str(root), channels=1)
    assert np.array_equal(grey.train_images, named.train_images[..., :1])


@pytest.mark.parametrize("name", SETS)
def test_every_set_takes_its_arguments(name: str, tmp_path: Path) -> None:
    """With values that torchvision knows: what is missing are the files alone."""
    make = getattr(datasets, name)
    downloads = {} if name in ("ImageNet", "FER2013") else {"download": False}
    for options in SETS[name].values():
        with pytest.raises((RuntimeError, FileNotFoundError)):
            make(tmp_path, **options, **downloads)


def test_names_that_are_none_are_refused(root: Path) -> None:
    assert refusal("eurosat", root).endswith("; did you mean torchvision:EuroSAT?")
    assert "there are: Caltech101, " in refusal("Zebra", root)
    assert "'__\\x1b'" in refusal("__\x1b", root)
    with pytest.raises(DataError, match="torchvision:NAME"):
        sources.load("cifar11")


def test_what_cannot_be_downloaded_is_one_line(root: Path) -> None:
    """ImageNet is never downloaded."""
    message = refusal("ImageNet", root)
    assert message.startswith(f"cannot read torchvision:ImageNet under {root}: ")
    assert "\n" not in message
