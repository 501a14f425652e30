"""Those who watch the service."""

from __future__ import annotations

from app.domain import Cause
from app.ports import EditEnded, Observer, ReadEnded


class Observers:
    """Tells every observer what one is told; nobody watches at first. Thread-safe."""

    def __init__(self) -> None:
        self._told: tuple[Observer, ...] = ()

    def add(self, observer: Observer) -> None:
        self._told = (*self._told, observer)

    def read_ended(self, end: ReadEnded) -> None:
        for observer in self._told:
            observer.read_ended(end)

    def edit_ended(self, end: EditEnded) -> None:
        for observer in self._told:
            observer.edit_ended(end)

    def committed(self, cause: Cause, seconds: float) -> None:
        for observer in self._told:
            observer.committed(cause, seconds)
