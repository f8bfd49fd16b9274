"""One trial: its parameters, the epochs of its Trainer, what is reported of them, and its value.

A trial's value is its best validation accuracy over the epochs, as in the paper. What it reports at epoch n is
therefore its best accuracy up to n, not that epoch's: the last report of a finished trial is its value, a pruned
trial's value (Optuna takes the last report) is the value it would have had if it had ended there, and a pruner that
looks at step n compares what the trials would be worth if all stopped at n. One bad epoch prunes nothing. The raw
accuracies are in `trial_epochs`, and the learning curves show those.
"""

from __future__ import annotations

import io
import platform
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import optuna
import torch
from optuna.trial import TrialState

from storage import checkpoints
from storage.queue import Lease, LeaseLost, Queue
from study import __version__, space
from study.config import StudyConfig
from study.search import make_sampler
from study.training.policies import make_policy
from study.training.trainer import Diverged, EpochResult, OnDevice, Trainer

CHECKPOINT_SHARE = 0.01
"""The part of the time that checkpoints may take."""


def make_trainer(config: StudyConfig, data: OnDevice, chosen: space.Parameters, seed: int) -> Trainer:
    """The Trainer of a trial with the parameters `chosen` over the config's."""
    parameters = space.settings(config, chosen)
    name = parameters["policy"]
    uses = {key: parameters[key] for key in space.USES[name]}
    if name == "dynamic":
        uses["decay"] = config.policy.decay
    return Trainer(
        data,
        make_policy(name, len(data.train_labels), seed, **uses),
        seed,
        epochs=parameters["epochs"],
        batch_size=parameters["batch_size"],
        lr=parameters["lr"],
        weight_decay=parameters["weight_decay"],
        width=config.network.width,
        norm=config.network.norm,
        augment=config.data.augment,
        precision=config.training.precision,
    )


def run_trial(
    study: optuna.Study,
    config: StudyConfig,
    data: OnDevice,
    queue: Queue,
    lease: Lease,
    stopping: Callable[[], bool],
    say: Callable[[str], None],
) -> None:
    """Work on the leased trial until it is settled, or given back because `stopping` came true.

    Raises:
        LeaseLost: another worker has the trial; nothing more was written.
    """
    chosen, seed = ask(study, config, lease)
    trainer = make_trainer(config, data, chosen, seed)
    _restore(trainer, queue, lease, say)
    decided_before = queue.epochs_done(lease.trial_id)

    saved, every = time.monotonic(), config.checkpoint.every_seconds
    try:
        for result in trainer.run():
            if lease.lost.is_set():
                raise LeaseLost(f"trial {lease.number} has been taken over")
            if result is not None:
                queue.record(lease, _row(result), best(trainer.history).accuracy)
                # An epoch that another attempt went past has had its decision: to go on.
                if decided_before <= result.epoch < trainer.epochs and should_prune(study, lease):
                    _settle(study, queue, lease, TrialState.PRUNED, trainer)
                    return
            if stopping():
                _save(trainer, queue, lease)
                queue.release(lease)
                return
            if time.monotonic() - saved >= every:
                cost = _save(trainer, queue, lease)
                saved = time.monotonic()
                every = max(config.checkpoint.every_seconds, cost / CHECKPOINT_SHARE)
    except Diverged as error:
        queue.fail(lease, str(error))
        say(f"trial {lease.number} failed: {error}")
        return
    _settle(study, queue, lease, TrialState.COMPLETE, trainer)


def ask(study: optuna.Study, config: StudyConfig, lease: Lease) -> tuple[space.Parameters, int]:
    """What `Study.ask` does, for a trial that exists: its parameters, drawn where it has none, and its seed."""
    study.sampler = make_sampler(config, lease.number)
    study._thread_local.cached_all_trials = None  # as ask does: samplers must see what has finished since
    study.get_trials(deepcopy=False)  # Optuna's cache refuses parameters for a trial that it has never read
    trial = optuna.Trial(study, lease.trial_id)
    return space.suggest(trial, config), int(trial.user_attrs.get("seed", config.search.seed))


def should_prune(study: optuna.Study, lease: Lease) -> bool:
    """What `Trial.should_prune` says, which itself looks only at what was reported through that very object."""
    return study.pruner.prune(study, study._storage.get_trial(lease.trial_id))


def best(history: list[EpochResult]) -> EpochResult:
    """The epoch with the highest accuracy; ties go to the earlier."""
    return max(history, key=lambda result: (result.accuracy, -result.epoch))


def _row(result: EpochResult) -> dict[str, Any]:
    row = asdict(result)
    resampling: dict[str, Any] = row.pop("resampling")
    return row | resampling


def _settle(study: optuna.Study, queue: Queue, lease: Lease, state: TrialState, trainer: Trainer) -> None:
    top = best(trainer.history)
    frozen = study._storage.get_trial(lease.trial_id)
    study.sampler.after_trial(study, frozen, state, [top.accuracy])  # as study.tell does
    attributes = {
        "best_epoch": top.epoch,
        "epochs": len(trainer.history),
        "images": sum(result.images for result in trainer.history),
        "train_seconds": round(sum(result.train_seconds for result in trainer.history), 3),
        "validation_seconds": round(sum(result.validation_seconds for result in trainer.history), 3),
        "precision": trainer.precision,
        "device": device_name(trainer.device),
        "host": platform.node(),
        "versions": {"study": __version__, "torch": str(torch.__version__), "optuna": optuna.__version__},
    }
    queue.finish(lease, state, top.accuracy, attributes)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"


def _save(trainer: Trainer, queue: Queue, lease: Lease) -> float:
    """Seconds that it took."""
    started = time.monotonic()
    buffer = io.BytesIO()
    torch.save(trainer.state_dict(), buffer)
    checkpoints.save(queue, lease, len(trainer.history), buffer.getvalue())
    return time.monotonic() - started


def _restore(trainer: Trainer, queue: Queue, lease: Lease, say: Callable[[str], None]) -> None:
    found = checkpoints.load(queue, lease)
    if found is None:
        return
    if found.payload is None:
        say(f"trial {lease.number}: its checkpoint is damaged (checksum); it starts again from epoch 0")
        return
    # weights_only: nothing that comes from the database can run code.
    trainer.load_state_dict(torch.load(io.BytesIO(found.payload), map_location="cpu", weights_only=True))
    say(f"trial {lease.number} goes on after epoch {found.epoch}")
