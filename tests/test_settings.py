from __future__ import annotations

from pathlib import Path

import pytest

from app.domain import BaseIdentity
from app.errors import SettingsError
from app.settings import Scope, Settings, is_loopback, load_settings

BASE = BaseIdentity(digest="0123456789abcdef" * 4, name="org model/1", dtype="float32")


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No settings but the ones a test makes."""
    import os

    for name in list(os.environ):
        if name.upper().startswith("PALIMPSEST_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def test_the_defaults_are_the_almanac_on_loopback() -> None:
    found = Settings()
    assert (found.model, found.host, found.port) == (None, "127.0.0.1", 8000)
    assert (found.device, found.dtype, found.max_body_bytes) == ("auto", "auto", 1 << 20)


def test_flags_win_over_the_environment_which_wins_over_the_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / ".env").write_text(
        "PALIMPSEST_PORT=1\nPALIMPSEST_DTYPE=bfloat16\nPALIMPSEST_THREADS=3\nOTHER=1\n"
    )
    monkeypatch.setenv("PALIMPSEST_PORT", "2")
    monkeypatch.setenv("PALIMPSEST_DTYPE", "float16")
    found = load_settings(port=3, dtype=None)
    assert (found.port, found.dtype, found.threads) == (3, "float16", 3)


def test_keys_come_as_json_and_never_show(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PALIMPSEST_API_KEYS", '{"hush": "edit"}')
    found = load_settings()
    assert found.api_keys == {"hush": Scope.EDIT}
    assert "hush" not in repr(found)


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "::", "example.org"])
def test_without_a_key_only_loopback_is_served(host: str) -> None:
    with pytest.raises(SettingsError, match="no API key"):
        load_settings(host=host)
    assert load_settings(host=host, api_keys={"k": "read"}).host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_loopback_needs_no_key(host: str) -> None:
    assert is_loopback(host)
    assert load_settings(host=host).host == host


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", "70000"),
        ("port", "x"),
        ("max_body_bytes", "0"),
        ("threads", "-1"),
        ("api_keys", "not json"),
        ("api_keys", '{"hush": "root"}'),
        ("api_keys", '{"hu sh": "read"}'),
    ],
)
def test_a_wrong_value_is_named_and_a_key_is_not(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(f"PALIMPSEST_{name.upper()}", value)
    with pytest.raises(SettingsError, match=name) as caught:
        load_settings()
    assert "hush" not in caught.value.detail


def test_each_base_model_has_a_data_folder_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    expected = tmp_path / "palimpsest" / "org-model-1-01234567"
    assert load_settings().data_folder(BASE) == expected
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    root = tmp_path / ".local" / "share" / "palimpsest"
    assert load_settings().data_folder(BASE).parent == root


def test_a_given_data_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    found = load_settings(data=tmp_path / "here")
    assert found.data_folder(BASE) == tmp_path / "here"
    assert found.journal_url(found.data_folder(BASE)).startswith(f"sqlite:///{tmp_path}/here/")
    assert load_settings(database_url="postgresql://db").journal_url(tmp_path) == "postgresql://db"


@pytest.mark.parametrize("corpus", ["hf:org/name,part:train:text", "texts/corpus.txt"])
def test_a_corpus_is_a_path_or_a_dataset_and_may_come_as_either_type(corpus: str) -> None:
    assert load_settings(corpus=Path(corpus)).corpus == corpus
    assert load_settings(corpus=corpus).corpus == corpus
