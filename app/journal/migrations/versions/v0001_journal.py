"""The log, and the tables read from it."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision: str | None = None
branch_labels = None
depends_on = None

DIGEST = sa.String(64)
TIME = sa.String(32)
ID = sa.String(64)
NAME = sa.String(255)


def upgrade() -> None:
    _create_log()
    op.create_table(
        "revisions",
        sa.Column("number", sa.Integer, autoincrement=False, nullable=False),
        sa.Column("parent", sa.Integer),
        sa.Column("cause", sa.String(16), nullable=False),
        sa.Column("state_hash", DIGEST, nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("edit", ID),
        sa.Column("sandbox", ID),
        sa.Column("restored", sa.Integer),
        sa.Column("deltas", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("number", name="pk_revisions"),
        _revision_key("revisions", "parent"),
        _revision_key("revisions", "restored"),
    )
    _create_edits()
    op.create_table(
        "checkpoints",
        sa.Column("name", NAME, nullable=False),
        sa.Column("revision", sa.Integer, nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_checkpoints"),
        _revision_key("checkpoints", "revision"),
    )
    op.create_table(
        "sandboxes",
        sa.Column("id", ID, nullable=False),
        sa.Column("seq", sa.Integer, nullable=False),
        sa.Column("root", sa.Integer, nullable=False),
        sa.Column("edits", sa.Text, nullable=False),
        sa.Column("deltas", sa.Text, nullable=False),
        sa.Column("state_hash", DIGEST, nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_sandboxes"),
        sa.UniqueConstraint("seq", name="uq_sandboxes_seq"),
        _revision_key("sandboxes", "root"),
    )


def downgrade() -> None:
    for table in ("sandboxes", "checkpoints", "edits", "revisions", "log"):
        op.drop_table(table)


def _create_log() -> None:
    op.create_table(
        "log",
        sa.Column("seq", sa.Integer, autoincrement=False, nullable=False),
        sa.Column("kind", sa.String(32), nullable=False),
        sa.Column("body", sa.Text, nullable=False),
        sa.Column("previous", DIGEST, nullable=False),
        sa.Column("hash", DIGEST, nullable=False),
        sa.Column("at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("seq", name="pk_log"),
        sa.UniqueConstraint("hash", name="uq_log_hash"),
    )
    if op.get_bind().dialect.name == "sqlite":
        for verb in ("UPDATE", "DELETE"):
            op.execute(
                f"CREATE TRIGGER log_refuses_{verb.lower()} BEFORE {verb} ON log "
                "BEGIN SELECT RAISE(ABORT, 'the log is append-only'); END"
            )


def _create_edits() -> None:
    op.create_table(
        "edits",
        sa.Column("id", ID, nullable=False),
        sa.Column("seq", sa.Integer, nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("mode", sa.String(16), nullable=False),
        sa.Column("method", NAME, nullable=False),
        sa.Column("seed", sa.Text, nullable=False),
        sa.Column("parent", sa.Integer, nullable=False),
        sa.Column("revision", sa.Integer),
        sa.Column("hparams", sa.Text, nullable=False),
        sa.Column("outcomes", sa.Text, nullable=False),
        sa.Column("deltas", sa.Text, nullable=False),
        sa.Column("sandboxes", sa.Text, nullable=False),
        sa.Column("metrics", sa.Text, nullable=False),
        sa.Column("timings", sa.Text, nullable=False),
        sa.Column("state_hash", DIGEST),
        sa.Column("created_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_edits"),
        sa.UniqueConstraint("seq", name="uq_edits_seq"),
        _revision_key("edits", "parent"),
        _revision_key("edits", "revision"),
    )
    op.create_index("ix_edits_status", "edits", ["status"])


def _revision_key(table: str, column: str) -> sa.ForeignKeyConstraint:
    name = f"fk_{table}_{column}_revisions"
    return sa.ForeignKeyConstraint([column], ["revisions.number"], name=name)
