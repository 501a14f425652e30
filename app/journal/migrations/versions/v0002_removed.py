"""What a revision or a sandbox takes out of the state it builds on."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision: str | None = "0001"
branch_labels = None
depends_on = None

TABLES = ("revisions", "sandboxes")


def upgrade() -> None:
    # No batch: it would copy the table, whose rows others refer to.
    for table in TABLES:
        op.add_column(table, sa.Column("removed", sa.Text, nullable=False, server_default="[]"))


def downgrade() -> None:
    for table in TABLES:
        op.drop_column(table, "removed")
