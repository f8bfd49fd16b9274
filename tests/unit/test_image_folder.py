"""Folders of images: layouts, what is left out, what is refused, and the cache of decoded images."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from study import estimate
from study.create import prepare
from study.training.data import dataset, decoding, sources
from study.training.data.dataset import DataError, Dataset
from study.training.data.split import split_dataset
from tests.support.harness import config_of
from tests.support.users import another_user, open_folder, permissions_count

__all__ = ["open_folder"]


def add(folder: Path, count: int, value: int = 0, kind: str = "png") -> None:
    """`count` images of different grey into a class folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.new("RGB", (32, 32), (value, i, 7)).save(folder / f"{i:03}.{kind}")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with train/ and test/ of two classes."""
    root = tmp_path / "images"
    for part, count in (("train", 4), ("test", 2)):
        add(root / part / "cat", count, 1)
        add(root / part / "dog", count, 2)
    return root


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    cache = tmp_path / "cache"
    monkeypatch.setenv("STUDY_CACHE", str(cache))
    return cache


def load(root: Path, **options: Any) -> Dataset:
    return sources.load("imagefolder", str(root), **options)


def cached(cache: Path) -> list[Path]:
    """The folders of decoded images."""
    return [path for path in cache.glob("imagefolder-*") if path.suffix == ""]


def refusal(root: Path, **options: Any) -> str:
    with pytest.raises(DataError) as error:
        load(root, **options)
    message = str(error.value)
    assert message.isprintable()
    assert len(message) < 2000
    return message


# What is loaded


def test_one_line_names_what_is_loaded_and_left_out(root: Path) -> None:
    (root / "train" / "bird").mkdir()
    (root / "train" / "cat" / "notes.txt").write_text("no image")
    (root / "train" / "dog" / "README").write_text("no image")
    (root / "train" / "dog" / "phone.HEIC").write_bytes(b"no decoder")
    (root / "train" / "labels.csv").write_text("no class")
    (root / "extra").mkdir()
    (root / ".git").mkdir()
    add(root / "train" / "dog", 5, 2)
    assert load(root).notes == (
        f"{root}: train/ 9 images of 2 classes: dog 5, cat 4; test/ 4 images; left out: "
        "2 files that are no images (no ending, .txt), 1 image without a decoder here (.heic), 1 empty class (bird), "
        "1 file outside the class folders, 1 entry beside the splits (extra), 1 hidden or system entry",
    )


def test_many_classes_are_summarised(tmp_path: Path) -> None:
    for i in range(30):
        add(tmp_path / "train" / f"c{i:02}", 1 + (i == 7))
        add(tmp_path / "test" / f"c{i:02}", 1)
    (note,) = load(tmp_path).notes
    assert "31 images of 30 classes: c07 2, c00 1, c01 1," in note
    assert note.endswith(" and 20 more of 1 to 1 images; test/ 30 images")


def test_hidden_and_system_entries_are_no_classes_and_no_images(root: Path) -> None:
    plain = load(root)
    for name in (".ipynb_checkpoints", "@eaDir", "__MACOSX"):
        add(root / "train" / name, 2)
        add(root / "train" / "cat" / name, 2)
    for i in range(3):
        (root / "test" / "dog" / f"._{i:03}.png").write_bytes(b"\0\5\x16\7" + bytes(100))
    (root / "test" / "dog" / "Thumbs.db").write_bytes(b"")
    loaded = load(root)
    assert loaded.classes == ("cat", "dog")
    assert loaded.fingerprint == plain.fingerprint
    assert loaded.notes[0].endswith("; left out: 10 hidden or system entries")


def test_subfolders_of_a_class_are_walked(root: Path) -> None:
    plain = load(root)
    (root / "train" / "cat" / "b" / "deep").mkdir(parents=True)
    (root / "train" / "cat" / "a").mkdir()
    shutil.move(root / "train" / "cat" / "001.png", root / "train" / "cat" / "a" / "001.png")
    shutil.move(root / "train" / "cat" / "002.png", root / "train" / "cat" / "b" / "deep" / "000.png")
    loaded = load(root)
    assert np.bincount(loaded.train_labels).tolist() == [4, 4]
    assert loaded.train_images[:4, 0, 0, 1].tolist() == [0, 3, 1, 2]  # a folder's files, then its subfolders'
    assert sorted(loaded.train_images[:4, 0, 0, 1]) == sorted(plain.train_images[:4, 0, 0, 1])


@pytest.mark.parametrize("kind", ["jfif", "gif", "avif", "JPG", "jpe", "bmp", "webp", "tiff", "pgm"])
def test_endings_of_images(root: Path, kind: str) -> None:
    image = Image.new("L", (32, 32), 99)
    format = {"jfif": "JPEG", "JPG": "JPEG", "jpe": "JPEG", "pgm": "PPM"}.get(kind, kind.upper())
    image.save(root / "train" / "cat" / f"more.{kind}", format)
    loaded = load(root)
    assert np.bincount(loaded.train_labels).tolist() == [5, 4]
    assert abs(int(loaded.train_images[4].mean()) - 99) <= 2


def test_conversions_are_noted_also_from_the_cache(root: Path, cache: Path) -> None:
    Image.new("L", (48, 40), 99).save(root / "train" / "cat" / "large.png")
    first = load(root, size=32)
    assert first.notes[1] == "1 image resized to 32x32 (from 48x40; 1 not square: the centre square is used)"
    assert load(root, size=32).notes == first.notes
    (root / "train" / "cat" / "notes.txt").write_text("new")
    assert "1 file that is no image (.txt)" in load(root, size=32).notes[0]
    assert len(cached(cache)) == 1


# Size and channels


def add_sized(folder: Path, sizes: list[tuple[int, int]]) -> None:
    """Images of random pixels, of these sizes (width, height)."""
    folder.mkdir(parents=True, exist_ok=True)
    draws = np.random.default_rng(0)
    for i, (width, height) in enumerate(sizes):
        Image.fromarray(draws.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"s{i}.png")


def sized(root: Path, size: tuple[int, int]) -> Path:
    """A folder of two classes whose images have one size."""
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            add_sized(root / part / name, [size] * 2)
    return root


@pytest.mark.parametrize("size", [(48, 48), (48, 40), (1, 3)])
def test_images_keep_their_own_size(tmp_path: Path, size: tuple[int, int]) -> None:
    root = sized(tmp_path / "images", size)
    loaded = load(root)
    assert loaded.train_images.shape == (4, size[1], size[0], 3)
    with Image.open(root / "train" / "dog" / "s1.png") as image:
        assert np.array_equal(loaded.train_images[3], np.asarray(image))
    assert len(loaded.notes) == 1


def test_images_are_mapped_not_read(root: Path) -> None:
    for loaded in (load(root), load(root)):  # decoded, and from the cache
        for images in (loaded.train_images, loaded.test_images):
            assert isinstance(images, np.memmap)
            assert not images.flags.writeable


def test_differing_sizes_are_refused_with_a_proposal(tmp_path: Path, cache: Path) -> None:
    root = sized(tmp_path / "images", (500, 400))
    add_sized(root / "test" / "dog", [(500, 400), (500, 400), (300, 301), (30, 30), (31, 31), (32, 33)])
    message = refusal(root)
    assert "5 different sizes (500x400, 300x301, 30x30 and 2 other sizes), and all must have one" in message
    assert "set data.size, for example data.size=224" in message
    assert [path.suffix for path in cache.iterdir()] in ([], [".lock"])
    loaded = load(root, size=20)
    assert loaded.train_images.shape == (4, 20, 20, 3)
    assert loaded.notes[1] == (
        "12 images resized to 20x20 (from 500x400, 300x301, 30x30 and 2 other sizes; "
        "10 not square: the centre square is used)"
    )


def test_the_shorter_side_is_resized_and_the_centre_kept(tmp_path: Path) -> None:
    root = sized(tmp_path / "images", (60, 20))
    add_sized(root / "train" / "dog", [(60, 20), (20, 60)])
    loaded = load(root, size=10)
    for i, (columns, rows) in ((0, (30, 10)), (3, (10, 30))):
        with Image.open(root / "train" / ("cat", "dog")[i // 2] / f"s{i % 2}.png") as image:
            whole = np.asarray(image.resize((columns, rows), Image.Resampling.BILINEAR))
        top, left = (rows - 10) // 2, (columns - 10) // 2
        assert np.array_equal(loaded.train_images[i], whole[top : top + 10, left : left + 10])


def test_the_size_that_the_images_have_changes_nothing(tmp_path: Path, cache: Path) -> None:
    root = sized(tmp_path / "images", (24, 24))
    plain, same, other = load(root), load(root, size=24), load(root, size=12)
    assert same.fingerprint == plain.fingerprint != other.fingerprint
    assert same.notes == plain.notes
    assert len(cached(cache)) == 3


def test_grey_is_the_luma_of_the_colours(tmp_path: Path) -> None:
    root = sized(tmp_path / "images", (16, 16))
    for size in (None, 8):
        loaded = load(root, channels=1, size=size)
        with Image.open(root / "train" / "cat" / "s0.png") as image:
            resized = image.resize((8, 8), Image.Resampling.BILINEAR) if size else image
            assert np.array_equal(loaded.train_images[0, ..., 0], np.asarray(resized.convert("L")))
    assert load(root, channels=3).fingerprint == load(root).fingerprint
    with pytest.raises(DataError, match="must be 1"):
        load(root, channels=4)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["png", "tif", "jpg"])
def test_turned_images_have_the_size_of_the_upright_picture(tmp_path: Path, kind: str, orientation: int) -> None:
    root = sized(tmp_path / "images", (32, 16))
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :8] = 250  # top left
    undo = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_90",
            7: "TRANSVERSE", 8: "ROTATE_270"}  # fmt: skip
    stored = Image.fromarray(upright)
    if orientation > 1:
        stored = stored.transpose(Image.Transpose[undo[orientation]])
    exif = Image.Exif()
    exif[0x112] = orientation
    options: dict[str, Any] = {"quality": 100} if kind == "jpg" else {}
    stored.save(root / "train" / "cat" / f"a.{kind}", exif=exif, **options)
    assert np.abs(load(root).train_images[0].astype(int) - upright)[::4, ::4].max() <= 3
    smaller = load(root, size=8).train_images[0].astype(int)  # of columns 8 to 24: all black but for the resampling
    assert smaller[:, 1:].max() <= 40
    assert smaller[:3, 0].min() > smaller[5:, 0].max()


def test_very_long_images_take_no_memory(tmp_path: Path) -> None:
    """Enlarged as a whole to 224 pixels on its shorter side, this one would take 5 GB."""
    root = sized(tmp_path / "images", (1, 40_000))
    assert load(root, size=224).train_images.shape == (4, 224, 224, 3)


def test_a_disk_without_room_is_one_line_and_nothing_is_left(root: Path, cache: Path) -> None:
    """With the system's own limit on the length of files."""
    program = (
        "import resource, sys; from study.training.data import sources\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try: sources.load('imagefolder', sys.argv[1], size=200)\n"
        "except sources.DataError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(root)], capture_output=True, text=True, check=True)
    assert done.stdout == (
        f"cannot cache decoded images in {cache}: File too large; set STUDY_CACHE to a folder that you can write to\n"
    )
    assert [path.suffix for path in cache.iterdir()] in ([], [".lock"])


# Splits


@pytest.mark.parametrize("name", ["val", "valid", "validation", "Test"])
def test_names_of_the_split_that_measures(root: Path, name: str) -> None:
    plain = load(root)
    (root / "test").rename(root / name)
    loaded = load(root)
    assert loaded.fingerprint == plain.fingerprint
    assert loaded.validation_images is None
    assert (f"{name}/ 4 images (the test split)" in loaded.notes[0]) == (name != "Test")


def test_a_validation_split_beside_the_test_split_validates(root: Path) -> None:
    plain = load(root)
    add(root / "valid" / "cat", 3, 11)
    add(root / "valid" / "dog", 2, 12)
    for loaded in (load(root), load(root)):  # decoded, and from the cache
        assert loaded.fingerprint != plain.fingerprint
        part = split_dataset(loaded, "holdout")
        assert part.validation_images[:, 0, 0, 0].tolist() == [11, 11, 11, 12, 12]
        assert part.validation_labels.tolist() == [0, 0, 0, 1, 1]
        assert len(part.train_labels) == 8
        assert np.array_equal(part.test_images, plain.test_images)
    (root / "val").mkdir()
    assert "two folders for the validation split: val/ and valid/; keep one" in refusal(root)


def test_a_folder_of_classes_is_split(tmp_path: Path) -> None:
    add(tmp_path / "cat", 10, 1)
    add(tmp_path / "dog", 5, 2)
    add(tmp_path / "bird", 2, 3)
    loaded = load(tmp_path)
    assert loaded.classes == ("bird", "cat", "dog")
    assert np.bincount(loaded.test_labels).tolist() == [1, 2, 1]
    assert np.bincount(loaded.train_labels).tolist() == [1, 8, 4]
    images = {image.tobytes() for image in (*loaded.train_images, *loaded.test_images)}
    assert len(images) == 17
    assert loaded.notes == (
        f"{tmp_path}: 17 images of 3 classes: cat 10, dog 5, bird 2; "
        "there is no train/ and test/, so 20% of each class are the test split",
    )
    assert load(tmp_path).fingerprint == loaded.fingerprint
    add(tmp_path / "fish", 1)
    assert "class fish cannot be split with only one image" in refusal(tmp_path)


def test_layouts_that_cannot_be_are_refused(root: Path, tmp_path: Path) -> None:
    assert "no folder" in refusal(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    assert "no folder" in refusal(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert "must hold train/ and test/ (or val/), or one folder of images a class" in refusal(tmp_path / "empty")
    (root / "test").rename(root / "elsewhere")
    assert f"holds train/ alone; name {root}/train to have" in refusal(root)
    (root / "train").rename(root / "test")
    assert "holds test/ without train/" in refusal(root)
    (root / "train" / "cat").mkdir(parents=True)
    (root / "train" / "cat" / "a.heic").write_bytes(b"")
    message = refusal(root)
    assert "no classes with images" in message
    assert "left out: 1 image without a decoder here (.heic), 1 empty class (cat)" in message


def test_classes_that_do_not_match_are_refused_or_noted(root: Path) -> None:
    add(root / "test" / "stranger", 1)
    assert "has classes that" in (message := refusal(root))
    assert "stranger" in message
    shutil.rmtree(root / "test" / "stranger")
    add(root / "train" / "bird", 1)
    assert load(root).notes[1].endswith("test has no images of class bird: accuracies measured on it leave them out")
    shutil.rmtree(root / "train" / "bird")
    shutil.rmtree(root / "test" / "cat")
    assert "test has images of one class alone (dog): at least two" in refusal(root)
    shutil.rmtree(root / "train" / "cat")
    assert "train has images of one class alone (dog): at least two" in refusal(root)


def test_a_launch_logs_the_layout_and_counts_the_validation_split(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    add(root / "val" / "cat", 2)
    add(root / "val" / "dog", 1)
    config = config_of(data={"name": "imagefolder", "train_images": None}, policy={"alpha": [4, 8]})
    caplog.set_level(logging.INFO, "study")
    prepared = prepare(config, str(root))
    assert prepared.sizes == (8, 3, 4)
    assert estimate.trial_loads(config, prepared.sizes)[-1] == estimate.Load(3 * 8, 3 * 3)
    assert any(
        "train/ 8 images of 2 classes: cat 4, dog 4; val/ 3 images; test/ 4 images" in m for m in caplog.messages
    )
    assert any("the 3 images of the data set's own validation split validate" in m for m in caplog.messages)


# Files and folders that cannot be used


def test_damaged_images_are_named(root: Path, cache: Path) -> None:
    (root / "train" / "cat" / "torn.jpg").write_bytes(b"\xff\xd8\xff\xe0 torn")
    (root / "test" / "dog" / "empty.png").write_bytes(b"")
    message = refusal(root)
    assert "cannot use 2 images" in message
    assert "/train/cat/torn.jpg: " in message
    assert "/test/dog/empty.png: it is no image in a known format" in message
    assert [path.suffix for path in cache.iterdir()] in ([], [".lock"])


@pytest.mark.parametrize("place", ["train", "train/cat"])
def test_links_that_lead_nowhere_are_named(root: Path, place: str) -> None:
    (root / place / "loop").symlink_to("loop")
    assert "cannot follow the link" in (message := refusal(root))
    assert f"{place}/loop: Too many levels" in message
    (root / place / "loop").unlink()
    (root / place / "gone.png").symlink_to("nothing")
    assert f"{place}/gone.png: No such file" in refusal(root)


def test_folders_that_are_listed_twice_are_refused(root: Path) -> None:
    """A link to a folder above never ends; two classes of the same images would be no two classes."""
    for target in (".", "..", "../..", "../dog", "../../train/dog"):
        (root / "train" / "cat" / "link").symlink_to(target)
        assert "are the same folder, by a link; remove one" in refusal(root), target
        (root / "train" / "cat" / "link").unlink()


def test_links_to_images_elsewhere_are_followed(root: Path, tmp_path: Path) -> None:
    plain = load(root)
    shutil.move(root / "train" / "cat", tmp_path / "elsewhere")
    (root / "train" / "cat").symlink_to(tmp_path / "elsewhere")
    shutil.move(root / "test" / "dog" / "000.png", tmp_path / "one.png")
    (root / "test" / "dog" / "000.png").symlink_to(tmp_path / "one.png")
    assert load(root).fingerprint == plain.fingerprint


def test_deep_folders_are_walked_without_recursion(root: Path) -> None:
    here = os.getcwd()
    os.chdir(root / "train" / "cat")
    try:
        for _ in range(1200):
            os.mkdir("d")
            os.chdir("d")
        shutil.copy(root / "train" / "dog" / "000.png", ".")
    finally:
        os.chdir(here)
    assert np.bincount(load(root).train_labels).tolist() == [5, 4]
    subprocess.run(["rm", "-r", str(root / "train" / "cat" / "d")], check=True)  # shutil's recursion is too deep


def test_a_pipe_is_no_image(root: Path) -> None:
    os.mkfifo(root / "train" / "cat" / "pipe.png")
    assert "1 file that is no image (.png)" in load(root).notes[0]


def test_an_unreadable_class_folder_is_named(root: Path) -> None:
    (root / "train" / "dog").chmod(0)
    with permissions_count():
        message = refusal(root)
    (root / "train" / "dog").chmod(0o700)
    assert message == f"cannot read the folder {root}/train/dog: Permission denied; make it readable or remove it"


def test_an_unreadable_image_is_named(root: Path) -> None:
    (root / "train" / "cat" / "000.png").chmod(0)
    with permissions_count():
        assert "cat/000.png: Permission denied" in refusal(root)


def test_names_are_shown_without_control_characters(root: Path) -> None:
    name = os.fsencode(root / "train" / "cat") + b"/\x1b]0;owned\x07\xff.png"
    with open(name, "wb") as file:
        file.write(b"no image")
    assert "/\\x1b]0;owned\\x07\\xff.png: it is no image" in refusal(root)
    Image.new("RGB", (32, 32)).save(root / "train" / "cat" / "good.png")
    os.replace(root / "train" / "cat" / "good.png", name)
    assert np.bincount(load(root).train_labels).tolist() == [5, 4]
    for strange in (b"\x1b[31mred", b"\xff\xfe", b"two\nlines", "\u202ereversed".encode()):
        folder = os.fsencode(root / "train") + b"/" + strange
        os.mkdir(folder)
        assert "must be named by text without control characters" in refusal(root)
        os.rmdir(folder)


# The cache


def cache_folder(cache: Path) -> Path:
    (folder,) = cached(cache)
    return folder


@pytest.mark.parametrize(
    "damage", ["empty", "truncated", "flipped", "garbage", "longer", "changed", "gone", "a folder"]
)
@pytest.mark.parametrize("name", ["meta.json", "train_images.npy", "test_labels.npy"])
def test_a_damaged_cache_is_decoded_again(
    root: Path, cache: Path, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    first = load(root)
    folder = cache_folder(cache)
    path = folder / name
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 128
    damaged: dict[str, bytes | bytearray] = {
        "empty": b"", "truncated": content[:-10], "flipped": content, "garbage": bytes(100), "longer": content + b" ]",
        "changed": content.replace(b"c", b"d").replace(b"\1", b"\2"),
    }  # fmt: skip
    path.unlink()
    if damage in damaged:
        path.write_bytes(damaged[damage])
    elif damage == "a folder":
        path.mkdir()
    caplog.set_level(logging.INFO, "study.training.data")
    caplog.clear()
    again = load(root)
    assert np.array_equal(again.train_images, first.train_images)
    assert [message.partition(" (")[0] for message in caplog.messages] == [
        f"the cache folder {folder} is damaged", f"decoding 12 images under {root}",
    ]  # fmt: skip
    caplog.clear()
    assert load(root).fingerprint == first.fingerprint
    assert caplog.messages == []
    assert sorted(path.suffix for path in cache.iterdir()) in (["", ".lock"], [""])


@pytest.mark.parametrize("what", ["an empty folder", "a file", "a link to nothing"])
def test_something_else_in_the_place_of_the_cache_is_replaced(root: Path, cache: Path, what: str) -> None:
    first = load(root)
    folder = cache_folder(cache)
    shutil.rmtree(folder)
    if what == "an empty folder":
        folder.mkdir()
    elif what == "a file":
        folder.write_text("")
    else:
        folder.symlink_to("nothing")
    assert load(root).fingerprint == first.fingerprint
    assert (folder / "meta.json").is_file()


def test_another_decoder_decodes_again(root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(root)
    monkeypatch.setattr(decoding, "DECODER", decoding.DECODER + 1)
    load(root)
    assert len(cached(cache)) == 2


def test_a_killed_process_leaves_nothing_that_counts(root: Path, cache: Path) -> None:
    """It is killed at its first synchronisation, before the file has its name; the next one removes the remnant."""
    program = (
        "import os, signal, sys; from study.training.data import sources\n"
        "os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)\n"
        "sources.load('imagefolder', sys.argv[1])"
    )
    killed = subprocess.run([sys.executable, "-c", program, str(root)])
    assert killed.returncode == -signal.SIGKILL
    assert cached(cache) == []
    assert len(list(cache.glob("*.tmp"))) == 1
    load(root)
    assert sorted(path.suffix for path in cache.iterdir()) in (["", ".lock"], [""])


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_cache_files_have_the_mode_that_the_umask_gives(root: Path, cache: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        load(root)
    finally:
        os.umask(before)
    folder = cache_folder(cache)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o777 & ~umask
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o666 & ~umask}


def test_several_users_share_a_cache(open_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the mode of /tmp: the second user reads what the first has decoded, and decodes what the first has not."""
    cache = open_folder / "cache"
    cache.mkdir()
    cache.chmod(0o1777)
    monkeypatch.setenv("STUDY_CACHE", str(cache))
    for name in ("cat", "dog"):
        add(open_folder / "images" / name, 3)
    load(open_folder / "images")
    first = load(open_folder / "images")
    with another_user():
        assert load(open_folder / "images").fingerprint == first.fingerprint
        with dataset.cache_lock(cache_folder(cache).with_suffix(".lock")):
            pass
    Image.new("RGB", (32, 32)).save(open_folder / "images" / "cat" / "more.png")
    with another_user():
        second = load(open_folder / "images")
    assert len(second.train_labels) + len(second.test_labels) == 7
    assert load(open_folder / "images").fingerprint == second.fingerprint
    assert len(cached(cache)) == 2


def test_a_cache_that_can_only_be_read_is_read(root: Path, cache: Path) -> None:
    first = load(root)
    for lock in cache.glob("*.lock"):
        lock.unlink()
    cache.chmod(0o555)
    with permissions_count():
        assert load(root).fingerprint == first.fingerprint
    add(root / "train" / "cat", 5)
    with permissions_count():
        message = refusal(root)
    cache.chmod(0o755)
    assert message == (
        f"cannot cache decoded images in {cache}: Permission denied; set STUDY_CACHE to a folder that you can write to"
    )


def test_a_cache_that_is_no_folder(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    for place in ("file", "file/below"):
        monkeypatch.setenv("STUDY_CACHE", str(tmp_path / place))
        assert "set STUDY_CACHE to a folder that you can write to" in refusal(root)


def test_no_home_folder_is_one_clear_line(root: Path) -> None:
    """As a user that the system does not know: what needs the cache is refused, what does not need it works."""
    program = (
        "import os, sys; from study import estimate; from study.training.data import dataset, sources\n"
        "from tests.support.harness import config_of\n"
        "import platformdirs\n"
        "sources.load('digits')\n"
        "if os.geteuid() == 0:\n"
        "    os.setuid(54321)\n"
        "    assert estimate.recall(config_of(), 'cpu') is None\n"
        "    estimate.remember(config_of(), 'cpu', estimate.Pace(1, 1, 'a', 'b'))\n"
        "    try: dataset.cache_dir()\n"
        "    except dataset.DataError as error: print(error)\n"
        "try: sources.load('cifar10', '~nobody-of-that-name/images')\n"
        "except dataset.DataError as error: print(error)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("HOME", "STUDY_CACHE") and not k.startswith("XDG")}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if os.geteuid() == 0:
        assert done.stdout.splitlines()[0] == (
            "there is no home folder for the cache: set STUDY_CACHE to a folder that you can write to"
        )
    assert done.stdout.splitlines()[-1].startswith("--data-root ~nobody-of-that-name/images: ")


def test_a_pace_that_cannot_be_stored_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("STUDY_CACHE", str(tmp_path / "file"))
    estimate.remember(config_of(), "cpu", estimate.Pace(1.0, 1.0, "cpu", "today"))
    assert "is not kept" in caplog.text
