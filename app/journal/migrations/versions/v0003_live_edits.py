"""Which edits a revision's weights hold, what a guard measured, and the caller's request keys."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision: str | None = "0002"
branch_labels = None
depends_on = None

LISTS = {"revisions": ("withdrawn", "contributions"), "edits": ("checks",)}
TEXTS = {"request_key": sa.String(255), "fingerprint": sa.String(64)}


def upgrade() -> None:
    # No batch: it would copy the table, whose rows others refer to.
    for table, names in LISTS.items():
        for name in names:
            op.add_column(table, sa.Column(name, sa.Text, nullable=False, server_default="[]"))
    for name, kind in TEXTS.items():
        op.add_column("edits", sa.Column(name, kind, nullable=True))
    op.create_index("ix_edits_request_key", "edits", ["request_key"])


def downgrade() -> None:
    op.drop_index("ix_edits_request_key", "edits")
    for name in TEXTS:
        op.drop_column("edits", name)
    for table, names in LISTS.items():
        for name in names:
            op.drop_column(table, name)
