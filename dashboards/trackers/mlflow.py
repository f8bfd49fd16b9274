"""MLflow: an experiment a study, a run a trial, found again by tags. Credentials are MLflow's own variables."""

from __future__ import annotations

import os

from mlflow.entities import Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from dashboards.trackers.replay import Trial
from storage.errors import UserError

BATCH = 900
"""Metrics in one request; MLflow takes 1,000."""
UID, TRIAL, EPOCHS, STATE = "study.uid", "study.trial", "study.epochs", "study.state"
"""Tags of a run."""


def connect(at: str | None, study: str) -> MLflow:
    """Raises:
    UserError: no tracking URI, or no answer from it.
    """
    uri = at or os.environ.get("MLFLOW_TRACKING_URI")
    if uri is None:
        raise UserError("--to mlflow needs a tracking URI: give --at or set $MLFLOW_TRACKING_URI")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # else a wrong address is tried for minutes
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    try:
        client = MlflowClient(tracking_uri=uri)
        experiment = client.get_experiment_by_name(study)
        return MLflow(client, client.create_experiment(study) if experiment is None else experiment.experiment_id)
    except MlflowException as error:
        raise UserError(f"MLflow cannot be used: {str(error).splitlines()[0]}") from None


class MLflow:
    def __init__(self, client: MlflowClient, experiment: str) -> None:
        self.client, self.experiment = client, experiment
        self.runs: dict[str, dict[int, Run]] = {}

    def publish(self, trial: Trial) -> int:
        run = self._run(trial)
        there = int(run.data.tags.get(EPOCHS, 0))
        new = [epoch for epoch in trial.epochs if epoch.number > there]
        ended = run.data.tags.get(STATE) == trial.state
        if not new and (ended or not trial.finished):
            return 0
        metrics = [Metric(n, v, _ms(epoch.at), epoch.number) for epoch in new for n, v in epoch.values.items()]
        if trial.finished:
            last = trial.epochs[-1].number if trial.epochs else 0
            metrics += [Metric(name, value, _ms(trial.ended_at), last) for name, value in trial.results.items()]
        # MLflow keeps one of two equal metrics, so what was sent before an interruption may be sent again.
        for start in range(0, len(metrics), BATCH):
            self.client.log_batch(run.info.run_id, metrics=metrics[start : start + BATCH])
        tags = [RunTag(EPOCHS, str(trial.epochs[-1].number if trial.epochs else 0)), RunTag(STATE, trial.state)]
        self.client.log_batch(run.info.run_id, tags=tags)
        if trial.finished:
            status = "FAILED" if trial.state == "failed" else "FINISHED"
            self.client.set_terminated(run.info.run_id, status, _ms(trial.ended_at))
        self.runs[trial.uid][trial.number] = self.client.get_run(run.info.run_id)
        return len(new)

    def _run(self, trial: Trial) -> Run:
        """The trial's run, which is made where it is missing."""
        if trial.uid not in self.runs:
            self.runs[trial.uid] = self._known(trial.uid)
        known = self.runs[trial.uid]
        if trial.number not in known:
            tags = {UID: trial.uid, TRIAL: str(trial.number)}
            run = self.client.create_run(
                self.experiment, _ms(trial.started_at), tags, run_name=f"{trial.study} trial {trial.number}"
            )
            params = [Param(name, str(value)) for name, value in trial.parameters.items()]
            self.client.log_batch(run.info.run_id, params=params)
            known[trial.number] = run
        return known[trial.number]

    def _known(self, uid: str) -> dict[int, Run]:
        known: dict[int, Run] = {}
        token = None
        while True:
            page = self.client.search_runs([self.experiment], f"tags.`{UID}` = '{uid}'", page_token=token)
            known |= {int(run.data.tags[TRIAL]): run for run in page}
            token = page.token
            if not token:
                return known


def _ms(seconds: float) -> int:
    return round(1000 * seconds)
