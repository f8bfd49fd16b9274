"""What all verbs of the command share: the app, its options, where its output goes."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

if TYPE_CHECKING:
    from dashboards.study_data import View

app = typer.Typer(
    name="study",
    help="Hyperparameter studies of dynamic training on Optuna: launch, watch, kill, move and resume them.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
# A file or a pipe has no width: tables are as wide as they are.
out = Console(width=None if sys.stdout.isatty() else 200)
err = Console(stderr=True)

Storage = Annotated[
    str | None,
    typer.Option(help="Database URL. Default: $STUDY_STORAGE, else sqlite:///study.db here.", show_default=False),
]
DataRoot = Annotated[
    Path | None,
    typer.Option(
        help="Folder of images (imagefolder) or of torchvision's downloads. Default: $STUDY_DATA_ROOT, else a cache.",
        show_default=False,
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")]


def _workers(text: str | int) -> int | None:
    if text == "max":
        return None
    if not str(text).isdecimal() or int(text) < 1:
        raise typer.BadParameter(f"must be a whole number of at least 1, or max; got {text!r}")
    return int(text)


Workers = Annotated[
    int | None,
    typer.Option(
        parser=_workers,
        metavar="N|max",
        help="Worker processes. max, the default: one a device; on a Ray cluster as many as fit, also when it grows.",
        show_default=False,
    ),
]
Assignments = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Overrides the preset: --set training.epochs=5. Repeatable."),
]
Budget = Annotated[
    list[str] | None,
    typer.Option(
        help="20 gpu-hours, 2 h, 500000000 images or 3 kWh, shared by all workers; repeatable; none: no budget.",
        show_default=False,
    ),
]
On = Annotated[Literal["here", "ray"], typer.Option(help="Workers on this machine, or on a Ray cluster.")]
Address = Annotated[
    str | None,
    typer.Option(
        help="The Ray cluster: auto, HOST:PORT or ray://HOST:PORT. Default: $RAY_ADDRESS, the one that runs here, or a "
        "new one on this machine.",
        show_default=False,
    ),
]
Gpus = Annotated[
    float | None,
    typer.Option(
        "--gpus-per-worker",
        min=0,
        max=1,
        help="On Ray. Default: 1 where the cluster has GPUs and the device is not cpu.",
        show_default=False,
    ),
]
Cpus = Annotated[float | None, typer.Option("--cpus-per-worker", min=0, help="On Ray. Default: 1.", show_default=False)]
Detach = Annotated[bool, typer.Option("--detach", help="On Ray: leave the workers to the cluster and return.")]
Name = Annotated[str, typer.Argument(help="Name of the study.")]
NewName = Annotated[str | None, typer.Option("--name", help="Another name for the copy.", show_default=False)]


def say(text: str) -> None:
    err.print(text, highlight=False, markup=False, soft_wrap=True)


def view(name: str, storage: str | None) -> View:
    from dashboards import study_data
    from storage.engine import open_storage

    return study_data.read(open_storage(storage_url(storage), create=False, reading=True), name)


def storage_url(option: str | None) -> str:
    from storage.url import DEFAULT

    return option or os.environ.get("STUDY_STORAGE") or DEFAULT


def shown(url: str) -> str:
    from storage.url import parse, redact

    return redact(parse(url))


def root_of(option: Path | None) -> str | None:
    root = option or os.environ.get("STUDY_DATA_ROOT")
    return str(Path(root).expanduser().resolve()) if root else None
