"""A client that speaks HTTP on a bare socket, so that it can go without a word."""

from __future__ import annotations

import json
import socket
import struct
from dataclasses import dataclass
from typing import Self
from urllib.parse import urlsplit

from tests.patience import SECONDS
from tests.serving.reader import Question

AT_ONCE = struct.pack("ii", 1, 0)  # SO_LINGER: what is closed is reset


@dataclass(frozen=True, slots=True)
class RawClient:
    """One request under way."""

    socket: socket.socket

    @classmethod
    def ask(cls, url: str, question: Question, *, stream: bool) -> Self:
        address = urlsplit(url)
        connected = socket.create_connection((address.hostname, address.port), SECONDS)
        body = json.dumps({**question.body, "stream": stream}).encode()
        head = (
            f"POST /generate HTTP/1.1\r\nHost: {address.netloc}\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        connected.sendall(head.encode() + body)
        return cls(connected)

    def die(self, *, reset: bool) -> None:
        """As the kernel ends the connection of a process that is killed: with a reset where
        something was still to be read, else with an end."""
        if reset:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, AT_ONCE)
        self.socket.close()
