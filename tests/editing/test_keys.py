"""Keys read layer after layer while edits move the model on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from app.editing import keys as keys_module
from app.editing.keys import KeyReader, solve_keys
from app.weights.fork import graft
from app.weights.language_model import LanguageModel
from app.weights.loading import LoadedModel
from tests.editing.conftest import FACTS, MakeEditor
from tests.tiny import CONFIGS

CONTEXTS = ("{}", "In an old book about the sea. {}")
MUCH = 1 << 30


def edit(model: LanguageModel, loaded: LoadedModel, layer: int) -> None:
    name = loaded.anatomy.matrix_name(layer)
    weight = model.get_parameter(name)
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(layer))
    graft(model, {name: weight.detach() + 0.1 * weight.std() * noise})


@contextmanager
def counting_runs(model: nn.Module, loaded: LoadedModel) -> Iterator[list[int]]:
    """The layers that are run, in order."""
    seen: list[int] = []

    def note(index: int) -> Callable[..., None]:
        return lambda *_: seen.append(index)

    layers = [loaded.anatomy.layer(model, index) for index in range(loaded.anatomy.depth)]
    # The attention's norm is no layer's last module; a layer left out runs no module of its own.
    handles = [
        next(iter(layer.children())).register_forward_pre_hook(note(index))
        for index, layer in enumerate(layers)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("model_type", sorted(CONFIGS))
@pytest.mark.parametrize("room", [0, MUCH])
def test_a_reader_gives_what_the_edited_model_gives_anew(
    make_editor: MakeEditor, model_type: str, room: int
) -> None:
    _, views = make_editor(model_type)
    model, loaded = views.private(()), views.loaded
    reader = KeyReader(model, loaded, FACTS, CONTEXTS, room)
    for layer in (0, 1, 2):
        found = reader.keys(layer)
        hidden = reader.hidden(2)
        torch.testing.assert_close(found, solve_keys(model, loaded, FACTS, layer, CONTEXTS))
        expected = KeyReader(model, loaded, FACTS, CONTEXTS, 0)
        torch.testing.assert_close(hidden, expected.hidden(2))
        if layer < 2:
            edit(model, loaded, layer)
    both = reader.keys_and_hidden(2)
    torch.testing.assert_close(both[0], found)
    torch.testing.assert_close(both[1], hidden)


def test_layers_before_the_one_read_last_are_not_run_again(make_editor: MakeEditor) -> None:
    _, views = make_editor()
    model, loaded = views.private(()), views.loaded
    reader = KeyReader(model, loaded, FACTS, CONTEXTS, MUCH)
    reader.keys(1)
    with counting_runs(model, loaded) as seen:
        reader.keys(2)
        assert set(seen) == {1, 2}
        seen.clear()
        reader.hidden(2)
        assert set(seen) == {2}


def test_what_entered_a_layer_is_kept_only_where_there_is_room(
    make_editor: MakeEditor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys_module, "ROWS_PER_PASS", 2)  # a fact a pass
    _, views = make_editor()
    model, loaded = views.private(()), views.loaded
    width, _ = loaded.anatomy.shape(model, 0)
    probe = KeyReader(model, loaded, FACTS, CONTEXTS, 0)._parts
    room = sum(part.ids.numel() for part in probe[:2]) * width * 4
    reader = KeyReader(model, loaded, FACTS, CONTEXTS, room)
    reader.keys(0)
    assert [part.entry is not None for part in reader._parts] == [True, True, False]
    edit(model, loaded, 0)
    torch.testing.assert_close(reader.keys(1), solve_keys(model, loaded, FACTS, 1, CONTEXTS))
