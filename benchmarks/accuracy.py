"""Whether the fast path costs accuracy: the Trainer (bf16, channels_last) beside the standard fp32 loop, seed by seed.

    python -m benchmarks.accuracy --data-root FOLDER [--seeds 8] [--images 4000] [--width 0.25] [--epochs 12]

Both train on the same images with the same batch size, learning rate and first weights; the shuffles are their own. The
accuracy is the last epoch's on 5,000 images of the test split.
"""

from __future__ import annotations

import argparse
import math
import statistics
from dataclasses import replace

import numpy as np
import torch
from scipy import stats
from torch.nn import functional
from torch.utils.data import DataLoader

from benchmarks.training import pictures
from study.training.data import sources
from study.training.data.placement import DeviceData
from study.training.data.split import Part, Split, split_dataset
from study.training.device import be_deterministic, keep_freed_memory, pick_device
from study.training.networks import CNN, make_network
from study.training.optimizers import OptimizerOptions
from study.training.policies import make_policy
from study.training.rng import generator
from study.training.trainer import Trainer, TrainingOptions

BATCH, RATE = 128, 0.001


def standard(split: Split, seed: int, epochs: int, width: float, device: torch.device) -> float:
    torch.manual_seed(seed)
    train = DataLoader(pictures(split.train_images, split.train_labels), batch_size=BATCH, shuffle=True)
    test = pictures(split.validation_images, split.validation_labels)
    test.transform = train.dataset.transform  # type: ignore[attr-defined]
    network = CNN(len(split.classes), generator(seed, "weights"), width=width).to(device)
    optimizer = torch.optim.Adam(network.parameters(), lr=RATE)
    for _ in range(epochs):
        network.train()
        for inputs, targets in train:
            optimizer.zero_grad()
            loss = functional.cross_entropy(network(inputs.to(device)), targets.to(device))
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    network.eval()
    with torch.no_grad():
        correct = sum(
            int((network(inputs.to(device)).argmax(1) == targets.to(device)).sum())
            for inputs, targets in DataLoader(test, batch_size=500)
        )
    return correct / len(test)


def fast(split: Split, seed: int, epochs: int, width: float, device: torch.device) -> float:
    policy = make_policy("full", len(split.train_labels), seed)
    data = DeviceData.from_split(split, device)
    network = make_network("paper", {"width": width}, classes=data.classes, channels=3, size=32, seed=seed)
    options = TrainingOptions(epochs=epochs, batch_size=BATCH, optimizer=OptimizerOptions(lr=RATE))
    trainer = Trainer(data, network, policy, seed, options)
    return [result.accuracy for result in trainer.run() if result is not None][-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", help="default: digits")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--width", type=float, default=0.25)
    parser.add_argument("--epochs", type=int, default=12)
    options = parser.parse_args()
    device = pick_device(options.device)
    be_deterministic(True)
    keep_freed_memory()
    dataset = sources.load("imagefolder" if options.data_root else "digits", options.data_root)
    whole = split_dataset(dataset, "paper", train_images=min(options.images, len(dataset.train_labels)))
    held = np.sort(np.random.default_rng(0).permutation(len(whole.validation_labels))[:5000])
    validation = Part(whole.validation.images, held, whole.validation_labels[held])
    split = replace(whole, validation=validation)
    gaps = []
    for seed in range(options.seeds):
        ours, theirs = (run(split, seed, options.epochs, options.width, device) for run in (fast, standard))
        gaps.append(100 * (ours - theirs))
        print(
            f"seed {seed}: Trainer {100 * ours:.2f} %, fp32 loop {100 * theirs:.2f} %, gap {gaps[-1]:+.2f}", flush=True
        )
    n, error = len(gaps), statistics.stdev(gaps) / math.sqrt(len(gaps))
    half = float(stats.t.ppf(0.975, n - 1)) * error
    # The smallest true gap that this many pairs call significant (5 %, two-sided) with 80 % power.
    detectable = (float(stats.t.ppf(0.975, n - 1)) + float(stats.t.ppf(0.8, n - 1))) * error
    test = stats.ttest_1samp(gaps, 0.0)
    mean = statistics.mean(gaps)
    print(f"mean gap {mean:+.2f} points, 95 % interval {mean - half:+.2f} to {mean + half:+.2f}, p = {test.pvalue:.2f}")
    print(f"n = {n}: minimum detectable gap {detectable:.1f} points (80 % power)")


if __name__ == "__main__":
    main()
