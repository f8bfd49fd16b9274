"""The preset `quick` as a plain Optuna script: one process, GridSampler, MedianPruner, DataLoader, the usual loop.

    python -m benchmarks.plain_optuna sqlite:///plain.db

What `benchmarks.end_to_end` measures `study launch quick` against. Data, network, grid, epochs and pruning are the
same; all else is as in Optuna's and PyTorch's tutorials, with as many threads as torch takes by itself.
"""

from __future__ import annotations

import sys

import optuna
import torch
from torch.nn import functional
from torch.utils.data import DataLoader, Subset, TensorDataset

from study.training.data import sources
from study.training.data.split import split_dataset
from study.training.networks import CNN

ALPHAS, BETAS = [400, 600, 200], [0.7, 0.5, 0.3, 0.1]
DELTA, GAMMA = 0.01, 0.97
EPOCHS, BATCH, RATE, WIDTH = 12, 64, 0.002, 0.25


def tensors() -> tuple[TensorDataset, TensorDataset, int]:
    split = split_dataset(sources.load("digits"), "holdout", holdout=0.25)
    pairs = ((split.train_images, split.train_labels), (split.validation_images, split.validation_labels))
    train, validation = (
        TensorDataset(torch.tensor(images).permute(0, 3, 1, 2).float() / 255, torch.tensor(labels).long())
        for images, labels in pairs
    )
    return train, validation, len(split.classes)


def objective(trial: optuna.Trial, train: TensorDataset, validation: TensorDataset, classes: int) -> float:
    alpha = trial.suggest_categorical("alpha", ALPHAS)
    beta = trial.suggest_categorical("beta", BETAS)
    torch.manual_seed(0)
    network = CNN(classes, torch.Generator().manual_seed(0), width=WIDTH)
    optimizer = torch.optim.Adam(network.parameters(), lr=RATE)
    active = best_set = torch.randperm(len(train))[:alpha]
    before, best = float("-inf"), 0.0
    for epoch in range(1, EPOCHS + 1):
        network.train()
        for images, labels in DataLoader(Subset(train, active.tolist()), batch_size=BATCH, shuffle=True):
            optimizer.zero_grad()
            functional.cross_entropy(network(images), labels).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        network.eval()
        with torch.no_grad():
            correct = sum(
                int((network(images).argmax(1) == labels).sum())
                for images, labels in DataLoader(validation, batch_size=500)
            )
        accuracy = correct / len(validation)
        if accuracy > best:
            best, best_set = accuracy, active
        trial.report(best, epoch)
        if trial.should_prune():
            raise optuna.TrialPruned
        if accuracy - before <= DELTA:
            type2 = accuracy > before
            active = best_set if type2 else active
            k = round(beta * (GAMMA**epoch if type2 else 1) * alpha)
            outside = torch.ones(len(train), dtype=torch.bool)
            outside[active] = False
            others = outside.nonzero().squeeze(1)
            kept = active[torch.randperm(alpha)[: alpha - min(k, len(others))]]
            active = torch.cat([kept, others[torch.randperm(len(others))[: alpha - len(kept)]]])
        before = accuracy
    return best


def main(url: str) -> None:
    data = tensors()
    study = optuna.create_study(
        study_name="plain",
        storage=url,
        direction="maximize",
        sampler=optuna.samplers.GridSampler({"alpha": ALPHAS, "beta": BETAS}),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=4),
    )
    study.optimize(lambda trial: objective(trial, *data))
    print(study.best_value, study.best_params)


if __name__ == "__main__":
    main(sys.argv[1])
