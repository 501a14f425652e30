"""Use cases: what the API may ask for, in the order that keeps weights and journal true."""

from app.service.live_model import Head
from app.service.service import Service

__all__ = ["Head", "Service"]
