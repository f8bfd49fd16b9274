"""Our tables beside Optuna's, their version, and those of Optuna's that we read and write ourselves.

A change of our tables needs a new `SCHEMA_VERSION` and a migration: `storage/migrations`.
"""

from __future__ import annotations

import sqlalchemy as sa
from optuna.trial import TrialState

from storage.optuna_internals import models

SCHEMA_VERSION = "0005"
"""Of our tables; the newest of `storage/migrations/versions`."""
BASELINE = "0001"
"""Of tables without a version: program version 0.1.0."""
VERSION = sa.Table("study_alembic_version", sa.MetaData(), sa.Column("version_num", sa.String(32), primary_key=True))
"""Alembic's, for our tables; Optuna's own is `alembic_version`."""

METADATA = sa.MetaData()

LATEST = 1e11
"""Seconds since 1970 up to which a time is a date. A database may hold any number."""
MOST_CHARACTERS = 500
"""Of a line that a worker logged about a trial."""

LEASES = sa.Table(
    "trial_leases",
    METADATA,
    sa.Column("trial_id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("token", sa.Integer, nullable=False, doc="Grows by one at every claim; an older token writes nothing."),
    sa.Column("owner", sa.String(255), nullable=False, doc="host:pid of the worker that claimed last."),
    sa.Column(
        "expires_at",
        sa.Double,
        nullable=False,
        doc="Seconds since 1970 on the database's clock; 0: released.",
    ),
    sa.Column("attempts", sa.Integer, nullable=False, doc="Claims in a row that got no epoch further."),
    sa.Column("last_error", sa.Text, doc="Why the last attempt ended, if it failed."),
    sa.Column("seconds", sa.Double, doc="How long a claim or renewal lasts; NULL: claimed by version 0.1.0."),
)

CHECKPOINTS = sa.Table(
    "trial_checkpoints",
    METADATA,
    sa.Column("trial_id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("token", sa.Integer, nullable=False),
    sa.Column("epoch", sa.Integer, nullable=False, doc="Whole epochs done."),
    sa.Column("sha256", sa.String(64), nullable=False),
    sa.Column("payload", sa.LargeBinary, doc="The checkpoint, if it is stored here."),
    sa.Column("location", sa.Text, doc="Else the name of its file in the study's checkpoint store."),
)

ARTIFACTS = sa.Table(
    "trial_artifacts",
    METADATA,
    sa.Column("artifact_id", sa.String(36), primary_key=True, doc="Optuna's: a UUID, which `artifacts:ID` describes."),
    sa.Column("trial_id", sa.Integer, nullable=False, index=True),
    sa.Column("token", sa.Integer, nullable=False, doc="Of the lease under which it was stored."),
    sa.Column("size", sa.Integer, nullable=False, doc="Bytes."),
    sa.Column("sha256", sa.String(64), nullable=False),
    sa.Column("location", sa.Text, doc="The name of its file in the study's artifact store; NULL: it is in chunks."),
)

ARTIFACT_CHUNKS = sa.Table(
    "trial_artifact_chunks",
    METADATA,
    sa.Column("trial_id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("artifact_id", sa.String(36), primary_key=True),
    sa.Column("position", sa.Integer, primary_key=True, autoincrement=False, doc="From 0."),
    sa.Column("content", sa.LargeBinary, nullable=False, doc="1 MiB; the last may be shorter."),
)

EPOCHS = sa.Table(
    "trial_epochs",
    METADATA,
    sa.Column("trial_id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("epoch", sa.Integer, primary_key=True, autoincrement=False, doc="From 1."),
    sa.Column("accuracy", sa.Double, nullable=False, doc="Validation accuracy in [0, 1]."),
    sa.Column("loss", sa.Double, nullable=False, doc="Mean training loss, nats."),
    sa.Column("images", sa.Integer, nullable=False, doc="Images trained on in the epoch."),
    sa.Column("train_seconds", sa.Double, nullable=False),
    sa.Column("validation_seconds", sa.Double, nullable=False),
    sa.Column(
        "kind", sa.String(8), nullable=False, doc="What the policy did after: keep, type1, type2, fresh or soft."
    ),
    sa.Column("k", sa.Integer, nullable=False, doc="Images exchanged."),
    sa.Column("beta", sa.Double, nullable=False, doc="The beta that gave k."),
    sa.Column(
        "decision", sa.String(8), doc="The pruner's, made once: go or prune; NULL: none was asked for, or not yet."
    ),
    # NULL in rows of development versions before 0.1.0.
    sa.Column("selection_seconds", sa.Double, doc="Choosing the epoch's images."),
    sa.Column("seen", sa.Integer, doc="Different images trained on up to here."),
    sa.Column("joules", sa.Double, doc="Energy of the epoch; NULL: the device does not tell."),
    # NULL in rows of versions before schema version 0004.
    sa.Column("validation_loss", sa.Double, doc="Mean cross entropy of the validation images, nats."),
    sa.Column("balanced_accuracy", sa.Double, doc="Mean validation accuracy of the classes, in [0, 1]."),
    sa.Column("macro_f1", sa.Double, doc="Mean F1 score of the classes on the validation images, in [0, 1]."),
)

ATTEMPTS = sa.Table(
    "trial_attempts",
    METADATA,
    sa.Column("trial_id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("token", sa.Integer, primary_key=True, autoincrement=False, doc="The lease's."),
    sa.Column("owner", sa.String(255), nullable=False, doc="host:pid of the worker."),
    sa.Column("device", sa.String(255), nullable=False, doc="What it trained on."),
    sa.Column("started_at", sa.Double, nullable=False, doc="Seconds since 1970 on the database's clock."),
    sa.Column("ended_at", sa.Double, doc="NULL: running, or vanished and not taken over yet."),
    sa.Column("outcome", sa.String(8), doc="finished, released, error, vanished, or skipped."),
    sa.Column("error", sa.Text),
    sa.Column("images", sa.Integer, doc="Trained on in this attempt, in whole epochs."),
    sa.Column("joules", sa.Double, doc="Energy of those epochs, where the device tells."),
    sa.Column("share", sa.Double, doc="Of a GPU, that the worker had; NULL: one."),
)

TRIAL_LOGS = sa.Table(
    "trial_logs",
    METADATA,
    sa.Column("trial_id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("token", sa.Integer, primary_key=True, autoincrement=False, doc="The attempt's."),
    sa.Column("position", sa.Integer, primary_key=True, autoincrement=False, doc="Growing from 0; at most 199."),
    sa.Column("at", sa.Double, nullable=False, doc="Seconds since 1970 on the database's clock."),
    sa.Column("level", sa.String(8), nullable=False, doc="debug, info, warning, error or critical."),
    sa.Column("message", sa.String(MOST_CHARACTERS), nullable=False, doc="One line, without control characters."),
)

SPENDING = sa.Table(
    "study_spending",
    METADATA,
    sa.Column("study_id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("at", sa.Double, nullable=False, doc="Seconds since 1970 when the adding up began."),
    sa.Column("took", sa.Double, nullable=False, doc="Seconds that adding up took."),
    sa.Column("spent", sa.Text, nullable=False, doc="The sums, as JSON."),
)

# Optuna's own tables, through its models: names and types stay its business.
STUDIES: sa.Table = models.StudyModel.__table__
STUDY_SYSTEM_ATTRS: sa.Table = models.StudySystemAttributeModel.__table__
STUDY_ATTRS: sa.Table = models.StudyUserAttributeModel.__table__
TRIALS: sa.Table = models.TrialModel.__table__
TRIAL_PARAMS: sa.Table = models.TrialParamModel.__table__
TRIAL_ATTRS: sa.Table = models.TrialUserAttributeModel.__table__
TRIAL_SYSTEM_ATTRS: sa.Table = models.TrialSystemAttributeModel.__table__
TRIAL_VALUES: sa.Table = models.TrialValueModel.__table__
REPORTS: sa.Table = models.TrialIntermediateValueModel.__table__
REPORT_TYPE = models.TrialIntermediateValueModel.TrialIntermediateValueType
VALUE_TYPE = models.TrialValueModel.TrialValueType


UNFINISHED = (TrialState.WAITING, TrialState.RUNNING)


FINISHED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
