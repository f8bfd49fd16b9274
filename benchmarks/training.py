"""Images a second: our Trainer beside the loops that people write, on the same network, images and batch size.

    python -m benchmarks.training [--device cuda] [--data-root FOLDER] [--images 5120] [--rounds 7] [--html FILE]
        [--network torchvision:resnet18] [--size 96] [--batch 128] [--optimizer sgd] [--augment flip crop]
        [--photos 320]

Each contestant is a process of its own (allocator and determinism are settings of a process) and trains one epoch a
round while the others sleep; rounds interleave them, in turning order, so that whatever else the machine does meets all
of them. Without --data-root the images are scikit-learn's digits. The floor is what the measured matrix and copy rates
of the same run would allow.

Where the processor does not multiply bf16, all contestants train in fp32, as one would there. With --photos the images
of --data-root are enlarged to JPEG files of so many pixels in a temporary folder, in the place of a camera's, which all
contestants then reduce to --size. `--network mean` learns from the mean colour: what it takes to feed a network.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

from study.training.augment import SHIFT, make_augmentation
from study.training.cuda_graphs import SWITCH, WARM_UPS
from study.training.data import sources
from study.training.data.placement import DeviceData, Placement
from study.training.data.split import Part, Split, split_dataset
from study.training.device import be_deterministic, keep_freed_memory, pick_device, pick_precision
from study.training.networks import make_network
from study.training.optimizers import OptimizerName, OptimizerOptions
from study.training.policies import make_policy
from study.training.trainer import Trainer, TrainingOptions

BATCH = 512
RATE, MOMENTUM = 0.001, 0.9
FORK = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
"""How DataLoaders start workers on Linux by default; a spawned process would pass on its own start method."""
PASSES = 12
"""How often each convolution's output, or its gradient, crosses the memory bus with ideal fusion: forward written, read
and normalised, written, read by the next layer; backward the gradient written, it and the input read twice (sums, then
gradient), the result written, read with the layer's input by the convolution's backward."""


@dataclass(frozen=True)
class Task:
    """What all contestants train on."""

    name: str
    root: str | None
    images: int
    device: torch.device
    loader_workers: int
    width: float = 1.0
    network: str = "paper"
    size: int = 32
    batch: int = BATCH
    optimizer: OptimizerName = "adam"
    augment: tuple[str, ...] = ()

    def train(self) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], int]:
        part = split_dataset(sources.load(self.name, self.root, size=self.size), "paper", train_images=self.images)
        return part.train_images, part.train_labels, len(part.classes)

    def module(self, classes: int) -> nn.Module:
        if self.network == "mean":
            return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, classes))
        arguments = {"width": self.width} if self.network == "paper" else {}
        return make_network(self.network, arguments, classes=classes, channels=3, size=self.size, seed=0)

    def optimizer_of(self, network: nn.Module, *, fused: bool | None = None) -> torch.optim.Optimizer:
        """PyTorch's class with the options that `ours` has."""
        if self.optimizer == "sgd":
            return torch.optim.SGD(network.parameters(), lr=RATE, momentum=MOMENTUM, fused=fused)
        return torch.optim.Adam(network.parameters(), lr=RATE, fused=fused)

    @property
    def bf16(self) -> bool:
        return pick_precision("auto", self.device) == "bf16"


class Pictures(Dataset[tuple[Tensor, int]]):
    """What torchvision.datasets.CIFAR10 is: arrays, handed out as PIL images through a transform."""

    def __init__(self, images: np.ndarray[Any, Any], labels: np.ndarray[Any, Any], transform: Any) -> None:
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        return self.transform(Image.fromarray(self.images[index])), int(self.labels[index])


def pictures(
    images: np.ndarray[Any, Any], labels: np.ndarray[Any, Any], augment: tuple[str, ...] = (), size: int = 32
) -> Pictures:
    from torchvision import transforms

    pixels = images[:4096].reshape(-1, 3) / 255
    steps: list[Any] = [transforms.ToTensor(), transforms.Normalize(pixels.mean(0).tolist(), pixels.std(0).tolist())]
    if "crop" in augment:
        steps.insert(0, transforms.RandomCrop(size, padding=SHIFT, padding_mode="reflect"))
    if "flip" in augment:
        steps.insert(0, transforms.RandomHorizontalFlip())
    return Pictures(images, labels, transforms.Compose(steps))


def dataset(task: Task, *, files: bool) -> tuple[Dataset[tuple[Tensor, int]], int]:
    """The images as PIL images from memory or from their files, through the usual transforms; and how many classes."""
    images, labels, classes = task.train()
    pool = pictures(images, labels, task.augment, task.size)
    if not files:
        return pool, classes
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    assert task.root is not None
    resized = transforms.Compose([transforms.Resize((task.size, task.size)), pool.transform])
    folder = ImageFolder(os.path.join(task.root, "train"), resized)
    return torch.utils.data.Subset(folder, range(0, len(folder), len(folder) // task.images)[: task.images]), classes


def standard(task: Task, *, files: bool = False, amp: bool = False) -> Iterator[None]:
    """(a) The loop of most tutorials: fp32, contiguous, a DataLoader with workers, the loss read at each step."""
    pool, classes = dataset(task, files=files)
    loader = DataLoader(
        pool,
        batch_size=task.batch,
        shuffle=True,
        num_workers=task.loader_workers,
        multiprocessing_context=FORK,
        pin_memory=amp and task.device.type == "cuda",
    )
    network = task.module(classes).to(task.device)
    optimizer = task.optimizer_of(network)
    while True:
        total = 0.0
        for inputs, targets in loader:
            inputs, targets = inputs.to(task.device), targets.to(task.device)
            optimizer.zero_grad()
            with torch.autocast(task.device.type, dtype=torch.bfloat16, enabled=amp and task.bf16):
                loss = functional.cross_entropy(network(inputs), targets)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total += loss.item()
        yield


def from_files(task: Task) -> Iterator[None]:
    """(a) with torchvision's ImageFolder, which decodes each JPEG again in each epoch."""
    return standard(task, files=True)


def amp(task: Task) -> Iterator[None]:
    """(b) The same with pinned memory and bf16 autocast."""
    return standard(task, amp=True)


def tricks(task: Task, *, files: bool = False) -> Iterator[None]:
    """(b) with all that guides advise besides: channels_last, persistent workers, a fused optimizer, no item."""
    pool, classes = dataset(task, files=files)
    cuda = task.device.type == "cuda"
    torch.backends.cudnn.benchmark = True
    loader = DataLoader(
        pool,
        batch_size=task.batch,
        shuffle=True,
        num_workers=task.loader_workers,
        persistent_workers=True,
        multiprocessing_context=FORK,
        pin_memory=cuda,
    )
    network = task.module(classes)
    network = network.to(task.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = task.optimizer_of(network, fused=True)
    while True:
        total = torch.zeros((), device=task.device)
        for inputs, targets in loader:
            inputs = inputs.to(task.device, memory_format=torch.channels_last, non_blocking=True)
            targets = targets.to(task.device, non_blocking=True)
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(task.device.type, dtype=torch.bfloat16, enabled=task.bf16):
                loss = functional.cross_entropy(network(inputs), targets)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total += loss.detach()
        yield


def tuned_files(task: Task) -> Iterator[None]:
    """The same from JPEG files."""
    return tricks(task, files=True)


def resident(task: Task) -> Iterator[None]:
    """(c) In the manner of airbench: all images on the device, normalised once, bf16 weights, batches by index."""
    images, labels, classes = task.train()
    torch.backends.cudnn.benchmark = True
    pixels = torch.from_numpy(images).to(task.device).float() / 255
    mean, std = pixels.mean((0, 1, 2)), pixels.std((0, 1, 2))
    dtype = torch.bfloat16 if task.bf16 else torch.float32
    inputs = ((pixels - mean) / std).permute(0, 3, 1, 2).to(dtype, memory_format=torch.channels_last)
    targets = torch.from_numpy(labels).to(task.device)
    network = task.module(classes)
    network = network.to(task.device, dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.float()
    optimizer = task.optimizer_of(network, fused=True)
    while True:
        order = torch.randperm(len(targets), device=task.device)
        for start in range(0, len(order), task.batch):
            index = order[start : start + task.batch]
            optimizer.zero_grad(set_to_none=True)
            loss = functional.cross_entropy(network(inputs[index]).float(), targets[index])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        yield


def ours(task: Task, placement: Placement = "device") -> Iterator[None]:
    """The Trainer as a worker sets it up, deterministic; one validation image, for this counts training alone."""
    be_deterministic(True)
    keep_freed_memory()
    images, labels, classes = task.train()
    names = tuple(map(str, range(classes)))
    one = Part(images[:1], None, labels[:1])
    split = Split(Part(images, None, labels), one, one, names)
    data = DeviceData.from_split(split, task.device, placement=placement)
    policy = make_policy("full", len(labels), 0)
    options = TrainingOptions(
        epochs=10**6,
        batch_size=task.batch,
        optimizer=OptimizerOptions(name=task.optimizer, lr=RATE, momentum=MOMENTUM),
        augmentation=make_augmentation([(name, {}) for name in task.augment]),
    )
    trainer = Trainer(data, task.module(classes), policy, 0, options)
    for result in trainer.run():
        if result is not None:
            yield


def hosted(task: Task) -> Iterator[None]:
    """The same with the images on the host, gathered a batch ahead."""
    return ours(task, "host")


def launched(task: Task) -> Iterator[None]:
    """The same, every kernel launched by itself: what CUDA graphs are worth."""
    os.environ[SWITCH] = "0"
    return ours(task)


CONTESTANTS: dict[str, tuple[str, Callable[[Task], Iterator[None]]]] = {
    "files": ("(a) from JPEG files", from_files),
    "tuned_files": ("(b) with all the usual tricks, from JPEG files", tuned_files),
    "standard": ("(a) standard loop", standard),
    "amp": ("(b) with pinned memory and AMP", amp),
    "tricks": ("(b) with all the usual tricks", tricks),
    "resident": ("(c) resident, bf16 weights", resident),
    "ours": ("Trainer", ours),
    "hosted": ("Trainer, images on the host", hosted),
    "launched": ("Trainer without CUDA graphs", launched),
}


def contestant(name: str, task: Task, pipe: Any) -> None:
    """A process: sends how long the first epoch took from nothing, then an epoch's seconds at each request."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    started, spent = time.perf_counter(), cpu_seconds()
    epochs, warm = CONTESTANTS[name][1](task), False
    while True:
        next(epochs)
        synchronize(task.device)
        pipe.send((time.perf_counter() - started, cpu_seconds() - spent))
        if task.device.type == "cuda" and not warm:
            for _ in range(WARM_UPS):  # in the fourth epoch the last steps are recorded
                next(epochs)
            warm = True
        if not pipe.recv():
            return
        started, spent = time.perf_counter(), cpu_seconds()


def cpu_seconds() -> float:
    """Of this process and its DataLoader's: what other users of a busy machine cannot lengthen much."""
    own = os.times()
    total = own.user + own.system + own.children_user + own.children_system
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_seconds(call: Callable[[], object], device: torch.device, repeats: int = 9) -> float:
    call()
    seconds = []
    for _ in range(repeats):
        synchronize(device)
        started = time.perf_counter()
        call()
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def floor(task: Task, classes: int = 10) -> dict[str, float]:
    """What this device allows at most: arithmetic and memory traffic of a step at the rates measured now."""
    device = task.device
    side = 8192 if device.type == "cuda" else 2048
    rates = {}
    for kind, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        if kind == "bf16" and not task.bf16:  # emulated, where it takes minutes
            continue
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        rates[kind] = 2 * side**3 / median_seconds(lambda a=a, b=b: a @ b, device)  # type: ignore[misc]
    size = (1 << 30) if device.type == "cuda" else (1 << 28)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    copy = 2 * size / median_seconds(lambda: target.copy_(source), device)

    network = task.module(classes)
    elements = 0

    def count(_: nn.Module, __: Any, output: Tensor) -> None:
        nonlocal elements
        elements += output[0].numel()

    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count)
    with FlopCounterMode(display=False) as counter:
        loss = functional.cross_entropy(
            network(torch.zeros(2, 3, task.size, task.size)), torch.zeros(2, dtype=torch.int64)
        )
        loss.backward()  # type: ignore[no-untyped-call]
    kind, size = ("bf16", 2) if task.bf16 else ("fp32", 4)
    flops, moved = counter.get_total_flops() / 2, PASSES * size * elements
    return {
        "flops": flops,
        "bytes": moved,
        **rates,
        "copy": copy,
        "images_by_flops": rates[kind] / flops if flops else math.inf,
        "images_by_bytes": copy / moved if moved else math.inf,
    }


def spread(values: list[float], form: str = ".0f") -> str:
    ordered = sorted(values)
    return f"{statistics.median(ordered):{form}} ({ordered[0]:{form}} to {ordered[-1]:{form}})"


@dataclass
class Rounds:
    """One contestant's rounds."""

    first_seconds: float
    rates: list[float]
    """Images/s."""
    thrifts: list[float]
    """Images a second of processor time."""


def ratio(ours: list[float], theirs: list[float]) -> str:
    return spread([a / b for a, b in zip(ours, theirs, strict=True)], ".2f")


def measure(task: Task, names: list[str], rounds: int) -> dict[str, Rounds]:
    spawn = multiprocessing.get_context("spawn")
    results, pipes, processes = {}, {}, []
    for name in names:
        pipes[name], theirs = spawn.Pipe()
        # Not daemons: their DataLoaders start processes.
        processes.append(spawn.Process(target=contestant, args=(name, task, theirs)))
        processes[-1].start()
        theirs.close()
        results[name] = Rounds(pipes[name].recv()[0], [], [])
        print(f"{name}: first epoch {results[name].first_seconds:.1f} s", file=sys.stderr, flush=True)
    for number in range(rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            pipes[name].send(True)
            seconds, spent = pipes[name].recv()
            results[name].rates.append(task.images / seconds)
            results[name].thrifts.append(task.images / spent)
            line = f"round {number + 1} {name}: {results[name].rates[-1]:.0f} images/s, {spent:.1f} CPU seconds"
            print(line, file=sys.stderr, flush=True)
    for name, process in zip(names, processes, strict=True):
        pipes[name].send(False)
        process.join()
    return results


def figure(results: dict[str, Rounds]) -> str:
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    titles = ("Images a second of processor time", "Trainer over it, round by round (wall clock)")
    chart = make_subplots(1, 2, subplot_titles=titles, shared_yaxes=True, horizontal_spacing=0.06)
    mine = results["ours"].rates
    for name, one in reversed(results.items()):
        ratios = [] if name == "ours" else [a / b for a, b in zip(mine, one.rates, strict=True)]
        colour = "#1f77b4" if name == "ours" else "#7f7f7f"
        for column, values in ((1, one.thrifts), (2, ratios)):
            box = go.Box(x=values, name=CONTESTANTS[name][0], orientation="h", boxpoints="all", marker_color=colour)
            chart.add_trace(box, 1, column)
    chart.update_xaxes(rangemode="tozero")
    chart.add_vline(x=1, line_dash="dot", col=2)
    chart.update_layout(template="plotly_white", width=1080, height=400, margin_l=190, font_size=14, showlegend=False)
    return str(chart.to_html(include_plotlyjs=True, config={"displayModeBar": False}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    folder = os.environ.get("STUDY_DATA_ROOT")
    parser.add_argument(
        "--data-root", default=folder, help="folder with train/ and test/, one folder of images a class"
    )
    parser.add_argument("--images", type=int, help="images an epoch (default: 5120 on a CPU, all on a GPU)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--network", default="paper", help="paper, or torchvision:NAME")
    parser.add_argument("--size", type=int, default=32, help="height and width of the images")
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--optimizer", default="adam", choices=["adam", "sgd"])
    parser.add_argument("--augment", nargs="*", default=[], choices=["flip", "crop"])
    parser.add_argument("--photos", type=int, help="enlarge --images images to JPEG files of so many pixels")
    parser.add_argument("--loader-workers", type=int, default=min(8, os.cpu_count() or 1))
    parser.add_argument("--only", nargs="*", choices=list(CONTESTANTS), help="these contestants")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--html", type=Path, help="a plot of the rounds")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.photos:
            make_photos(Path(options.data_root), Path(folder), options.images or 512, options.photos)
            options.data_root = folder
            os.environ["STUDY_CACHE"] = os.path.join(folder, "cache")
        run(options)


def make_photos(source: Path, folder: Path, images: int, pixels: int) -> None:
    """Some JPEG files of each class, enlarged: `images` to train on, a tenth as many to test on."""
    from PIL import Image

    for split, wanted in (("train", images), ("test", images // 10)):
        classes = sorted((source / split).iterdir())
        for number, files in enumerate(sorted(each.iterdir()) for each in classes):
            target = folder / split / classes[number].name
            target.mkdir(parents=True)
            for file in files[: wanted // len(classes) + (number < wanted % len(classes))]:
                with Image.open(file) as image:
                    image.resize((pixels, pixels), Image.Resampling.BICUBIC).save(target / file.name, quality=90)


def run(options: argparse.Namespace) -> None:
    device = pick_device(options.device)
    name, root = ("imagefolder", options.data_root) if options.data_root else ("digits", None)
    decode = time.perf_counter()
    total = len(sources.load(name, root, size=options.size).train_labels)
    decode, again = time.perf_counter() - decode, time.perf_counter()
    sources.load(name, root, size=options.size)
    again = time.perf_counter() - again
    images = min(options.images or (total if device.type == "cuda" else 5120), total)
    task = Task(
        name,
        root,
        images,
        device,
        options.loader_workers,
        options.width,
        options.network,
        options.size,
        options.batch,
        options.optimizer,
        tuple(options.augment),
    )
    possible = {
        "files": root is not None,
        "tuned_files": bool(options.photos),
        "resident": not options.augment,
        "launched": device.type == "cuda",
    }
    names = options.only or [each for each in CONTESTANTS if possible.get(each, True)]

    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()} cores"
    print(
        f"{device} ({where}, {platform.machine()}), torch {torch.__version__}, {name}, {images} images a round, "
        f"{options.network} at {options.size} pixels, batch {options.batch}, {options.optimizer}, "
        f"augmentation {' '.join(options.augment) or 'none'}, {'bf16' if task.bf16 else 'fp32'}"
    )
    print(f"data: {decode:.2f} s at the first call, {again:.2f} s from the cache")
    before = floor(task)
    results = measure(task, names, options.rounds)
    after = floor(task)

    print("\n| contestant | images/s | Trainer over it | images a CPU second | Trainer over it | first epoch, s |")
    print("| --- | --- | --- | --- | --- | --- |")
    for each, one in results.items():
        mine = results.get("ours", one)
        print(
            f"| {CONTESTANTS[each][0]} | {spread(one.rates)} | {ratio(mine.rates, one.rates)} "
            f"| {spread(one.thrifts)} | {ratio(mine.thrifts, one.thrifts)} | {one.first_seconds:.1f} |"
        )
    for moment, bound in (("before", before), ("after", after)):
        rates = ", ".join(f"{bound[kind] / 1e9:.0f} in {kind}" for kind in ("bf16", "fp32") if kind in bound)
        arithmetic = f"{bound['flops'] / 1e6:.0f} MFLOP an image, GFLOP/s {rates}"
        traffic = f"{bound['bytes'] / 1e6:.1f} MB an image at {bound['copy'] / 1e9:.0f} GB/s"
        print(f"floor {moment}: {arithmetic}: {bound['images_by_flops']:.0f} images/s")
        print(f"floor {moment}: {traffic}: {bound['images_by_bytes']:.0f} images/s")
    if options.json:
        rows = {name: vars(one) for name, one in results.items()}
        options.json.write_text(json.dumps({"contestants": rows, "before": before, "after": after}))
    if options.html:
        options.html.write_text(figure(results))


if __name__ == "__main__":
    main()
