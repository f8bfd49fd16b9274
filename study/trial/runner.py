"""One trial: its parameters, the epochs of its Trainer, what is reported of them, and its value.

A trial's value is its best validation accuracy over the epochs, as in the paper. At epoch n it therefore reports its
best accuracy up to n, not that epoch's: the last report of a finished trial is its value, a pruned trial's value
(Optuna takes the last report) is the value it would have had if it had ended there, and a pruner that compares trials
at step n compares what they would be worth if all stopped at n. One bad epoch prunes nothing. The accuracy of each
epoch is in `trial_epochs`, and the learning curves show it.

With `pruning.step = "images"` a step is not an epoch but as many images trained on as the smallest alpha: an epoch of
alpha = 5,000 and one of 45,000 are not the same work. The report at step s is then the best accuracy of the epochs that
had ended when that many images had been trained on: an epoch counts once all of its images have been paid for.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import optuna
import torch
from optuna.distributions import BaseDistribution
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from storage import artifacts
from storage.artifacts import NewArtifact
from storage.optuna_internals import forget_cached_trials, storage_of, with_storage
from storage.origins import informed_by
from storage.queue import Lease, LeaseLost, Queue
from storage.retry import is_transient, retry
from study.config.models import StudyConfig
from study.model_file import ModelDescription
from study.model_file import to_bytes as model_bytes
from study.search import space, warm_start
from study.search.samplers import make_sampler, sampler_seed
from study.training.data.placement import DeviceData
from study.training.trainer import Diverged, EpochResult, Metric, Trainer
from study.trial import components
from study.trial.checkpoint import Identity, on_host, restore, to_bytes, write_fallback
from study.trial.logged import FINISHED, NOT_ON_CONSOLE, collect
from study.trial.metadata import checkpoint_identity, model_description, trial_attributes
from study.trial.writer import TrialWriter

logger = logging.getLogger(__name__)

CHECKPOINT_SHARE = 0.01
"""The part of the time that checkpoints may take."""
RELEASE_SECONDS = 3.5
"""How long a worker that was asked to stop may take to store what it has: Slurm and spot instances do not wait."""


class StopCheck(Protocol):
    """Whether a worker is to stop: asked after every step."""

    near_limit: bool
    """Whether a budget is nearly spent, so that `check` is worth its query after every epoch."""

    def __call__(self) -> bool: ...

    def check(self) -> None: ...


class DatabaseUnavailable(Exception):
    """The database was unavailable for longer than a worker waits. What it trained is in the fallback folder."""


class InvalidParameters(Exception):
    """A trial that somebody else queued has parameters that this study cannot run."""


def make_trainer(config: StudyConfig, data: DeviceData, chosen: space.Parameters, seed: int) -> Trainer:
    """The Trainer of a trial with the parameters `chosen` over the config's."""
    parameters = space.settings(config, chosen)
    return Trainer(
        data,
        components.make_network(parameters, data.shape, data.classes, seed),
        components.make_policy(parameters, len(data.train_labels), seed),
        seed,
        components.training_options(config, parameters),
    )


def run_trial(
    study: optuna.Study,
    config: StudyConfig,
    data: DeviceData,
    queue: Queue,
    lease: Lease,
    stop: StopCheck,
    fallback_folder: Path,
) -> None:
    """Run the leased trial until it has finished, or is released because the worker is to `stop`.

    Args:
        fallback_folder: for a checkpoint that could not be stored in the database; read before the trial starts.

    Raises:
        LeaseLost: another worker has the trial; nothing more was written.
        DatabaseUnavailable: for too long; the checkpoint is in the fallback folder.
    """
    with collect(lease):
        _run_trial(study, config, data, queue, lease, stop, fallback_folder)


def _run_trial(
    study: optuna.Study,
    config: StudyConfig,
    data: DeviceData,
    queue: Queue,
    lease: Lease,
    stop: StopCheck,
    fallback_folder: Path,
) -> None:
    try:
        chosen, seed = retry(lambda: ask(study, config, lease, len(data.train_labels)), stopping=stop)
    except InvalidParameters as error:  # another attempt could only fail again
        logger.warning("trial %d failed: %s", lease.number, error)  # first: its end takes the line along
        queue.fail(lease, str(error))
        return
    what = ", ".join([*space.labels(chosen), f"seed {seed}"])
    logger.info("trial %d: %s, on %s", lease.number, what, queue.device or data.device, extra=NOT_ON_CONSOLE)
    identity = checkpoint_identity(study, config, space.settings(config, chosen), seed)
    fallback = fallback_folder / f"trial-{lease.number}.checkpoint"
    trainer = restore(lambda: make_trainer(config, data, chosen, seed), queue, lease, fallback, identity)
    if trainer.device.type == "cuda":
        torch.cuda.empty_cache()  # what is reserved for the trial before is not this one's peak
        torch.cuda.reset_peak_memory_stats(trainer.device)
    diverged = ""
    with TrialWriter(study, queue, lease, identity=identity, store=config.checkpoint.store) as writer:
        writer.write_log()
        _write_missing_epochs(trainer, writer, space.step_images(config), config.search.metric)
        try:
            if not _train(config, trainer, writer, lease, stop):
                _release(trainer, writer, queue, lease, fallback, identity)
                return
        except Diverged as error:
            diverged = str(error)
        writer.flush()
        if writer.error is not None:
            if not is_transient(writer.error):
                raise writer.error
            write_fallback(fallback, to_bytes(trainer.state_dict(), identity))
            raise DatabaseUnavailable(str(writer.error)) from writer.error
    if diverged and writer.pruned_at is None:
        logger.warning("trial %d failed: %s", lease.number, diverged)
        queue.fail(lease, diverged)
        return
    history = trainer.history if writer.pruned_at is None else trainer.history[: writer.pruned_at]
    state = TrialState.COMPLETE if writer.pruned_at is None else TrialState.PRUNED
    _finish(study, config, queue, lease, state, trainer, history, chosen, seed)
    fallback.unlink(missing_ok=True)


def _write_missing_epochs(trainer: Trainer, writer: TrialWriter, unit: int | None, metric: Metric) -> None:
    """The epochs that reached the checkpoint, but not the database."""
    for n in range(writer.epochs_done, len(trainer.history)):
        history = trainer.history[: n + 1]
        writer.write_epoch(
            history[-1], reports(history, unit, metric), last=trainer.over and n + 1 == len(trainer.history)
        )


def _train(config: StudyConfig, trainer: Trainer, writer: TrialWriter, lease: Lease, stop: StopCheck) -> bool:
    """Train to the end of the trial, or until it is pruned or the writer has failed. False: until `stop` said so.

    Raises:
        LeaseLost, Diverged.
    """
    unit = space.step_images(config)
    saved, every = time.monotonic(), config.checkpoint.every_seconds
    for result in trainer.run():
        if result is not None:
            writer.write_epoch(result, reports(trainer.history, unit, config.search.metric), last=trainer.over)
            if stop.near_limit:  # the budget counts what is stored
                writer.flush(RELEASE_SECONDS)
                stop.check()
        if lease.lost.is_set():
            raise LeaseLost(f"trial {lease.number} has been taken over, finished or deleted by somebody else")
        if writer.error is not None or (writer.pruned_at is not None and len(trainer.history) >= writer.pruned_at):
            break
        if stop():
            return False
        if not writer.saving and time.monotonic() - saved >= every:
            _warn_unsaved(writer, lease)
            synchronize(trainer.device)  # the wait is training's, not the checkpoint's
            started = time.monotonic()
            writer.write_checkpoint(len(trainer.history), on_host(trainer.state_dict()))
            saved = time.monotonic()
            cost = writer.checkpoint_seconds + saved - started
            every = max(config.checkpoint.every_seconds, cost / CHECKPOINT_SHARE)
    return True


_warned: set[str] = set()


def _warn_unsaved(writer: TrialWriter, lease: Lease) -> None:
    """Once a worker: a checkpoint that could not be stored costs nothing but what is trained again after a crash."""
    if writer.checkpoint_error and writer.store not in _warned:
        _warned.add(writer.store)
        logger.warning("trial %d: its checkpoint could not be stored: %s", lease.number, writer.checkpoint_error)


def ask(study: optuna.Study, config: StudyConfig, lease: Lease, train_images: int) -> tuple[space.Parameters, int]:
    """What `Study.ask` does, for a trial that exists: its parameters, drawn where it has none, and its seed.

    Raises:
        InvalidParameters: it was queued by somebody else with parameters outside what the study can run.
    """
    others = _informing_trials(study, config)
    from_others = warm_start.cma_es_trials(study, others) if config.search.sampler.kind == "cma-es" else None
    study.sampler = make_sampler(config, lease.number, from_others)
    forget_cached_trials(study)
    seen = study if config.search.sampler.kind == "cma-es" else warm_start.informed(study, others)
    trial = optuna.Trial(seen, lease.trial_id)
    try:
        chosen = (
            _feasible(seen, config, trial, lease.trial_id)
            if config.search.constraints
            else space.suggest(trial, config)
        )
    except ValueError as error:
        raise InvalidParameters(f"its parameters do not fit this study: {error}") from None
    finally:
        forget_cached_trials(study)  # which hold the other study's
    faults = config.faults_of(chosen)
    faults += [f"they break the constraint {text!r}" for text in space.broken_constraints(config, chosen)]
    if chosen.get("alpha", 0) > train_images:
        faults.append(f"alpha must be at most the {train_images} training images, got {chosen['alpha']}")
    if faults:
        raise InvalidParameters(f"its parameters do not fit this study: {'; '.join(faults)}")
    return chosen, int(trial.user_attrs.get("seed", config.search.seed))


def _informing_trials(study: optuna.Study, config: StudyConfig) -> list[FrozenTrial]:
    """Those of another study, from which the sampler learns too."""
    if not warm_start.can_learn(config):
        return []
    other = informed_by(study.user_attrs)
    return [] if other is None else warm_start.informing_trials(config, other.trials)


MOST_DRAWS = 100
"""Of a trial's parameters, until they satisfy the constraints."""


def _feasible(study: optuna.Study, config: StudyConfig, trial: optuna.Trial, trial_id: int) -> space.Parameters:
    """The trial's parameters: the sampler's first draw that satisfies the constraints. No other is stored.

    A sampler with a model knows nothing of constraints and may draw again and again where they do not hold; after
    MOST_DRAWS the same number is drawn at random.

    Raises:
        ValueError: none of them does.
    """
    if trial.params:  # queued with some, or drawn by an attempt before: those stay
        return space.suggest(trial, config)
    storage = storage_of(study)
    for draw in range(2 * MOST_DRAWS):
        if draw == MOST_DRAWS:
            study.sampler = optuna.samplers.RandomSampler(seed=sampler_seed(config, trial.number))
        recorder = _ParameterRecorder(storage)
        shadow = with_storage(study, recorder, study.study_name)  # type: ignore[arg-type]
        chosen = space.suggest(optuna.Trial(shadow, trial_id), config)
        if not space.broken_constraints(config, chosen):
            for name, value, distribution in recorder.parameters:
                storage.set_trial_param(trial_id, name, value, distribution)
            return chosen
    raise ValueError(f"none of {2 * MOST_DRAWS} draws satisfies search.constraints")


class _ParameterRecorder:
    """A storage as a sampler sees it, which keeps the parameters that are drawn instead of storing them."""

    def __init__(self, storage: BaseStorage) -> None:
        self._storage = storage
        self.parameters: list[tuple[str, float, BaseDistribution]] = []

    def set_trial_param(self, trial_id: int, name: str, value: float, distribution: BaseDistribution) -> None:
        self.parameters.append((name, value, distribution))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._storage, name)


def best(history: list[EpochResult], metric: Metric = "accuracy") -> EpochResult:
    """The epoch with the highest value of the metric; ties go to the earlier."""
    return max(history, key=lambda result: (result.score(metric), -result.epoch))


def reports(history: list[EpochResult], unit: int | None, metric: Metric = "accuracy") -> dict[int, float]:
    """What the last epoch of `history` reports, step to value: the best value of the metric so far.

    Args:
        unit: images a step; None: a step is an epoch.
    """
    if unit is None:
        return {len(history): best(history, metric).score(metric)}
    after = sum(result.images for result in history)
    before = after - history[-1].images
    values = {}
    for step in range(before // unit + 1, after // unit + 1):
        ended = history if step * unit == after else history[:-1]
        if ended:
            values[step] = best(ended, metric).score(metric)
    return values


def _release(
    trainer: Trainer, writer: TrialWriter, queue: Queue, lease: Lease, fallback: Path, identity: Identity
) -> None:
    """Asked to stop: store the checkpoint and make the trial claimable at once, or write the checkpoint to disk."""
    writer.write_checkpoint(len(trainer.history), on_host(trainer.state_dict()))
    if writer.flush(RELEASE_SECONDS) or writer.checkpoint_error:
        _warn_unsaved(writer, lease)
        done = len(trainer.history)
        logger.info("trial %d is interrupted after epoch %d", lease.number, done, extra=NOT_ON_CONSOLE)
        queue.release(lease)
    elif not isinstance(writer.error, LeaseLost):
        write_fallback(fallback, to_bytes(trainer.state_dict(), identity))
        logger.warning("trial %d: the database does not answer; its checkpoint is in %s", lease.number, fallback)


def _finish(
    study: optuna.Study,
    config: StudyConfig,
    queue: Queue,
    lease: Lease,
    state: TrialState,
    trainer: Trainer,
    history: list[EpochResult],
    chosen: space.Parameters,
    seed: int,
) -> None:
    metric = config.search.metric
    top = best(history, metric)
    attributes: dict[str, Any] = {"best_epoch": top.epoch} | trial_attributes(trainer, history)
    values = [top.score(metric)]
    if config.search.objective != "accuracy":
        values.append(float(attributes["images"]))
    frozen = retry(lambda: storage_of(study).get_trial(lease.trial_id))
    retry(lambda: study.sampler.after_trial(study, frozen, state, values))  # as study.tell does
    if state == TrialState.COMPLETE and config.data.test:
        attributes["test_accuracy"] = getattr(trainer.test(), metric)
    artifact = None
    if state == TrialState.COMPLETE and trainer.best_network is not None:
        description = model_description(study, config, lease.number, trainer, top, chosen, seed)
        artifact = _keep_model(config, queue, lease, trainer.best_network, description)
    logger.info(
        "trial %d is %s: %s %.4f in epoch %d of %d, %.1f s", lease.number, state.name.lower(), metric,
        values[0], top.epoch, len(history), attributes["train_seconds"] + attributes["validation_seconds"],
        extra=FINISHED,
    )  # fmt: skip
    queue.finish(lease, state, values, attributes, artifact)


def _keep_model(
    config: StudyConfig, queue: Queue, lease: Lease, state: Mapping[str, torch.Tensor], description: ModelDescription
) -> NewArtifact | None:
    """Store the best epoch's network, if it is among the best of the study. A trial has finished without it too:
    whatever prevents it costs a warning.

    Raises:
        LeaseLost: another worker has the trial.
    """
    keep = config.artifacts.count
    try:
        if not artifacts.is_wanted(queue, lease, description.value, keep):
            return None
        content = model_bytes(state, description)
        return artifacts.save(queue, lease, content, store=config.artifacts.store, keep=keep)
    except LeaseLost:
        raise
    except Exception as error:  # noqa: BLE001 — a network of any kind, and a store of any kind
        logger.warning("trial %d: its model is not kept: %s", lease.number, error)
        return None


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
