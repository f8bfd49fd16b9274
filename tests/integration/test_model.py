"""A study's model: kept as it was at its best epoch, loaded by whom it may be, and used on pictures."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
import torch
from PIL import Image
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import nn

import study
from storage import artifacts
from storage.errors import UserError
from storage.optuna_internals import study_id_of
from storage.schema import ARTIFACTS
from study import model_file
from study.cli import app
from study.config import extensions
from study.config.loading import load_config
from study.evaluation import evaluate
from study.exit_codes import BAD_INPUT, OK
from study.model import TrainedModel, load_model, read_model
from study.training.data.dataset import DataError
from study.training.data.placement import HostImages
from tests.support import own_code
from tests.support.harness import Harness, StopAfter, config_of, scripted_accuracies

CODE = Path(own_code.__file__).parent
COLOURS = {"blue sky": (40, 90, 220), "grass": (50, 180, 60), "lava": (230, 70, 30)}
ONE_TRIAL: dict[str, Any] = {"policy": {"alpha": 60, "beta": 0.5}, "training": {"epochs": 3, "batch_size": 25}}


@pytest.fixture(autouse=True)
def _code_is_allowed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(extensions.VARIABLE, str(CODE))
    path = list(sys.path)
    yield
    sys.path[:] = path


def make_pictures(folder: Path, count: int, seed: int) -> Path:
    """Noisy colours of 48 x 40 pixels, one folder a class."""
    draws = np.random.default_rng(seed)
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = draws.normal(colour, 40, (40, 48, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


class Trained:
    """A study on a folder of pictures that are resized, with its models."""

    def __init__(self, folder: Path) -> None:
        self.url = f"sqlite:///{folder / 'study.db'}"
        self.pictures = make_pictures(folder / "pictures", 40, 0)
        config = config_of(
            data={"name": "imagefolder", "size": 32, "train_images": None},
            policy={"alpha": 60, "beta": [0.3, 0.6]},
            artifacts={"keep": "all"},
        )
        self.harness = Harness(self.url, config, "colours", str(self.pictures))
        self.harness.work()
        self.values = [trial.values[0] for trial in self.harness.study.trials]
        self.best = max(range(2), key=lambda number: (self.values[number], -number))

    def command(self, *words: str) -> int:
        return app._run([words[0], *words[1:], "--storage", self.url])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(tmp_path_factory.mktemp("trained"))


@pytest.fixture
def content(trained: Trained) -> bytes:
    return read_model("colours", trained.url, None)[0]


# What is kept


@pytest.mark.parametrize(
    "part",
    [
        {},
        {"data": {"channels": 1}},
        {"network": {"name": "own_code:make", "arguments": {"dropout": 0.4, "hidden": 12}}},
        {"network": {"name": "torchvision:mobilenet_v3_small"}},
        {"training": {**ONE_TRIAL["training"], "ema": 0.9}},
        {"data": {"name": "own_code:table", "train_images": None}, "network": {"name": "own_code:mlp"}},
    ],
    ids=["paper", "grey", "own network", "torchvision", "average", "table"],
)
def test_the_model_is_the_network_of_the_best_epoch(part: dict[str, Any], sqlite_url: str) -> None:
    """Epoch 2 of 3 is the best by decree: its weights are kept, and score what the epoch had scored."""
    harness = Harness(sqlite_url, config_of(**ONE_TRIAL | part))
    weights: list[dict[str, torch.Tensor]] = []

    def decreed(trainer: Any) -> float:
        validated = trainer.evaluated.state_dict()
        weights.append({name: tensor.clone() for name, tensor in validated.items()})
        return [0.2, 0.6, 0.4][len(trainer.history)]

    with scripted_accuracies(decreed):
        harness.work()
    model = load_model("s", sqlite_url, device="cpu")
    assert (model.description.epoch, model.description.value) == (2, 0.6)
    state = model.network.state_dict()
    assert state.keys() == weights[1].keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in weights[1].items())
    assert not model.network.training
    images = harness.data.validation_images
    assert isinstance(images, torch.Tensor)
    with torch.no_grad():
        inputs = ((images - harness.data.mean) / harness.data.std).to(torch.float32)
        batch = inputs.permute(0, 3, 1, 2) if inputs.ndim == 4 else inputs
        with torch.autocast("cpu", torch.bfloat16, enabled=model.description.precision == "bf16"):
            expected = model.network(batch).float().softmax(1)
    assert np.allclose(model.predict(images.numpy()).probabilities, expected.numpy(), atol=1e-6)


def test_its_accuracy_is_the_one_that_was_recorded(trained: Trained) -> None:
    """The same images, the same weights, the same arithmetic."""
    data = trained.harness.data
    assert isinstance(data.validation_images, torch.Tensor)
    for number, value in enumerate(trained.values):
        model = load_model("colours", trained.url, number, device="cpu")
        said = model.predict(data.validation_images.numpy()).labels
        assert float((said == data.validation_labels.numpy()).mean()) == value == model.description.accuracy


def test_it_says_where_it_comes_from(trained: Trained) -> None:
    description = load_model("colours", trained.url, device="cpu").description
    attributes = trained.harness.study.user_attrs
    assert description.classes == tuple(COLOURS)
    assert description.classes == tuple(attributes["classes"])
    assert (description.shape, description.dtype) == ((32, 32, 3), "uint8")
    assert np.allclose(description.mean, trained.harness.data.mean.numpy())
    assert (description.study, description.trial) == ("colours", trained.best)
    assert description.config == attributes["config"]
    assert description.data_fingerprint == attributes["data_fingerprint"]
    assert description.parameters["alpha"] == 60
    assert description.parameters["beta"] == [0.3, 0.6][trained.best]
    assert {"study", "torch", "optuna"} <= description.versions.keys()


def test_its_value_is_the_metrics(sqlite_url: str) -> None:
    harness = Harness(sqlite_url, config_of(**ONE_TRIAL, search={"metric": "macro_f1"}))
    harness.work()
    description = load_model("s", sqlite_url, device="cpu").description
    assert (description.metric, description.value) == ("macro_f1", harness.study.trials[0].values[0])


def test_a_resumed_trial_leaves_the_same_model(sqlite_url: str) -> None:
    config = config_of(**ONE_TRIAL, checkpoint={"every_seconds": 0})
    for name in ("whole", "killed"):
        harness = Harness(sqlite_url, config, name)
        if name == "killed":
            harness.work(StopAfter(5))
        harness.work()
    whole, killed = (load_tensors(read_model(name, sqlite_url, None)[0]) for name in ("whole", "killed"))
    assert all(torch.equal(killed[name], tensor) for name, tensor in whole.items())


def test_pruned_and_failed_trials_leave_none(sqlite_url: str) -> None:
    pruning = {"kind": "median", "n_startup_trials": 1}
    trainers: list[Any] = []

    def seen(trainer: Any) -> bool:
        """Whether it is not the first trial's."""
        trainers.extend([trainer] if trainer not in trainers else [])
        return trainers[0] is not trainer

    harness = Harness(sqlite_url, config_of(policy={"alpha": 60}, pruning=pruning, artifacts={"keep": "all"}))
    with scripted_accuracies(lambda trainer: 0.1 if seen(trainer) else 0.5):
        harness.work()
    states = [trial.state.name for trial in harness.study.trials]
    assert states == ["COMPLETE", "PRUNED"]
    kept = artifacts.stored(harness.storage.engine, study_id_of(harness.study))
    assert [model.trial for model in kept] == [0]


def test_a_study_may_keep_none(sqlite_url: str) -> None:
    harness = Harness(sqlite_url, config_of(**ONE_TRIAL, artifacts={"keep": "none"}))
    with pytest.raises(UserError, match=r"artifacts\.keep is none"):
        load_model("s", sqlite_url)
    harness.work()
    assert artifacts.stored(harness.storage.engine, study_id_of(harness.study)) == []


def test_a_store_that_refuses_does_not_undo_a_finished_trial(sqlite_url: str, tmp_path: Path) -> None:
    store = tmp_path / "store"
    harness = Harness(sqlite_url, config_of(**ONE_TRIAL, artifacts={"store": str(store)}))
    store.rmdir()
    store.write_text("no folder any more")
    harness.work()
    assert [trial.state.name for trial in harness.study.trials] == ["COMPLETE"]
    assert any("trial 0: its model is not kept" in line for line in harness.messages)
    with pytest.raises(UserError, match="has no model"):
        load_model("s", sqlite_url)


def test_who_gets_another_than_the_best_is_warned(sqlite_url: str, caplog: pytest.LogCaptureFixture) -> None:
    """As where the store refused the best one."""
    values = iter([0.9, 0.5])
    harness = Harness(sqlite_url, config_of(policy={"alpha": 60}, training={"epochs": 1}, artifacts={"keep": "all"}))
    with scripted_accuracies(lambda _: next(values)):
        harness.work()
    with harness.storage.engine.begin() as connection:
        connection.execute(sa.delete(ARTIFACTS).where(ARTIFACTS.c.trial_id == 1))
    assert load_model("s", sqlite_url, device="cpu").description.trial == 1
    assert "the best trial of 's' is 0 (0.9000), and its model was not kept: this is trial 1 (0.5000)" in caplog.text


def test_models_go_to_the_studys_store(sqlite_url: str, tmp_path: Path) -> None:
    harness = Harness(sqlite_url, config_of(**ONE_TRIAL, artifacts={"store": str(tmp_path / "store")}))
    harness.work()
    (file,) = (tmp_path / "store").iterdir()
    assert file.suffix == ".safetensors"
    assert load_model(file, device="cpu").description == load_model("s", sqlite_url, device="cpu").description


# Who may load it


def changed(content: bytes, **fields: Any) -> bytes:
    """The file with another description and the same tensors."""
    description = json.loads(_metadata(content)[model_file.KEY]) | fields
    return save_tensors(load_tensors(content), {model_file.KEY: json.dumps(description)})


def _metadata(content: bytes) -> dict[str, str]:
    length = int.from_bytes(content[:8], "little")
    metadata: dict[str, str] = json.loads(content[8 : 8 + length])["__metadata__"]
    return metadata


def with_tensors(content: bytes, change: Callable[[dict[str, torch.Tensor]], object]) -> bytes:
    tensors = load_tensors(content)
    change(tensors)
    return save_tensors(tensors, _metadata(content))


FAULTS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda c: b"", "no safetensors file"),
    "pickle": (lambda c: b"\x80\x04\x95" + c, "no safetensors file"),
    "cut off": (lambda c: c[:-100], "cannot use the model"),
    "an endless header": (lambda c: (2**62).to_bytes(8, "little") + c[8:], "no safetensors file"),
    "another program's": (lambda c: save_tensors({"a": torch.zeros(1)}), "no description"),
    "nested": (lambda c: _with_text(c, "[" * 100_000), "cannot use the model"),
    "no JSON": (lambda c: _with_text(c, "{"), "cannot use the model"),
    "of a later version": (lambda c: changed(c, format=2), "of another version"),
    "an unknown key": (lambda c: changed(c, more=1), "more"),
    "no classes": (lambda c: changed(c, classes=[]), "classes"),
    "the same class twice": (lambda c: changed(c, classes=["a", "a", "b"]), "the same name"),
    "another number of classes": (lambda c: changed(c, classes=["a", "b"]), "head"),
    "an endless shape": (lambda c: changed(c, shape=[10**9, 32, 3]), "shape"),
    "another number of channels": (lambda c: changed(c, shape=[32, 32, 1], mean=[1], std=[1]), "features.0.weight"),
    "no deviation": (lambda c: changed(c, std=[1, 0, 1]), "std"),
    "not a number": (lambda c: _with_text(c, '{"format": 1, "mean": [NaN]}'), "description is wrong"),
    "a wider network": (lambda c: changed(c, arguments={"width": 0.25, "norm": "batch"}), "in the network"),
    "a network beyond the memory": (lambda c: changed(c, arguments={"width": 1e4, "norm": "batch"}), "in the network"),
    "an argument that is none": (lambda c: changed(c, arguments={"depth": 3}), "depth"),
    "another network": (lambda c: changed(c, network="torchvision:resnet18", arguments={}), "not those of its network"),
    "an unknown network": (lambda c: changed(c, network="torchvision:os", arguments={}), "no classification network"),
    "a network that is a path": (lambda c: changed(c, network="/etc/passwd"), "cannot use the model"),
    "a tensor too few": (lambda c: with_tensors(c, lambda t: t.pop("head.0.bias")), "not those of its network"),
    "a tensor too many": (
        lambda c: with_tensors(c, lambda t: t.update(more=torch.zeros(1))),
        "not those of its network",
    ),
    "another type": (
        lambda c: with_tensors(c, lambda t: t.update({"head.0.bias": t["head.0.bias"].double()})),
        "float64",
    ),
    "weights that are no numbers": (
        lambda c: with_tensors(c, lambda t: t["head.0.bias"].fill_(torch.nan)),
        "not finite",
    ),
}


def _with_text(content: bytes, text: str) -> bytes:
    return save_tensors(load_tensors(content), {model_file.KEY: text})


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_is_no_model_is_refused_in_one_line(content: bytes, tmp_path: Path, fault: str) -> None:
    change, reason = FAULTS[fault]
    file = tmp_path / "model.safetensors"
    file.write_bytes(change(content))
    with pytest.raises(UserError, match=reason) as refused:
        load_model(file, device="cpu")
    assert len(str(refused.value)) < 1000
    assert "\n" not in str(refused.value)


def test_a_damaged_file_is_refused_or_a_model(content: bytes, tmp_path: Path) -> None:
    """Every byte of the header, and some of the weights, changed one at a time."""
    draws = np.random.default_rng(0)
    length = 8 + int.from_bytes(content[:8], "little")
    places = [*draws.integers(0, length, 150).tolist(), *draws.integers(length, len(content), 10).tolist()]
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= int(draws.integers(1, 256))
        try:
            network, _ = model_file.from_bytes(bytes(damaged), "it")
        except UserError:
            continue
        assert isinstance(network, nn.Module)


def test_own_code_runs_only_where_it_is_allowed_and_as_it_was(
    sqlite_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Harness(sqlite_url, config_of(**ONE_TRIAL, network={"name": "own_code:make"})).work()
    content, _ = read_model("s", sqlite_url, None)
    file = tmp_path / "own.safetensors"
    file.write_bytes(content)
    assert load_model(file).classes == tuple("0123456789")
    file.write_bytes(changed(content, code_sha256="0" * 64))
    with pytest.raises(UserError, match=r"is not the one that it was trained with"):
        load_model(file)
    monkeypatch.delenv(extensions.VARIABLE)
    with pytest.raises(UserError, match="allow the folder that holds it with --code"):
        load_model(file)
    file.write_bytes(changed(content, network="os:system", arguments={"command": "touch /tmp/x"}))
    with pytest.raises(UserError, match="in no allowed folder"):
        load_model(file)


def test_what_is_not_there(trained: Trained, tmp_path: Path) -> None:
    for source, trial, reason in (
        ("nothing", None, "no study 'nothing'"),
        ("colours", 7, "the model of trial 7 of 'colours' is not kept; kept are those of"),
        ("none.safetensors", None, "no model file"),
        (str(tmp_path / "a.safetensors"), 3, "leave trial 3 out"),
    ):
        with pytest.raises(UserError, match=reason):
            load_model(source, trained.url, trial)
    (tmp_path / "pipe.safetensors").mkdir()
    with pytest.raises(UserError, match="no model file"):
        load_model(tmp_path / "pipe.safetensors")
    with pytest.raises(UserError, match="a device is"):
        load_model("colours", trained.url, device="tpu")


# In Python


def test_paths_and_arrays_give_the_same(trained: Trained) -> None:
    """A picture is decoded as those of the training folder were: the study's own images come out, bit for bit."""
    model = study.load_model("colours", trained.url, device="cpu")
    files = sorted(trained.pictures.glob("*/*.png"))[:10]
    decoded = np.stack([model.decode(file) for file in files])
    images = trained.harness.data.train_images
    assert isinstance(images, torch.Tensor)
    assert isinstance(images, HostImages) is False
    stored = {image.tobytes() for image in images.numpy()}
    stored |= {image.tobytes() for image in np.asarray(trained.harness.data.validation_images)}
    assert sum(image.tobytes() in stored for image in decoded) >= 6  # the rest is the test split
    by_path, by_array = model.predict(files), model.predict(decoded)
    assert np.array_equal(by_path.probabilities, by_array.probabilities)
    assert by_path.names == [model.classes[label] for label in by_path.labels]
    assert np.allclose(by_path.probabilities.sum(1), 1)
    assert np.array_equal(by_path.confidences, by_path.probabilities.max(1))
    assert model.predict([]).probabilities.shape == (0, 3)


def test_inputs_of_another_kind_are_refused(trained: Trained, sqlite_url: str) -> None:
    model = load_model("colours", trained.url, device="cpu")
    with pytest.raises(DataError, match=r"uint8 of shape \[N, 32, 32, 3\], got float32"):
        model.predict(np.zeros((1, 32, 32, 3), np.float32))
    with pytest.raises(DataError, match="got uint8 of shape"):
        model.predict(np.zeros((32, 32, 3), np.uint8))
    with pytest.raises(DataError, match="a list of paths"):
        model.predict("picture.png")
    part = {"data": {"name": "own_code:table", "train_images": None}, "network": {"name": "own_code:mlp"}}
    Harness(sqlite_url, config_of(**ONE_TRIAL | part)).work()
    of_rows = load_model("s", sqlite_url, device="cpu")
    assert of_rows.predict(np.zeros((2, 5), np.float32)).probabilities.shape == (2, 2)
    with pytest.raises(UserError, match="not on pictures"):
        of_rows.predict(["picture.png"])


# The verbs


def test_model_writes_a_file_once(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert trained.command("model", "colours") == OK
    file = Path(f"colours-trial-{trained.best}.safetensors")
    written = file.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    shown = capsys.readouterr().out
    assert f"validation accuracy {trained.values[trained.best]:.4f}" in shown
    assert "3 classes: blue sky, grass, lava" in shown
    snippet = [line for line in shown.splitlines() if "model" in line and ("=" in line or "import" in line)]
    scope: dict[str, Any] = {}
    exec("\n".join(snippet), scope)
    assert isinstance(scope["model"], TrainedModel)
    assert trained.command("model", "colours") == BAD_INPUT
    assert "is there already; name another with --output, or replace it with --force" in capsys.readouterr().err
    file.write_text("mine")
    assert trained.command("model", "colours", "--force", "--trial", str(trained.best)) == OK
    assert file.read_bytes() == written
    assert trained.command("model", "colours", "--output", "nowhere/a.safetensors") == BAD_INPUT
    assert "cannot write nowhere/a.safetensors" in capsys.readouterr().err
    assert app._run(["model", str(file)]) == OK  # what a file is
    assert "colours" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_the_winner_as_a_config_gives_the_same_trial_again(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert trained.command("model", "colours", "--toml") == OK
    text = capsys.readouterr().out
    assert text.startswith(
        f"# Trial {trained.best} of the study 'colours': accuracy {trained.values[trained.best]:.4f}"
    )
    (tmp_path / "again.toml").write_text(text)
    config = load_config(str(tmp_path / "again.toml"))
    assert not config.searched()
    again = Harness(f"sqlite:///{tmp_path / 'again.db'}", config, "again", str(trained.pictures))
    again.work()
    assert [trial.values[0] for trial in again.study.trials] == [trained.values[trained.best]]
    (tmp_path / "best.safetensors").write_bytes(read_model("colours", trained.url, None)[0])
    assert app._run(["model", str(tmp_path / "best.safetensors"), "--toml"]) == OK
    assert tomllib.loads(capsys.readouterr().out) == tomllib.loads(text)
    assert trained.command("model", "colours", "--toml", "--trial", "9") == BAD_INPUT
    assert trained.command("model", "colours", "--toml", "--onnx") == BAD_INPUT


def test_predict_lists_pictures_and_names_those_it_cannot_use(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_pictures(tmp_path / "new", 2, 1)
    assert trained.command("predict", "colours", str(folder)) == OK
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert all(line.startswith(str(folder)) and " % " in line for line in lines)
    assert trained.command("predict", "colours", "--csv", str(folder / "grass"), str(folder / "lava" / "0.png")) == OK
    rows = list(csv.reader(io.StringIO(capsys.readouterr().out)))
    assert rows[0] == ["file", "class", "probability"]
    said = load_model("colours", trained.url, device="cpu").predict([row[0] for row in rows[1:]])
    assert [row[1] for row in rows[1:]] == said.names
    assert np.allclose([float(row[2]) for row in rows[1:]], said.confidences, rtol=1e-5)
    (folder / "broken.png").write_bytes(b"no picture")
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "0.png").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("no picture either")
    assert trained.command("predict", "colours", str(folder)) == BAD_INPUT
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 6
    assert "1 of 7 pictures could not be used" in captured.err
    assert len([line for line in captured.err.splitlines() if "broken.png: it is no image" in line]) == 1
    (tmp_path / "empty").mkdir()
    assert trained.command("predict", "colours", str(tmp_path / "empty")) == BAD_INPUT
    assert trained.command("predict", "colours", str(tmp_path / "nowhere")) == BAD_INPUT


def test_evaluate_counts_what_the_model_says(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_pictures(tmp_path / "other", 6, 2)
    for file in (other / "lava").glob("[345].png"):
        file.unlink()
    (other / "grass" / "0.png").replace(other / "lava" / "green.png")  # wrong on purpose
    model = load_model("colours", trained.url, device="cpu")
    evaluation = evaluate(model, str(other))
    said = {name: model.predict(sorted((other / name).iterdir())).names for name in COLOURS}
    expected = [[said[of].count(called) for called in COLOURS] for of in COLOURS]
    assert evaluation.confusion.tolist() == expected
    assert evaluation.counts.tolist() == [6, 5, 4]
    recalls = [expected[i][i] / sum(expected[i]) for i in range(3)]
    assert evaluation.accuracy == sum(expected[i][i] for i in range(3)) / 15
    assert np.isclose(evaluation.balanced_accuracy, np.mean(recalls))
    f1 = [2 * expected[i][i] / (sum(expected[i]) + sum(row[i] for row in expected)) for i in range(3)]
    assert np.isclose(evaluation.macro_f1, np.mean(f1))
    low, high = evaluation.interval
    assert 0 <= low <= evaluation.accuracy <= high <= 1
    assert trained.command("evaluate", "colours", "--data-root", str(other)) == OK
    shown = capsys.readouterr().out
    assert f"({evaluation.correct} of 15; 95 % interval {100 * low:.2f} to {100 * high:.2f} %, binomial)" in shown
    assert trained.command("evaluate", "colours", "--data-root", str(other), "--csv") == OK
    rows = list(csv.reader(io.StringIO(capsys.readouterr().out)))
    assert rows[0] == ["class", "pictures", "recall", "precision", "f1", *(f"called {name}" for name in COLOURS)]
    assert [[int(cell) for cell in row[5:]] for row in rows[1:]] == expected


def test_evaluate_wants_the_models_classes(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_pictures(tmp_path / "other", 2, 3)
    for file in (other / "lava").iterdir():
        file.unlink()
    model = load_model("colours", trained.url, device="cpu")
    evaluation = evaluate(model, str(other))  # a class without pictures counts nowhere
    assert evaluation.counts.tolist() == [2, 2, 0]
    assert evaluation.balanced_accuracy == float(np.mean(evaluation.recall[:2]))
    (other / "grass").rename(other / "Grass")
    assert trained.command("evaluate", "colours", "--data-root", str(other)) == BAD_INPUT
    error = capsys.readouterr().err
    assert "has classes that the model does not know: Grass; it knows blue sky, grass, lava" in error
    (other / "Grass").rename(other / "grass")
    (other / "grass" / "broken.png").write_bytes(b"no picture")
    assert trained.command("evaluate", "colours", "--data-root", str(other)) == BAD_INPUT
    assert "cannot use 1 pictures" in capsys.readouterr().err
    assert trained.command("evaluate", "colours", "--data-root", str(tmp_path / "nowhere")) == BAD_INPUT


def test_the_interval_is_the_textbooks(trained: Trained) -> None:
    """Clopper and Pearson: 8 of 10 correct, 0.444 to 0.975."""
    from study.evaluation import Evaluation

    evaluation = Evaluation(Path(), ("a", "b"), np.array([[4, 1], [1, 4]]))
    assert np.allclose(evaluation.interval, (0.4439, 0.9748), atol=1e-4)


@pytest.mark.slow
def test_onnx_gives_the_same_probabilities(trained: Trained, tmp_path: Path) -> None:
    import onnx
    from onnx.reference import ReferenceEvaluator

    file = tmp_path / "best.onnx"
    assert trained.command("model", "colours", "--onnx", "--output", str(file)) == OK
    loaded = onnx.load(file)
    (classes,) = (prop.value for prop in loaded.metadata_props if prop.key == "classes")
    assert json.loads(classes) == list(COLOURS)
    model = load_model("colours", trained.url, device="cpu")
    images = np.stack([model.decode(path) for path in sorted(trained.pictures.glob("*/0.png"))])
    inputs = {"images": images.transpose(0, 3, 1, 2).astype(np.float32)}
    (probabilities,) = ReferenceEvaluator(loaded).run(None, inputs)
    exact = TrainedModel(model.network, model.description.model_copy(update={"precision": "fp32"}), model.device)
    assert np.allclose(probabilities, exact.predict(images).probabilities, atol=1e-5)
    assert os.listdir(tmp_path) == ["best.onnx"]
