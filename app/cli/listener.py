"""The address a server listens at: bound, and as a URL."""

from __future__ import annotations

import socket

from app.errors import SettingsError


def bind(host: str, port: int) -> socket.socket:
    """A bound socket, before the minutes a large model may take to load."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio turns Nagle's algorithm off only where the protocol is named; on, it holds each
    # answer on a kept connection back for 40 ms.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise SettingsError(
            f"Can't listen on {host}:{port}: {reason}; choose another --host or --port."
        ) from error
    return listener


def url_of(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
