"""The durable record: a hash-chained log with read tables, and content-addressed deltas."""

from app.journal.journal import Journal
from app.journal.store import DeltaStore

__all__ = ["DeltaStore", "Journal"]
