"""Config files: what they extend, what they replace, their paths; constraints and augmentations as text."""

from __future__ import annotations

from pathlib import Path

import pytest

from storage.errors import UserError
from study.config import augmentations, constraints
from study.config.loading import load, parse_config
from study.search import space


def written(folder: Path, text: str, name: str = "mine.toml") -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def test_a_file_extends_a_preset(tmp_path: Path) -> None:
    loaded = load(
        written(tmp_path, 'extends = "tpe"\n[policy]\nbeta = {low = 0.2, high = 0.4}\n[pruning]\nkind = "median"\n'),
        ["training.epochs=3"],
    )
    config = loaded.config
    assert (loaded.name, loaded.folder) == ("mine", tmp_path)
    assert (config.policy.beta.low, config.policy.beta.high) == (0.2, 0.4)  # type: ignore[union-attr]
    assert config.search.sampler.kind == "tpe"
    assert config.pruning.kind == "median"  # without hyperband's parameters
    assert config.training.epochs == 3


def test_paths_start_at_the_files_folder(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    written(tmp_path, '[data]\nname = "imagefolder"\nroot = "photos"\n[policy]\nalpha = "10 %"\n', "base.toml")
    loaded = load(written(tmp_path / "below", 'extends = "../base.toml"\n[checkpoint]\nstore = "files"\n'))
    assert loaded.data_root == str(tmp_path / "photos")
    assert loaded.config.checkpoint.store == str(tmp_path / "below" / "files")


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("extends = 3", "extends names a preset or a file"),
        ('extends = "mine.toml"', "a circle"),
        ('extends = "missing.toml"', "no config file"),
        ('extends = "quik"', "did you mean 'quick'"),
        ("[policy", "is not TOML"),
        ('[data]\nroot = ""', "data.root must be the path"),
        ('[data]\nname = "cifar11"', "did you mean 'cifar10'"),
        ('[data]\naugment = ["flop"]', "no augmentation 'flop'"),
        ('[data]\naugment = ["flip(p=1)"]', "takes no arguments"),
        ('[policy]\nalpha = "110 %"', "at most 100 %"),
        ('[policy]\nalpha = 5\n[search]\nconstraints = ["alpha"]', "a comparison such as"),
        ('[policy]\nalpha = 5\n[search]\nconstraints = ["alfa < 3"]', "no parameter 'alfa'"),
        ("[policy]\nalpha = 5\n[search]\nconstraints = [\"__import__('os') < 3\"]", "is not allowed"),
        ('[policy]\nalpha = [5, 6]\n[network.arguments]\n"a b" = 1', "name of a Python variable"),
        ('[policy]\nalpha = 5\n[training]\noptimizer = "sgd"\nmomentum = 0\nnesterov = true', "above 0"),
    ],
)
def test_faults_are_named_in_one_line(text: str, fault: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=fault) as refusal:
        load(written(tmp_path, text))
    assert "\n" not in str(refusal.value)


def test_a_grid_leaves_out_what_a_constraint_forbids() -> None:
    tree = {
        "policy": {"name": ["full", "dynamic"], "alpha": [100, 200, 300], "beta": 0.5},
        "training": {"epochs": [10, 20]},
        "search": {"constraints": ["alpha * epochs <= 3_000"]},
    }
    cells = [(cell["policy"], cell.get("alpha"), cell["epochs"]) for cell in space.cells(parse_config(tree))]
    assert cells == [("full", None, 10), ("full", None, 20), ("dynamic", 100, 10), ("dynamic", 100, 20),
                     ("dynamic", 200, 10), ("dynamic", 300, 10)]  # fmt: skip


def test_what_means_nothing_to_a_choice_is_no_cell() -> None:
    tree = {
        "policy": {"alpha": 100},
        "training": {"optimizer": ["adam", "sgd"], "momentum": [0.8, 0.9], "schedule": ["constant", "cosine"]},
    }
    cells = space.cells(parse_config(tree))
    assert [cell.get("momentum") for cell in cells if cell["optimizer"] == "adam"] == [None, None]
    assert len(cells) == 2 + 4


def test_constraints_compute() -> None:
    values = {"alpha": 100, "network.hidden": 8, "policy": "dynamic"}
    assert constraints.holds("alpha // 3 == 33 and network.hidden < 9", values)
    assert not constraints.holds("alpha < 100 or policy == 'full'", values)
    assert constraints.holds("gamma < 0", values)  # means nothing to it
    assert constraints.names("1 < alpha * beta <= network.hidden") == {"alpha", "beta", "network.hidden"}


def test_every_augmentation_can_be_made() -> None:
    import torch

    from study.training.augment import make_augmentation

    images = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)
    for name in augmentations.TRANSFORMS:
        arguments = {"RandomRotation": {"degrees": 10}, "RandomAffine": {"degrees": 10}, "GaussianBlur":
                     {"kernel_size": 3}, "RandomPosterize": {"bits": 4}, "RandomSolarize": {"threshold": 128},
                     "RandomAdjustSharpness": {"sharpness_factor": 2}}.get(name, {})  # fmt: skip
        out = make_augmentation([(name, arguments)]).transform(images)
        assert (out.shape, out.dtype) == (images.shape, images.dtype), name


def test_a_trials_config_runs_that_trial_alone() -> None:
    config = parse_config(
        {
            "policy": {"name": ["full", "dynamic"], "alpha": [100, 200], "beta": [0.3, 0.6]},
            "network": {"name": "m:make", "arguments": {"hidden": [4, 8]}},
            "data": {"augment": [False, ["flip"]]},
        }
    )
    chosen = {"policy": "dynamic", "alpha": 200, "beta": 0.6, "network.hidden": 8, "augment": "flip"}
    alone = space.trial_config(config, chosen, 7)
    assert space.cells(alone) == [{}]
    assert (alone.policy.name, alone.policy.alpha, alone.policy.beta, alone.search.seed) == ("dynamic", 200, 0.6, 7)
    assert (alone.network.arguments, alone.data.augment) == ({"hidden": 8}, ("flip",))
