"""What Alembic runs for each command, on the connection (and transaction) it was given."""

from alembic import context

from app.journal.tables import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    compare_type=True,
    render_as_batch=True,  # SQLite can't alter most of a table in place
    transactional_ddl=True,
)
with context.begin_transaction():
    context.run_migrations()
