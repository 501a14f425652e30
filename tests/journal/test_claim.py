from __future__ import annotations

from pathlib import Path

import pytest

from app.errors import SettingsError
from app.journal.claim import Claim


def test_a_journal_is_claimed_by_one_server_at_a_time(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'journal.db'}"
    first = Claim(url)
    with pytest.raises(SettingsError, match="Another server writes to this journal"):
        Claim(url)
    first.release()
    Claim(url).release()


def test_journals_apart_don_t_bar_each_other(tmp_path: Path) -> None:
    claims = [Claim(f"sqlite:///{tmp_path / name}.db") for name in ("a", "b")]
    claims += [Claim("sqlite://"), Claim("sqlite://")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.db.lock", "b.db.lock"]
    for claim in claims:
        claim.release()
