"""Palimpsest: one live, editable language model behind a REST service."""

__version__ = "0.1.0"
