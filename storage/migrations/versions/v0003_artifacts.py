"""Tables for the models that trials leave."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.create_table(
        "trial_artifacts",
        sa.Column("artifact_id", sa.String(36), primary_key=True),
        sa.Column("trial_id", sa.Integer, nullable=False),
        sa.Column("token", sa.Integer, nullable=False),
        sa.Column("size", sa.Integer, nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("location", sa.Text),
    )
    op.create_index("ix_trial_artifacts_trial_id", "trial_artifacts", ["trial_id"])
    op.create_table(
        "trial_artifact_chunks",
        sa.Column("trial_id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("artifact_id", sa.String(36), primary_key=True),
        sa.Column("position", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("content", sa.LargeBinary, nullable=False),
    )
