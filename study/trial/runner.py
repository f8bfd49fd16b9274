"""One trial: its parameters, the epochs of its Trainer, what is reported of them, and its value.

A trial's value is its best validation accuracy over the epochs, as in the paper. What it reports at epoch n is
therefore its best accuracy up to n, not that epoch's: the last report of a finished trial is its value, a pruned
trial's value (Optuna takes the last report) is the value it would have had if it had ended there, and a pruner that
looks at step n compares what the trials would be worth if all stopped at n. One bad epoch prunes nothing. The raw
accuracies are in `trial_epochs`, and the learning curves show those.

With `pruning.step = "images"` a step is not an epoch but as many images trained on as the smallest alpha: an epoch of
alpha = 5,000 and one of 45,000 are not the same work. What is reported at step s is then the best accuracy of the
epochs that had ended when s steps' images had been trained on, so nobody is credited with images he has not had yet.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import optuna
import torch
from optuna.trial import TrialState

from storage.optuna_internals import forget_cached_trials, storage_of
from storage.queue import Lease, LeaseLost, Queue
from storage.retry import is_transient, retry
from study.config.models import StudyConfig
from study.search import space
from study.search.samplers import make_sampler
from study.training.data.placement import DeviceData
from study.training.policies import make_policy
from study.training.trainer import Diverged, EpochResult, Trainer
from study.trial import checkpoint
from study.trial.checkpoint import _restore, on_host, to_bytes
from study.trial.metadata import device_name, peak_memory, versions
from study.trial.writer import TrialWriter

CHECKPOINT_SHARE = 0.01
"""The part of the time that checkpoints may take."""
LAST_WORDS_SECONDS = 3.5
"""How long a worker that was asked to stop may take to store what it has: Slurm and spot instances do not wait."""


class StopCheck(Protocol):
    """Whether a worker is to stop: asked after every step."""

    near: bool
    """Whether a budget is nearly spent, so that `look` is worth its query after every epoch."""

    def __call__(self) -> bool: ...

    def look(self) -> None: ...


class DatabaseUnavailable(Exception):
    """The database was away for longer than a worker waits; the trial's checkpoint is on this machine's disk."""


def make_trainer(config: StudyConfig, data: DeviceData, chosen: space.Parameters, seed: int) -> Trainer:
    """The Trainer of a trial with the parameters `chosen` over the config's."""
    parameters = space.settings(config, chosen)
    name = parameters["policy"]
    uses = {key: parameters[key] for key in space.USES[name]}
    if name == "dynamic":
        uses["decay"] = config.policy.decay
    if name == "infobatch":
        uses |= {"ratio": config.policy.ratio, "anneal": config.policy.anneal}
    return Trainer(
        data,
        make_policy(name, len(data.train_labels), seed, **uses),
        seed,
        epochs=parameters["epochs"],
        images=config.training.images,
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
    data: DeviceData,
    queue: Queue,
    lease: Lease,
    stop: StopCheck,
    say: Callable[[str], None],
    aside: Path,
) -> None:
    """Work on the leased trial until it is settled, or given back because it is to `stop`.

    Args:
        aside: folder for a checkpoint that could not be brought into the database; looked at before the trial starts.

    Raises:
        LeaseLost: another worker has the trial; nothing more was written.
        DatabaseUnavailable: the database was away for too long; the checkpoint lies in `aside`.
    """
    chosen, seed = retry(lambda: ask(study, config, lease), stopping=stop)
    trainer = make_trainer(config, data, chosen, seed)
    kept = aside / f"trial-{lease.number}.checkpoint"
    _restore(trainer, queue, lease, kept, say)

    unit = space.step_images(config)
    saved, every, diverged = time.monotonic(), config.checkpoint.every_seconds, ""
    if trainer.device.type == "cuda":
        torch.cuda.empty_cache()  # what is reserved for the trial before is not this one's peak
        torch.cuda.reset_peak_memory_stats(trainer.device)
    with TrialWriter(study, queue, lease, store=config.checkpoint.store) as scribe:
        for n in range(scribe.told, len(trainer.history)):  # to the checkpoint, but not to the database
            known = trainer.history[: n + 1]
            scribe.tell(known[-1], reports(known, unit), last=trainer.over and n + 1 == len(trainer.history))
        try:
            for result in trainer.run():
                if result is not None:
                    scribe.tell(result, reports(trainer.history, unit), last=trainer.over)
                    if stop.near:  # the budget counts what is stored
                        scribe.flush(LAST_WORDS_SECONDS)
                        stop.look()
                if lease.lost.is_set():
                    raise LeaseLost(f"trial {lease.number} has been taken over")
                if scribe.fault is not None or (scribe.pruned is not None and len(trainer.history) >= scribe.pruned):
                    break
                if stop():
                    _give_back(trainer, scribe, queue, lease, kept, say)
                    return
                if not scribe.saving and time.monotonic() - saved >= every:
                    synchronize(trainer.device)  # the wait is training's, not the checkpoint's
                    started = time.monotonic()
                    scribe.save(len(trainer.history), on_host(trainer.state_dict()))
                    saved = time.monotonic()
                    cost = scribe.cost + saved - started
                    every = max(config.checkpoint.every_seconds, cost / CHECKPOINT_SHARE)
        except Diverged as error:
            diverged = str(error)
        scribe.flush()
        if scribe.fault is not None:
            if not is_transient(scribe.fault):
                raise scribe.fault
            checkpoint.keep(kept, to_bytes(trainer.state_dict()))
            raise DatabaseUnavailable(str(scribe.fault)) from scribe.fault
    if diverged and scribe.pruned is None:
        queue.fail(lease, diverged)
        say(f"trial {lease.number} failed: {diverged}")
        return
    history = trainer.history if scribe.pruned is None else trainer.history[: scribe.pruned]
    state = TrialState.COMPLETE if scribe.pruned is None else TrialState.PRUNED
    _settle(study, config, queue, lease, state, trainer, history)
    kept.unlink(missing_ok=True)


def ask(study: optuna.Study, config: StudyConfig, lease: Lease) -> tuple[space.Parameters, int]:
    """What `Study.ask` does, for a trial that exists: its parameters, drawn where it has none, and its seed."""
    study.sampler = make_sampler(config, lease.number)
    forget_cached_trials(study)  # as ask does: samplers must see what has finished since
    trial = optuna.Trial(study, lease.trial_id)
    return space.suggest(trial, config), int(trial.user_attrs.get("seed", config.search.seed))


def best(history: list[EpochResult]) -> EpochResult:
    """The epoch with the highest accuracy; ties go to the earlier."""
    return max(history, key=lambda result: (result.accuracy, -result.epoch))


def reports(history: list[EpochResult], unit: int | None) -> dict[int, float]:
    """What the last epoch of `history` reports, step to value: the best accuracy so far.

    Args:
        unit: images a step; None: a step is an epoch.
    """
    if unit is None:
        return {len(history): best(history).accuracy}
    after = sum(result.images for result in history)
    before = after - history[-1].images
    found = {}
    for step in range(before // unit + 1, after // unit + 1):
        ended = history if step * unit == after else history[:-1]
        if ended:
            found[step] = best(ended).accuracy
    return found


def _give_back(
    trainer: Trainer, scribe: TrialWriter, queue: Queue, lease: Lease, kept: Path, say: Callable[[str], None]
) -> None:
    """Asked to stop: the checkpoint into the database and the trial claimable at once, or the checkpoint onto disk."""
    scribe.save(len(trainer.history), on_host(trainer.state_dict()))
    if scribe.flush(LAST_WORDS_SECONDS) and not scribe.unsaved:
        queue.release(lease)
    elif scribe.unsaved:
        say(f"trial {lease.number}: its checkpoint could not be stored: {scribe.unsaved}")
        queue.release(lease)
    elif not isinstance(scribe.fault, LeaseLost):
        checkpoint.keep(kept, to_bytes(trainer.state_dict()))
        say(f"trial {lease.number}: the database does not answer; its checkpoint is kept in {kept}")


def _settle(
    study: optuna.Study,
    config: StudyConfig,
    queue: Queue,
    lease: Lease,
    state: TrialState,
    trainer: Trainer,
    history: list[EpochResult],
) -> None:
    top, images = best(history), sum(result.images for result in history)
    values = [top.accuracy] if config.search.objective == "accuracy" else [top.accuracy, float(images)]
    frozen = retry(lambda: storage_of(study).get_trial(lease.trial_id))
    retry(lambda: study.sampler.after_trial(study, frozen, state, values))  # as study.tell does
    attributes = {
        "best_epoch": top.epoch,
        "epochs": len(history),
        "images": images,
        "seen": history[-1].seen,
        "train_seconds": round(sum(result.train_seconds for result in history), 3),
        "validation_seconds": round(sum(result.validation_seconds for result in history), 3),
        "selection_seconds": round(sum(result.selection_seconds for result in history), 3),
        "peak_memory_bytes": peak_memory(trainer.device),
        "precision": trainer.precision,
        "device": device_name(trainer.device),
        "host": platform.node(),
        "versions": versions(),
    }
    energy = [result.joules for result in history if result.joules is not None]
    if len(energy) == len(history):
        attributes["joules"] = round(sum(energy), 1)
    if state == TrialState.COMPLETE and config.data.test:
        attributes["test_accuracy"] = trainer.test()
    queue.finish(lease, state, values, attributes)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
