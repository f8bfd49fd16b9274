"""Migrations of our own tables (Alembic). Their version table is `study_alembic_version`; Optuna's is left alone.

A new version is a file in `versions/` and its number in `storage.schema.SCHEMA_VERSION`. A migration runs in the
transaction of the connection that it is given, so it happens as a whole or not at all.
"""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa


def migrate(connection: sa.Connection) -> None:
    """Bring our tables, which have a version, to `SCHEMA_VERSION`."""
    # Imported by need: Alembic takes longer to load than `study status` takes in all.
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
