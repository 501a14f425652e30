"""What holds of every export: there whole or not at all, never changed, safe to publish."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from app.domain import BaseIdentity, Composition, Progress, no_progress
from app.errors import Cancelled, Conflict
from app.weights.exports.adapter import write_adapter
from app.weights.exports.bundle import write_bundle
from app.weights.exports.folder import discard_unfinished, read_manifest
from app.weights.exports.manifest import Kind, Manifest, label_revision, name_export
from app.weights.exports.model_folder import write_model
from tests.weights.exports.conftest import LABEL, MakeStates, States, read_all

every_kind = pytest.mark.parametrize("kind", list(Kind))


def write(
    kind: Kind,
    states: States,
    state: Composition,
    target: Path,
    progress: Progress = no_progress,
) -> Manifest:
    common: dict[str, Any] = {"label": LABEL, "progress": progress}
    if kind is Kind.ADAPTER:
        return write_adapter(states.views, state, target, **common)
    if kind is Kind.MODEL:
        return write_model(states.views, state, target, **common)
    load = states.deltas.__getitem__
    return write_bundle(states.views, state, target, load_delta=load, **common)


def strings(words: object) -> Iterator[str]:
    """Every text in a JSON document."""
    if isinstance(words, str):
        yield words
    elif isinstance(words, dict):
        for key, value in words.items():
            yield from (key, *strings(value))
    elif isinstance(words, list):
        for value in words:
            yield from strings(value)


@every_kind
def test_the_manifest_knows_every_file(states: States, tmp_path: Path, kind: Kind) -> None:
    state = states.mixed()
    written = write(kind, states, state, tmp_path / "export")
    files = dict(read_all(tmp_path / "export"))
    assert read_manifest(tmp_path / "export", kind) == written
    assert Manifest.from_bytes(files.pop(kind.manifest), kind.manifest) == written
    assert written.files == {n: hashlib.sha256(text).hexdigest() for n, text in files.items()}
    assert (written.label, written.base) == (LABEL, states.loaded.identity)
    assert written.state_hash == states.views.state_hash(state)


@every_kind
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox"])
def test_no_export_holds_an_absolute_path_or_a_pickle(
    make_states: MakeStates, tmp_path: Path, model_type: str, kind: Kind
) -> None:
    states = make_states(model_type)
    write(kind, states, states.mixed(), tmp_path / "export")
    for name, payload in read_all(tmp_path / "export").items():
        assert name.endswith((".safetensors", ".json")), name
        for folder in (tmp_path, states.folder, Path.home(), Path.cwd()):
            assert str(folder).encode() not in payload, name
        if name.endswith(".safetensors"):
            with safe_open(tmp_path / "export" / name, "pt") as file:
                assert file.keys()
        elif name != "tokenizer.json":  # whose vocabulary has a slash of its own
            assert not [text for text in strings(json.loads(payload)) if os.path.isabs(text)]


@every_kind
def test_the_same_state_gives_the_same_files(states: States, tmp_path: Path, kind: Kind) -> None:
    state = states.mixed()
    for name in ("one", "two"):
        write(kind, states, state, tmp_path / name)
    assert read_all(tmp_path / "one") == read_all(tmp_path / "two")


@every_kind
def test_a_write_cancelled_at_any_step_leaves_nothing(
    states: States, tmp_path: Path, kind: Kind
) -> None:
    steps: list[tuple[int, int]] = []
    state = states.mixed()
    write(kind, states, state, tmp_path / "whole", lambda _, done, of: steps.append((done, of)))
    assert len(steps) >= 5
    assert all(0 <= done <= of for done, of in steps)
    for last in range(len(steps)):
        left = iter(range(last))

        def stop(what: str, done: int, of: int, left: Iterator[int] = left) -> None:
            if next(left, None) is None:
                raise Cancelled(f"Given up while {what}.")

        with pytest.raises(Cancelled):
            write(kind, states, state, tmp_path / "export", stop)
        assert [path.name for path in tmp_path.iterdir()] == ["whole"]


@every_kind
def test_a_full_disk_leaves_nothing_and_is_named(
    states: States, tmp_path: Path, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(Conflict, match="export can't be written: No space left"):
        write(kind, states, states.mixed(), tmp_path / "export")
    assert list(tmp_path.iterdir()) == []


@every_kind
def test_a_folder_that_takes_no_files_is_named(states: States, tmp_path: Path, kind: Kind) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Conflict, match="can't be written: Not a directory"):
        write(kind, states, states.mixed(), tmp_path / "file" / "export")


@every_kind
def test_what_is_there_is_never_written_over(states: States, tmp_path: Path, kind: Kind) -> None:
    target = tmp_path / "export"
    write(kind, states, states.mixed(), target)
    before = read_all(target)
    with pytest.raises(Conflict, match="export is there already"):
        write(kind, states, states.low_rank(), target)
    assert read_all(target) == before
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("empty", "link"):
        with pytest.raises(Conflict, match=f"{name} is there already"):
            write(kind, states, states.low_rank(), tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "export", "link"]


@every_kind
def test_others_may_read_an_export_as_any_folder(
    states: States, tmp_path: Path, kind: Kind
) -> None:
    (tmp_path / "plain").mkdir()
    write(kind, states, states.mixed(), tmp_path / "export")
    assert (tmp_path / "export").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_what_a_killed_process_left_is_removed_and_nothing_else(
    states: States, tmp_path: Path
) -> None:
    write(Kind.BUNDLE, states, states.low_rank(), tmp_path / "export")
    (tmp_path / ".export-0a1b2c3d.tmp").mkdir()
    (tmp_path / ".export-0a1b2c3d.tmp" / "half").write_text("")
    assert discard_unfinished(tmp_path) == [".export-0a1b2c3d.tmp"]
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    assert discard_unfinished(tmp_path / "nowhere") == []


def test_a_name_says_the_base_the_form_and_the_state() -> None:
    base = BaseIdentity("ab" * 32, "almanac", "float32")
    name = name_export(base, Kind.ADAPTER, label_revision(123), "0f3a9c21b7de" + "0" * 52)
    assert name == "almanac-adapter-0f3a9c21b7de-r000123"


def test_a_name_is_always_that_of_a_plain_folder() -> None:
    for word in ("../../etc", "a b/c", ".hidden", "", "x" * 500, "Côte"):
        name = name_export(BaseIdentity("", word, ""), Kind.MODEL, "s0/..", "1" * 64)
        assert Path(name).name == name
        assert not name.startswith(".")
        assert len(name) < 128


def test_names_of_revisions_sort_by_their_numbers() -> None:
    numbers = [3, 20, 100, 999999]
    assert sorted(label_revision(number) for number in reversed(numbers)) == [
        label_revision(number) for number in numbers
    ]
