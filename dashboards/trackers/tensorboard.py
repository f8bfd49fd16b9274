"""TensorBoard: a folder of event files, one subfolder a trial, written with TensorBoard's own classes."""

from __future__ import annotations

import json
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams.summary_v2 import hparams_pb
from tensorboard.plugins.text.metadata import create_summary_metadata
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from dashboards.trackers.replay import Trial
from storage.errors import UserError

FOLDER = "runs"


def connect(at: str | None, study: str) -> TensorBoard:
    """Raises:
    UserError: the folder cannot be made.
    """
    folder = Path(at or FOLDER) / "".join(c if c.isalnum() or c in "-_." else "_" for c in study)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder}: {error.strerror}; name another with --at") from None
    return TensorBoard(folder)


class TensorBoard:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def publish(self, trial: Trial) -> int:
        run = self.folder / f"trial-{trial.number}"
        there, ended = _present(run)
        new = [epoch for epoch in trial.epochs if epoch.number > there]
        if not new and (ended or not trial.finished):
            return 0
        writer = EventFileWriter(str(run))
        if there == 0:
            known = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in trial.parameters.items()}
            writer.add_event(Event(summary=hparams_pb(known, trial_id=f"{trial.uid}-{trial.number}",
                                                      start_time_secs=trial.started_at), step=0,
                                   wall_time=trial.started_at))  # fmt: skip
        for epoch in new:
            values = [Summary.Value(tag=f"epoch/{name}", simple_value=value) for name, value in epoch.values.items()]
            writer.add_event(Event(summary=Summary(value=values), step=epoch.number, wall_time=epoch.at))
        if trial.finished and not ended:
            step = trial.epochs[-1].number if trial.epochs else 0
            values = [Summary.Value(tag=name, simple_value=value) for name, value in trial.results.items()]
            values.append(_text("state", trial.state))
            writer.add_event(Event(summary=Summary(value=values), step=step, wall_time=trial.ended_at))
        writer.close()
        return len(new)


def _present(run: Path) -> tuple[int, bool]:
    """The last epoch that a folder has, and whether it has the trial's end."""
    if not run.is_dir():
        return 0, False
    events = EventAccumulator(str(run), size_guidance={"scalars": 1, "tensors": 1})
    events.Reload()
    tags = events.Tags()
    last = events.Scalars("epoch/accuracy")[-1].step if "epoch/accuracy" in tags["scalars"] else 0
    return last, "state" in tags["tensors"]


def _text(tag: str, text: str) -> Summary.Value:
    value = Summary.Value(tag=tag, metadata=create_summary_metadata(tag, json.dumps(tag)))
    value.tensor.dtype = 7  # DT_STRING
    value.tensor.string_val.append(text.encode())
    return value
