"""Columns for what an epoch reaches beside accuracy: loss, balanced accuracy and macro F1 on the validation images."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    for name in ("validation_loss", "balanced_accuracy", "macro_f1"):
        op.add_column("trial_epochs", sa.Column(name, sa.Double))
