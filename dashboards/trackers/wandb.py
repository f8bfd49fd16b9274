"""Weights & Biases: a group a study, a run a trial with an id of its own. Login and mode are W&B's own variables."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import wandb

from dashboards.trackers.replay import Trial
from storage.errors import UserError

PROJECT = "dynamic-training-study"
PUBLISHED = "study-published.json"
"""Beside W&B's own files: run id to what was sent. An offline run cannot be asked."""


def connect(at: str | None, study: str) -> WandB:
    folder = Path(os.environ.get("WANDB_DIR") or ".") / "wandb"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder}: {error.strerror}; set $WANDB_DIR") from None
    return WandB(at or PROJECT, folder / PUBLISHED)


class WandB:
    def __init__(self, project: str, published: Path) -> None:
        self.project, self.published = project, published
        self.sent: dict[str, list[Any]] = json.loads(published.read_text()) if published.exists() else {}

    def publish(self, trial: Trial) -> int:
        run_id = f"{trial.uid[:24]}-{trial.number}"
        there, ended = self.sent.get(run_id, [0, False])
        if (not trial.finished or ended) and all(epoch.number <= there for epoch in trial.epochs):
            return 0
        try:
            run = wandb.init(
                project=self.project, id=run_id, name=f"{trial.study} trial {trial.number}", group=trial.study,
                config=trial.parameters, resume="allow", reinit="finish_previous",
                dir=str(self.published.parent.parent),
                settings=wandb.Settings(silent=True, console="off", x_disable_stats=True, disable_git=True),
            )  # fmt: skip
        except wandb.errors.Error as error:
            raise UserError(f"W&B does not take the study: {str(error).splitlines()[0]}") from None
        there = max(there, run.step - 1)  # what another machine has sent
        new = [epoch for epoch in trial.epochs if epoch.number > there]
        for epoch in new:
            run.log(epoch.values, step=epoch.number)
        run.summary.update(trial.results | {"state": trial.state})
        run.finish(exit_code=int(trial.state == "failed"))
        self.sent[run_id] = [max([there, *(epoch.number for epoch in new)]), trial.finished]
        self.published.write_text(json.dumps(self.sent))
        return len(new)
