"""The address a server listens at."""

from __future__ import annotations

import pytest

from app.cli.listener import bind, url_of
from app.errors import SettingsError


def test_a_taken_port_is_said_before_anything_is_loaded() -> None:
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        with pytest.raises(SettingsError, match="--port"):
            bind("127.0.0.1", taken.getsockname()[1])


def test_urls_bracket_version_6_addresses() -> None:
    assert url_of("127.0.0.1", 8000) == "http://127.0.0.1:8000"
    assert url_of("::1", 8000) == "http://[::1]:8000"
