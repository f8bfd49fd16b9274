"""What Alembic runs: the migrations, on the connection that `storage.migrations.migrate` was given."""

from __future__ import annotations

from alembic import context

from storage.schema import VERSION

context.configure(connection=context.config.attributes["connection"], version_table=VERSION.name)
with context.begin_transaction():
    context.run_migrations()
