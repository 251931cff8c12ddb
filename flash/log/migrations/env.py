"""What Alembic runs: its commands come with an open connection (`flash/log/store.py`)."""

from alembic import context

from flash.log.schema import METADATA

context.configure(connection=context.config.attributes["connection"], target_metadata=METADATA)
with context.begin_transaction():
    context.run_migrations()
