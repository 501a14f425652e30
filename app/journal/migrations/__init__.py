"""Alembic's migrations of the journal; ``app.journal.database`` runs them."""
