"""Data sets of own load functions, and data sets in other sizes and channels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from study.training.data import sources
from study.training.data.array_cache import create
from study.training.data.dataset import DataError, Dataset

LABELS = np.array([0, 1, 1, 0, 2])


def images(count: int = 5, shape: tuple[int, ...] = (6, 4, 5)) -> Any:
    return np.random.default_rng(count).integers(0, 256, (count, *shape), dtype=np.uint8)


def dataset(**changed: Any) -> Dataset:
    whole = Dataset(images(), LABELS, images(3), LABELS[:3], ("a", "b", "c"))
    return replace(whole, **changed)


def load(returned: Any, **options: Any) -> Dataset:
    return sources.load("my:load", make=lambda: returned, **options)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STUDY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_what_an_own_function_returns_is_taken_as_it_is(cache: Path) -> None:
    own = dataset(notes=("from a\x1bfile",))
    loaded = load(own)
    assert loaded.train_images is own.train_images
    assert loaded.fingerprint == own.fingerprint
    assert loaded.notes == ("from a\\x1bfile",)
    assert not cache.exists()
    small = load(dataset(train_labels=LABELS.astype(np.uint8), classes=["a", "b", "c"]))
    assert small.train_labels.dtype == np.int64
    assert small.classes == ("a", "b", "c")
    assert small.fingerprint == own.fingerprint


@pytest.mark.parametrize("shape", [(7,), (3, 2), (8, 8, 3), (1, 2, 3, 4)])
def test_features_of_any_shape(shape: tuple[int, ...]) -> None:
    features = np.zeros((5, *shape), np.float32)
    own = dataset(train_images=features, test_images=features[:3])
    assert load(own).train_images is features


def test_mapped_files_are_not_read_into_memory(tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", images())
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    assert load(dataset(train_images=mapped)).train_images is mapped


NAN = np.zeros((5, 2), np.float32)
NAN[3, 1] = np.nan
FEATURES = np.zeros((3, 2), np.float32)
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "list": ({"train_images": [[1]]}, "train_images must be a numpy array, got list: use numpy.asarray"),
    "float64": ({"train_images": np.zeros((5, 2))}, "must be uint8 or float32, got float64"),
    "no channels": ({"train_images": images(5, (6, 4))}, "got (5, 6, 4): add the channels with images[..., None]"),
    "flat bytes": ({"test_images": images(3, (6,))}, "test_images of uint8 must have the shape [N, height, width"),
    "one dimension": ({"train_images": np.zeros(5, np.float32)}, "must have the shape [N, features...], got (5,)"),
    "nan": ({"train_images": NAN, "test_images": FEATURES}, "must be finite, got NaN or infinity in row 3"),
    "infinity": ({"train_images": NAN[:3], "test_images": FEATURES - np.inf, "train_labels": LABELS[:3]}, "in row 0"),
    "empty": ({"test_images": images(0), "test_labels": LABELS[:0]}, "test_images must not be empty"),
    "no pixels": ({"test_images": images(3, (0, 4, 5))}, "test_images must not be empty, got the shape (3, 0, 4, 5)"),
    "float labels": ({"train_labels": LABELS / 1}, "train_labels must be integers, got float64"),
    "boolean labels": ({"train_labels": LABELS > 0}, "train_labels must be integers, got bool"),
    "one-hot labels": ({"train_labels": np.eye(5, dtype=np.int64)}, "use labels.reshape(-1) or .argmax(1)"),
    "label too large": ({"train_labels": LABELS + 1}, "must be from 0 to 2, an index in classes, got 1 to 3"),
    "negative label": ({"test_labels": LABELS[:3] - 1}, "an index in classes, got -1 to 0"),
    "huge label": ({"train_labels": LABELS.astype(np.uint64) + np.uint64(2**63)}, "an index in classes"),
    "list of labels": ({"train_labels": [0] * 5}, "train_labels must be a numpy array, got list"),
    "lengths": ({"train_labels": LABELS[:4]}, "train_images and train_labels must have one length, got 5 and 4"),
    "shapes": ({"test_images": images(3, (6, 4, 3))}, "got uint8 (6, 4, 5) in train and uint8 (6, 4, 3) in test"),
    "dtypes": ({"test_images": np.zeros((3, 6, 4, 5), np.float32)}, "and float32 (6, 4, 5) in test"),
    "half a split": ({"validation_images": images(3)}, "must both be given or both be None"),
    "validation": (
        {"validation_images": images(3), "validation_labels": LABELS[:2]},
        "validation_labels must have one",
    ),
    "numbers as classes": ({"classes": (1, 2, 3)}, "use tuple(map(str, names))"),
    "a string as classes": ({"classes": "abc"}, "classes must be a tuple of strings"),
    "one class": ({"classes": ("a",), "train_labels": LABELS * 0, "test_labels": LABELS[:3] * 0}, "at least two"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_breaks_a_rule_is_refused(case: str) -> None:
    changed, message = REFUSED[case]
    with pytest.raises(DataError) as error:
        load(dataset(**changed))
    assert str(error.value).startswith("my:load: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_all_broken_rules_are_named_at_once() -> None:
    with pytest.raises(DataError) as error:
        load(dataset(train_images=[1], test_labels=LABELS, classes=()))
    for part in ("train_images must be", "test_images and test_labels must have one length", "at least two classes"):
        assert part in str(error.value)


def test_other_things_and_exceptions_are_one_line() -> None:
    with pytest.raises(DataError, match=r"^my:load must return a study\.training\.data\.dataset\.Dataset, got tuple$"):
        load((images(), LABELS))

    def fails() -> Dataset:
        raise ValueError("no\nfile")

    with pytest.raises(DataError, match=r"^my:load raised ValueError: no\\nfile$") as error:
        sources.load("my:load", make=fails)
    assert isinstance(error.value.__cause__, ValueError)


def test_own_images_are_resized_with_any_number_of_channels() -> None:
    """Each channel as Pillow resizes it alone, and of the 12 rows of 8 columns then those in the middle."""
    own = dataset()
    loaded = load(own, size=8)
    assert loaded.train_images.shape == (5, 8, 8, 5)
    assert loaded.notes == ("8 images resized to 8x8 (from 4x6; 8 not square: the centre square is used)",)
    plane = Image.fromarray(own.train_images[2, ..., 3].copy()).resize((8, 12), Image.Resampling.BILINEAR)
    assert np.array_equal(loaded.train_images[2, ..., 3], np.asarray(plane)[2:10])
    assert np.array_equal(loaded.test_labels, own.test_labels)
    assert load(own, size=8).fingerprint == loaded.fingerprint


def test_own_channels() -> None:
    own = dataset()
    assert load(own, channels=5).train_images is own.train_images
    with pytest.raises(DataError, match=r"5 channels cannot become 3: leave data\.channels out, or set it to 5"):
        load(own, channels=3)
    for channels in (0, -1):
        with pytest.raises(DataError, match=r"data\.channels"):
            load(own, channels=channels)
    features = dataset(train_images=NAN[:, :1], test_images=FEATURES[:, :1])
    for options in ({"size": 8}, {"channels": 1}):
        with pytest.raises(DataError, match="are for uint8 images, and the data set is float32"):
            load(features, **options)


def test_an_own_validation_split_is_converted_too() -> None:
    own = dataset(train_images=images(5, (4, 4, 1)), test_images=images(3, (4, 4, 1)),
                  validation_images=images(2, (4, 4, 1)), validation_labels=LABELS[:2])  # fmt: skip
    loaded = load(own, channels=3)
    assert own.validation_images is not None
    assert loaded.validation_images is not None
    assert loaded.validation_labels is not None
    assert np.array_equal(loaded.validation_images, np.repeat(own.validation_images, 3, axis=3))
    assert loaded.validation_labels.tolist() == [0, 1]
    assert loaded.notes == ()


def test_the_guides_example_is_a_data_set() -> None:
    guide = (Path(__file__).parents[2] / "docs" / "guides" / "own-data.md").read_text(encoding="utf-8")
    code: dict[str, Any] = {}
    exec(guide.partition("```python\n")[2].partition("```")[0], code)
    loaded = sources.load("my_module:load", make=code["load"])
    assert loaded.train_images.shape == (500, 48, 48, 1)
    assert len(loaded.test_labels) == 100


# Named data sets


@pytest.mark.parametrize("options", [{}, {"size": 32}, {"channels": 3}, {"size": 32, "channels": 3}])
def test_named_sets_are_as_they_were_by_default(options: dict[str, int], cache: Path) -> None:
    digits = sources.load("digits", **options)  # type: ignore[arg-type]
    assert digits.fingerprint == "f5b89c37eda2e6a4853c2c1616b14bed594509afd2e69bd73e6fb75f1c98831d"
    assert digits.notes == ()
    assert not cache.exists()


def test_digits_of_other_sizes_come_from_their_own_pixels() -> None:
    plain = sources.load("digits")
    assert np.array_equal(sources.load("digits", size=8).train_images, plain.train_images[:, ::4, ::4])
    grey = sources.load("digits", channels=1)
    assert np.array_equal(grey.train_images, plain.train_images[..., :1])
    assert grey.notes == ()
    assert grey.classes == plain.classes
    large = sources.load("digits", size=64, channels=1)
    assert large.train_images.shape == (1438, 64, 64, 1)
    assert large.notes == ("1,797 images resized to 64x64 (from 8x8)",)


def test_sizes_and_channels_that_cannot_be_are_refused() -> None:
    for size in (0, -3, 7072, 10**9):
        with pytest.raises(DataError, match=r"data\.size must be from 1 to 7071 pixels"):
            sources.load("digits", size=size)
    for channels in (0, 2, 4):
        with pytest.raises(DataError, match=r"must be 1 \(grey\) or 3"):
            sources.load("digits", channels=channels)


def test_images_that_do_not_fit_on_the_disk_are_refused_before_they_are_decoded(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"1,000,000 images of 7000x7000x3 take 147,000\.0 GB in .* are free: make"):
        create(tmp_path, {"a_images": (600_000, 7000, 7000, 3), "b_images": (400_000, 7000, 7000, 3)})
    assert list(tmp_path.iterdir()) == []
