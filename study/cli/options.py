"""What the verbs share: their options, where output goes, which storage is meant."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

if TYPE_CHECKING:
    from dashboards.study_data import StudyData

# A file or a pipe has no width: tables are as wide as they are.
out = Console(width=None if sys.stdout.isatty() else 200, highlight=False, markup=False)

RAY = "Ray cluster"
"""Panel of the help."""

Storage = Annotated[
    str | None,
    typer.Option(help="Database URL. Default: $STUDY_STORAGE, else sqlite:///study.db.", show_default=False),
]
DataRoot = Annotated[
    Path | None,
    typer.Option(
        "--data-root",
        help="Folder of images (imagefolder) or of torchvision's downloads. Default: $STUDY_DATA_ROOT, else a cache.",
        show_default=False,
    ),
]
Code = Annotated[
    list[Path] | None,
    typer.Option(
        "--code",
        metavar="FOLDER",
        help="A folder whose Python code the study may run (networks, data, policies named module:name); repeatable. "
        "Default: $STUDY_CODE, and for a config file its folder.",
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
        help="Worker processes. max, the default: one a GPU, or one a core; on a Ray cluster as many as fit.",
        show_default=False,
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        min=1, max=1024, help="Threads of each worker on a CPU. Default: $OMP_NUM_THREADS, else 1.", show_default=False
    ),
]
Assignments = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override the config: --set training.epochs=5. Repeatable."),
]
Budget = Annotated[
    list[str] | None,
    typer.Option(
        help="20 gpu-hours, 2 h, 500000000 images or 3 kWh, shared by all workers; repeatable; none: no budget.",
        show_default=False,
    ),
]
AllowFailures = Annotated[
    int, typer.Option(min=0, metavar="N", help="Failed trials with which the exit code is still 0.")
]
Force = Annotated[bool, typer.Option("--force", help="Continue a study although it was copied elsewhere.")]
OnEvent = Annotated[
    str | None,
    typer.Option(
        "--on-event",
        metavar="COMMAND",
        help="Run this when a trial has finished or failed, at a new best, and at the end: a line of JSON on its "
        "standard input.",
        show_default=False,
    ),
]
LauncherOption = Annotated[
    Literal["local", "ray"], typer.Option("--launcher", help="Workers on this machine, or on a Ray cluster.")
]
Address = Annotated[
    str | None,
    typer.Option(
        help="auto, HOST:PORT or ray://HOST:PORT. Default: $RAY_ADDRESS, else the cluster that runs here, else a new "
        "one on this machine.",
        show_default=False,
        rich_help_panel=RAY,
    ),
]
Gpus = Annotated[
    float | None,
    typer.Option(
        "--gpus-per-worker",
        min=0,
        max=1,
        help="Default: 1 where the cluster has GPUs and the device is not cpu.",
        show_default=False,
        rich_help_panel=RAY,
    ),
]
Cpus = Annotated[
    float | None,
    typer.Option("--cpus-per-worker", min=0, help="Default: 1.", show_default=False, rich_help_panel=RAY),
]
Detach = Annotated[
    bool, typer.Option("--detach", help="Leave the workers to the cluster and return.", rich_help_panel=RAY)
]
Name = Annotated[str, typer.Argument(help="Name of the study.")]
NewName = Annotated[str | None, typer.Option("--name", help="Another name for the copy.", show_default=False)]


def read_study(name: str, storage: str | None) -> StudyData:
    """All that a report says of a study."""
    from dashboards.study_data import read
    from storage.engine import open_storage

    url = storage_url(storage)
    return read(open_storage(url, create=False, reading=True), name, option_for(url))


def storage_url(option: str | None) -> str:
    """The URL that is meant: the option, else $STUDY_STORAGE, else the default file in the current folder."""
    from storage.url import DEFAULT

    return option or os.environ.get("STUDY_STORAGE") or DEFAULT


def shown(url: str) -> str:
    """The URL without passwords."""
    from storage.url import parse, redact

    return redact(parse(url))


def option_for(url: str) -> str | None:
    """What `--storage` has to say for a command on the storage at `url`, without passwords; None: it is not needed."""
    return None if url == storage_url(None) else shown(url)


def command_for(url: str, *words: str) -> str:
    """A command of ours on the storage at `url`, as it can be typed: with `--storage` where it is needed."""
    from storage.text import command

    return command(*words, storage=option_for(url))


def data_root(option: Path | None) -> str | None:
    """The folder that is meant: the option, else $STUDY_DATA_ROOT; as a whole path."""
    root = option or os.environ.get("STUDY_DATA_ROOT")
    return str(Path(root).expanduser().resolve()) if root else None
