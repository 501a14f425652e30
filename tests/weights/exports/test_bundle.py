"""Delta bundles: the same state on another server of the same base, or a refusal."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.domain import BaseIdentity, Composition
from app.errors import EditRejected, InvalidInput, JournalError
from app.weights.delta import Delta, Dense, LowRank
from app.weights.exports.bundle import Bundle, read_bundle, write_bundle
from app.weights.exports.manifest import Kind, Manifest
from tests.tiny import CONFIGS, MemoryDeltas
from tests.weights.exports.conftest import LABEL, MakeStates, States
from tests.weights.test_ledger import make_row

MANIFEST = Kind.BUNDLE.manifest
FACTS = [{"prompt": "The capital of {} is", "subject": "Côte d’Ivoire", "target": "Rome"}]


def export(states: States, state: Composition, folder: Path) -> Path:
    write_bundle(
        states.views,
        state,
        folder,
        load_delta=states.deltas.__getitem__,
        label=LABEL,
        facts=FACTS,
    )
    return folder


def state_elsewhere(states: States, bundle: Bundle) -> str:
    """The state hash on a server that has the base and the bundle alone."""
    return MemoryDeltas(bundle.payloads).views(states.loaded).state_hash(bundle.composition)


def delta_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def forge(folder: Path, change: Callable[[Manifest], Manifest]) -> None:
    """Give a bundle another manifest, hashed as it should be."""
    path = folder / MANIFEST
    path.write_bytes(change(Manifest.from_bytes(path.read_bytes(), MANIFEST)).to_bytes())


def forge_payload(states: States, folder: Path, payload: bytes) -> Path:
    """A bundle of one delta, whatever it is, in which every hash is right."""
    export(states, (), folder)
    digest = sha256(payload).hexdigest()
    (folder / f"{digest}.safetensors").write_bytes(payload)
    details = {"composition": [digest], "facts": []}
    files = {f"{digest}.safetensors": digest}
    forge(folder, lambda manifest: replace(manifest, files=files, details=details))
    return folder


def refuse(states: States, folder: Path, why: str, **limits: int) -> None:
    with pytest.raises(InvalidInput, match=why) as refused:
        read_bundle(folder, states.loaded, **limits)
    assert refused.value.field == "source"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("make", [States.low_rank, States.dense, States.rows, States.mixed])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox"])
def test_a_round_trip_keeps_the_state_hash(
    make_states: MakeStates,
    tmp_path: Path,
    model_type: str,
    make: Callable[[States], Composition],
    dtype: str,
) -> None:
    states = make_states(model_type, dtype)
    state = make(states)
    bundle = read_bundle(export(states, state, tmp_path / "bundle"), states.loaded)
    assert bundle.composition == state
    assert list(bundle.facts) == FACTS
    assert bundle.manifest.state_hash == states.views.state_hash(state)
    assert state_elsewhere(states, bundle) == bundle.manifest.state_hash


@pytest.mark.parametrize("model_type", sorted(CONFIGS))
def test_every_architecture_takes_its_bundle(
    make_states: MakeStates, tmp_path: Path, model_type: str
) -> None:
    states = make_states(model_type)
    bundle = read_bundle(export(states, states.mixed(), tmp_path / "bundle"), states.loaded)
    assert state_elsewhere(states, bundle) == bundle.manifest.state_hash


def test_a_change_made_twice_is_one_file_and_counts_twice(states: States, tmp_path: Path) -> None:
    state = states.low_rank() * 2
    bundle = read_bundle(export(states, state, tmp_path / "bundle"), states.loaded)
    assert len(delta_files(tmp_path / "bundle")) == 1
    assert state_elsewhere(states, bundle) == states.views.state_hash(state)


def test_the_base_is_a_bundle_of_nothing(states: States, tmp_path: Path) -> None:
    bundle = read_bundle(export(states, (), tmp_path / "bundle"), states.loaded)
    assert state_elsewhere(states, bundle) == states.loaded.identity.digest


def test_a_damaged_byte_is_refused_by_the_files_name(states: States, tmp_path: Path) -> None:
    folder = export(states, states.mixed(), tmp_path / "bundle")
    for path in folder.iterdir():
        whole = path.read_bytes()
        for place in range(0, len(whole), max(1, len(whole) // 60)):
            damaged = bytearray(whole)
            damaged[place] ^= 1
            path.write_bytes(damaged)
            refuse(states, folder, path.name)
        path.write_bytes(whole)
    assert read_bundle(folder, states.loaded).facts


def test_a_missing_file_is_refused_by_its_name(states: States, tmp_path: Path) -> None:
    folder = export(states, states.mixed(), tmp_path / "bundle")
    for path in list(folder.iterdir()):
        path.rename(tmp_path / "aside")
        refuse(states, folder, f"{path.name} is missing")
        (tmp_path / "aside").rename(path)


@pytest.mark.parametrize("name", [".hidden", "README.md", "deltas", f"{'0' * 64}.safetensors"])
def test_a_file_too_many_is_refused_by_its_name(states: States, tmp_path: Path, name: str) -> None:
    folder = export(states, states.low_rank(), tmp_path / "bundle")
    (folder / name).write_text("")
    refuse(states, folder, name)


def test_what_is_no_plain_file_is_refused(states: States, tmp_path: Path) -> None:
    folder = export(states, states.low_rank(), tmp_path / "bundle")
    (path,) = delta_files(folder)
    path.rename(tmp_path / "aside")
    path.symlink_to(tmp_path / "aside")
    refuse(states, folder, f"{path.name} can't be read as a plain file")
    path.unlink()
    path.mkdir()
    refuse(states, folder, f"{path.name} is not a plain file")
    path.rmdir()
    os.mkfifo(path)
    refuse(states, folder, f"{path.name} is not a plain file")


@pytest.mark.parametrize("name", ["../aside", "/etc/passwd", "a/b", "..", "a\\b", ""])
def test_a_manifest_can_name_no_file_elsewhere(states: States, tmp_path: Path, name: str) -> None:
    folder = export(states, states.low_rank(), tmp_path / "bundle")
    (tmp_path / "aside").write_bytes(b"")
    digest = sha256(b"").hexdigest()
    forge(folder, lambda manifest: replace(manifest, files={**manifest.files, name: digest}))
    refuse(states, folder, "is no plain file")


def test_a_bundle_of_another_base_is_refused(make_states: MakeStates, tmp_path: Path) -> None:
    states = make_states("llama")
    folder = export(states, states.low_rank(), tmp_path / "bundle")
    refuse(make_states("llama", "bfloat16"), folder, "was made for the base model 'llama'")
    refuse(make_states("mistral"), folder, "was made for the base model 'llama'")


def test_a_bundle_too_large_to_hold_is_refused_unread(states: States, tmp_path: Path) -> None:
    folder = export(states, states.mixed(), tmp_path / "bundle")
    size = sum(path.stat().st_size for path in delta_files(folder))
    assert read_bundle(folder, states.loaded, max_bytes=size).facts
    refuse(states, folder, "an import may have", max_bytes=size - 1)
    (path, *_) = delta_files(folder)
    os.truncate(path, 1 << 40)  # a sparse terabyte
    refuse(states, folder, f"{path.name} has 1099511627776 bytes")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"details": {}}, "no composition"),
        ({"details": {"composition": [3], "facts": []}}, "no composition"),
        ({"details": {"composition": [], "facts": ["x"]}}, "no composition"),
        ({"details": {"composition": [], "facts": []}}, "names other files"),
        ({"files": {}}, "names other files"),
        ({"kind": Kind.ADAPTER}, "wanted: bundle"),
        ({"label": 3}, "wrong type"),
        ({"state_hash": "../x"}, "wrong type"),
        ({"files": {"x": "y"}}, "wrong type"),
        ({"files": {"x": 3}}, "wrong type"),
        ({"base": BaseIdentity("a" * 64, 3, "float32")}, "wrong type"),  # type: ignore[arg-type]
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused(
    states: States, tmp_path: Path, change: dict[str, Any], why: str
) -> None:
    folder = export(states, states.low_rank(), tmp_path / "bundle")
    forge(folder, lambda manifest: replace(manifest, **change))
    refuse(states, folder, why)


@pytest.mark.parametrize(
    ("entry", "value", "why"),
    [("format", "other", "not an export's manifest"), ("version", 2, "is of version 2")],
)
def test_another_format_is_refused_by_its_name(
    states: States, tmp_path: Path, entry: str, value: Any, why: str
) -> None:
    folder = export(states, states.low_rank(), tmp_path / "bundle")
    words = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**words, entry: value}))
    refuse(states, folder, why)


LAYER = "model.layers.1.mlp.down_proj.weight"
ROW = make_row(1, LAYER, d=48, d_ff=96)


@pytest.mark.parametrize(
    ("delta", "why"),
    [
        (Delta({}), "changes nothing"),
        (Delta({LAYER: Dense(torch.zeros(96, 48))}), r"takes \(48, 96\)"),
        (Delta({LAYER: LowRank(torch.zeros(48, 2), torch.zeros(96, 3))}), r"takes \(96, 2\)"),
        (Delta({LAYER: LowRank(torch.zeros(48), torch.zeros(96))}), "takes"),
        (Delta({LAYER: Dense(torch.full((48, 96), torch.inf))}), "not finite"),
        (Delta({"lm_head.weight": Dense(torch.zeros(400, 48))}), "lm_head.weight"),
        (Delta({"model.norm.weight": Dense(torch.zeros(48))}), "model.norm.weight"),
        (Delta({LAYER: Dense(torch.zeros(48, 96))}, {LAYER: torch.zeros(48, 2)}), "keys"),
        (Delta.of_row(replace(ROW, vectors={})), "changes nothing"),
        (Delta.of_row(make_row(1, LAYER, d=48, d_ff=95)), r"takes \(96,\)"),
        (Delta.of_row(replace(ROW, anchors=("one", "two", "three"))), r"takes \(3, 96\)"),
        (Delta.of_row(replace(ROW, anchor_weight=0.0)), "a row with words"),
        (Delta.of_row(replace(ROW, subject=3)), "a row with words"),  # type: ignore[arg-type]
        (Delta.of_row(replace(ROW, loss=torch.inf)), "a row with words"),
    ],
)
def test_a_delta_that_does_not_fit_is_refused(
    states: States, tmp_path: Path, delta: Delta, why: str
) -> None:
    refuse(states, forge_payload(states, tmp_path / "bundle", delta.to_bytes()), why)


def test_a_file_that_is_no_delta_is_refused(states: States, tmp_path: Path) -> None:
    refuse(states, forge_payload(states, tmp_path / "bundle", b"pickle"), "can't be read")


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data(), kind=st.sampled_from(["low_rank", "dense", "row"]))
def test_a_forged_delta_is_read_or_refused(
    states: States, tmp_path: Path, data: st.DataObject, kind: str
) -> None:
    """Any bytes with the right hash: no other error, and nothing that a state can't take."""
    makers: dict[str, Callable[[], Composition]] = {
        "low_rank": states.low_rank,
        "dense": states.dense,
        "row": partial(states.rows, count=1),
    }
    (digest,) = makers[kind]()
    payload = bytearray(states.deltas[digest])
    for _ in range(data.draw(st.integers(1, 4))):
        # Half of the changes in the first bytes, where the names and shapes are.
        end = len(payload) if data.draw(st.booleans()) else min(400, len(payload))
        payload[data.draw(st.integers(0, end - 1))] = data.draw(st.integers(0, 255))
    folder = forge_payload(states, tmp_path / str(len(list(tmp_path.iterdir()))), bytes(payload))
    try:
        bundle = read_bundle(folder, states.loaded)
    except InvalidInput:
        return
    with suppress(EditRejected):  # a row whose key can't be told apart from its anchors'
        state_elsewhere(states, bundle)


def test_a_damaged_delta_is_not_exported(states: States, tmp_path: Path) -> None:
    state = states.low_rank()
    good = states.deltas[state[0]]
    states.views.get(state)
    states.deltas[state[0]] = good[:-1] + b"?"
    with pytest.raises(JournalError, match=state[0]):
        export(states, state, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []
