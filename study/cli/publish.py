"""The verb that publishes: a study replayed into an experiment tracker."""

from __future__ import annotations

import logging
import time
from typing import Annotated, Literal

import typer

from study.cli.options import Name, Storage, read_study

logger = logging.getLogger(__name__)

FOLLOW_SECONDS = 10.0
"""Between two looks of `--follow`."""


def publish(
    name: Name,
    to: Annotated[Literal["tensorboard", "mlflow", "wandb"], typer.Option("--to", help="Which tracker.")],
    at: Annotated[
        str | None,
        typer.Option(
            help="TensorBoard's folder (default: runs), MLflow's tracking URI (default: $MLFLOW_TRACKING_URI), or the "
            "W&B project (default: dynamic-training-study).",
            show_default=False,
        ),
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Stay until the study has ended.")] = False,
    storage: Storage = None,
) -> None:
    """Replay a study into TensorBoard, MLflow or Weights & Biases. Repeat it at will: nothing is doubled.

    Example: study publish quick --to tensorboard --at runs
    """
    from dashboards.trackers import replay

    data = read_study(name, storage)
    tracker = replay.make_tracker(to, at, name)
    while True:
        added = replay.publish(data, tracker)
        logger.info("%r: %d epochs published to %s", name, added, to)
        now = data.status.progress
        if not follow or now.finished == now.total or data.status.ended_early:
            return
        time.sleep(FOLLOW_SECONDS)
        data = read_study(name, storage)
