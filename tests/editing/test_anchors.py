from __future__ import annotations

from pathlib import Path

import pytest
import torch

from app.domain import Fact
from app.editing.anchors import NAME, Anchors, find_anchors, read_names
from app.editing.basis import Bases, Weights
from app.editing.keys import solve_keys
from tests.editing.conftest import MakeEditor

CONTEXTS = ("{}",)


def test_names_are_words_that_begin_with_a_capital() -> None:
    text = "in 1987 Ada Skomavar of New York met Émile, Jean-Luc and O'Hara; iPhone X"
    found = ["Ada Skomavar", "New York", "Émile", "Jean-Luc", "O'Hara", "X"]
    assert NAME.findall(text) == found


def test_an_anchor_names_a_subject_word_for_word() -> None:
    anchors = Anchors(("Niger", "New York", "York", "Nigeria", "New York City"), torch.zeros(5, 2))
    assert anchors.of("Niger") == [0]
    assert anchors.of("New York") == [1, 2, 4]
    assert anchors.of("Paris") == []


def test_anchors_are_found_once_and_their_keys_are_those_of_the_names(
    make_editor: MakeEditor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, views = make_editor()
    loaded = views.loaded
    heard: list[tuple[str, int, int]] = []
    first = find_anchors(loaded, 1, CONTEXTS, tmp_path, lambda *progress: heard.append(progress))
    assert heard[:2] == [("names", 0, 2), ("names", 1, 2)]
    chunks = range(0, len(first.names), 64)
    assert heard[2:] == [("anchors", start, len(first.names)) for start in chunks]
    assert first.names == read_names(loaded)
    assert len(first.names) > 10
    facts = [Fact("{}", name, "x") for name in first.names]
    keys = solve_keys(views.private(()), loaded, facts, 1, CONTEXTS).mean(dim=1)
    torch.testing.assert_close(first.keys, keys)
    monkeypatch.setattr("app.editing.anchors.read_names", None)
    monkeypatch.setattr("app.editing.anchors.solve_keys", None)
    again = find_anchors(loaded, 1, CONTEXTS, tmp_path)
    assert again.names == first.names
    assert torch.equal(again.keys, first.keys)


@pytest.mark.parametrize("suffix", ["json", "safetensors"])
def test_damaged_anchors_are_found_anew(
    make_editor: MakeEditor, tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str
) -> None:
    _, views = make_editor()
    first = find_anchors(views.loaded, 1, CONTEXTS, tmp_path)
    (file,) = tmp_path.glob(f"anchors*.{suffix}")
    file.write_bytes(b"{")
    again = find_anchors(views.loaded, 1, CONTEXTS, tmp_path)
    assert again.names == first.names
    assert torch.equal(again.keys, first.keys)
    assert "damaged" in capsys.readouterr().out


def test_a_basis_is_the_covariance_and_the_anchors_keys(
    make_editor: MakeEditor, tmp_path: Path
) -> None:
    editor, views = make_editor()
    bases = Bases(views.loaded, folder=tmp_path, covariance=editor._statistics.covariance)
    weights = Weights(covariance=7.0, ridge=0.1, anchor=0.5)
    basis = bases.find(1, weights, CONTEXTS)
    keys = basis.anchors.keys.double()
    moment = editor._statistics.covariance(1, 0.1).matrix()
    probe = torch.randn(3, keys.shape[1], generator=torch.Generator().manual_seed(0))
    plain = torch.linalg.solve(7 * moment + 0.5 * keys.T @ keys, probe.double().T).T
    torch.testing.assert_close(basis.solve(probe), plain)
    assert bases.find(1, weights, CONTEXTS) is basis


def test_a_basis_is_named_for_what_went_into_it(make_editor: MakeEditor, tmp_path: Path) -> None:
    editor, views = make_editor()
    bases = Bases(views.loaded, folder=tmp_path, covariance=editor._statistics.covariance)
    chosen = [
        bases.find(layer, Weights(weight, ridge, anchor), CONTEXTS)
        for layer, weight, ridge, anchor in (
            (1, 7.0, 0.1, 0.5),
            (1, 8.0, 0.1, 0.5),
            (1, 7.0, 0.2, 0.5),
            (1, 7.0, 0.1, 0.0),
            (2, 7.0, 0.1, 0.5),
        )
    ]
    assert len({basis.identity for basis in chosen}) == len(chosen)
    assert chosen[3].anchors.names == ()
