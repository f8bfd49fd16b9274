"""Completes the tables, renames `ticket` to `queue_position` and `settled` to `finished`, and reduces checkpoint
locations to file names.

Development versions before 0.1.0 lacked some columns and tables; all of them count as schema version 0001.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

COLUMNS: dict[str, tuple[tuple[str, Any], ...]] = {
    "trial_epochs": (("selection_seconds", sa.Double), ("seen", sa.Integer), ("joules", sa.Double)),
    "trial_attempts": (("images", sa.Integer), ("joules", sa.Double), ("share", sa.Double)),
    "trial_leases": (("seconds", sa.Double),),
}
OURS = (
    "trial_id IN (SELECT trials.trial_id FROM trials JOIN study_user_attributes AS a ON a.study_id = trials.study_id "
    "WHERE a.key = 'config')"
)
"""Only trials of studies that this program created: another program's `ticket` stays."""


def upgrade() -> None:
    inspector = sa.inspect(op.get_bind())
    tables = set(inspector.get_table_names())
    if "trial_attempts" not in tables:
        op.create_table(
            "trial_attempts",
            sa.Column("trial_id", sa.Integer, primary_key=True, autoincrement=False),
            sa.Column("token", sa.Integer, primary_key=True, autoincrement=False),
            sa.Column("owner", sa.String(255), nullable=False),
            sa.Column("device", sa.String(255), nullable=False),
            sa.Column("started_at", sa.Double, nullable=False),
            sa.Column("ended_at", sa.Double),
            sa.Column("outcome", sa.String(8)),
            sa.Column("error", sa.Text),
            *(sa.Column(name, kind) for name, kind in COLUMNS["trial_attempts"]),
        )
    if "study_spending" not in tables:
        op.create_table(
            "study_spending",
            sa.Column("study_id", sa.Integer, primary_key=True, autoincrement=False),
            sa.Column("at", sa.Double, nullable=False),
            sa.Column("took", sa.Double, nullable=False),
            sa.Column("spent", sa.Text, nullable=False),
        )
    for table in sorted(tables & COLUMNS.keys()):
        present = {column["name"] for column in inspector.get_columns(table)}
        for name, kind in COLUMNS[table]:
            if name not in present:
                op.add_column(table, sa.Column(name, kind))
    op.execute(f"UPDATE trial_user_attributes SET key = 'queue_position' WHERE key = 'ticket' AND {OURS}")
    op.execute("UPDATE trial_attempts SET outcome = 'finished' WHERE outcome = 'settled'")
    # All but what follows the last slash, in functions that SQLite and PostgreSQL share.
    folder = "rtrim(location, replace(location, '/', ''))"
    op.execute(f"UPDATE trial_checkpoints SET location = replace(location, {folder}, '') WHERE location LIKE '%/%'")
