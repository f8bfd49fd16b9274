"""What a report says was studied: the network and its number of parameters."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from dashboards.description import describe
from dashboards.study_data import StudyData
from study.training.networks import CNN
from study.trial.metadata import parameter_count
from tests.support.harness import config_of
from tests.support.made_studies import made_cells


def network_of(data: StudyData) -> str:
    return dict(describe(data))["Network"]


def studied(counts: list[Any], **network: Any) -> StudyData:
    """A setting a width, with what their trials have recorded as number of parameters."""
    widths = network.pop("width", 0.25)
    searched = isinstance(widths, list)
    cells = [
        ({"width": width} if searched else {}, [0.8]) for width in (widths if searched else [widths] * len(counts))
    ]
    config = config_of(network={"width": widths, **network}, policy={"alpha": 60, "beta": 0.5})
    data = made_cells(cells, config)
    rows = [
        replace(row, attributes={**row.attributes, "network_parameters": number})
        for row, number in zip(data.rows, counts, strict=True)
    ]
    return replace(data, rows=tuple(rows))


def test_one_network_has_one_number() -> None:
    assert network_of(studied([97_310])) == "paper, width 0.25, norm batch; 97,310 parameters"
    assert network_of(studied([97_310, 97_310])) == "paper, width 0.25, norm batch; 97,310 parameters"
    assert network_of(studied([97_310, 97_311])) == "paper, width 0.25, norm batch; 97,310 to 97,311 parameters"


def test_several_networks_have_theirs() -> None:
    both = studied([97_310, 385_000], width=[0.25, 0.5])
    assert network_of(both) == (
        "paper, width 0.25, 0.5, norm batch; parameters 97,310 (width 0.25), 385,000 (width 0.5)"
    )
    many = studied([1000 * n for n in range(1, 9)], width=[n / 8 for n in range(1, 9)])
    assert network_of(many).endswith("norm batch; 1,000 to 8,000 parameters")


@pytest.mark.parametrize("stored", [None, "97310", True, -1, 10**13, 1.5, [97_310], {"a": 1}])
def test_what_is_no_count_in_a_database_is_not_shown(stored: Any) -> None:
    assert network_of(studied([stored])) == "paper, width 0.25, norm batch"
    assert network_of(studied([stored, 97_310])) == "paper, width 0.25, norm batch; 97,310 parameters"


def test_what_means_nothing_to_the_network_is_not_said() -> None:
    data = studied([11_181_642], name="torchvision:resnet18", arguments={"weights": "DEFAULT"})
    assert network_of(data) == "torchvision:resnet18, network.weights DEFAULT; 11,181,642 parameters"


def test_parameters_are_those_that_are_learnt() -> None:
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.LazyLinear(2))
    assert parameter_count(network) == 3 * 4 + 4 + 2 * 4
    network(torch.zeros(2, 3))
    assert parameter_count(network) == 3 * 4 + 4 + 2 * 4 + 4 * 2 + 2
    assert 1_500_000 < parameter_count(CNN(10, torch.Generator())) < 1_600_000  # design: about 1.54 million


@pytest.mark.parametrize(
    ("augment", "said"),
    [
        (True, "augmented"),
        (["flip"], "augmented by flip"),
        ([["flip"], ["flip", "crop"]], "augmented by flip, flip+crop"),
    ],
)
def test_augmentations_are_named_as_in_tables(augment: Any, said: str) -> None:
    data = made_cells([({}, [0.8])], config_of(data={"augment": augment}, policy={"alpha": 60, "beta": 0.5}))
    assert dict(describe(data))["Data"].endswith(f", {said}")


@pytest.mark.parametrize(("seconds", "said"), [(1.9, "1.9 seconds"), (90.0, "1.5 minutes"), (7200.0, "2.0 hours")])
def test_times_have_a_unit_that_shows_them(seconds: float, said: str) -> None:
    data = made_cells([({}, [0.8])], config_of(policy={"alpha": 60, "beta": 0.5}))
    spent: dict[str, Any] = {"train_seconds": seconds, "validation_seconds": 0.0, "selection_seconds": 0.0}
    data = replace(data, rows=tuple(replace(row, images=100, **spent) for row in data.rows))
    assert f"100 images trained on, {said} of training" in dict(describe(data))["Cost"]


def test_a_confirmation_names_the_networks_of_its_cells() -> None:
    """What the search varied is fixed in a confirmation's config, and varied by its cells."""
    cells = [{"alpha": 60, "width": width, "augment": augment} for width, augment in ((0.25, "none"), (0.5, "flip"))]
    config = config_of(network={"width": 0.125}, policy={"alpha": 60, "beta": 0.5}, search={"cells": cells})
    facts = dict(describe(made_cells([(cell, [0.8]) for cell in cells], config)))
    assert facts["Network"] == "paper, width 0.25, 0.5, norm batch"
    assert facts["Data"].endswith(", augmented by none, flip")
