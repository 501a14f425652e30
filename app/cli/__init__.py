"""The command line: ``palimpsest serve`` and everything one asks a running server."""

from app.cli.application import cli, main

__all__ = ["cli", "main"]
