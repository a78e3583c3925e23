"""Alembic's environment; the connection is passed by `remediator.record.database`."""

from alembic import context

from remediator.record.schema import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata, render_as_batch=True)
with context.begin_transaction():
    context.run_migrations()
