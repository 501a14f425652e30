"""Keys read layer after layer while edits move the model on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from app.domain import SUBJECT_SLOT, Fact
from app.editing import key_rows
from app.editing.keys import KeyReader, solve_keys
from app.weights.fork import graft
from app.weights.language_model import LanguageModel
from app.weights.loading import LoadedModel
from app.weights.prompts import trace_prompt
from app.weights.tracing import changing_output, tracing_input
from tests.editing.conftest import FACTS, MakeEditor
from tests.tiny import CONFIGS

CONTEXTS = (
    "{}",
    "In an old book about the sea. {}",
    "So {}",
    "It was said long ago and far away, though nobody knew why. {}",
)
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


@contextmanager
def counting_tokens(model: nn.Module, loaded: LoadedModel) -> Iterator[list[int]]:
    """Tokens of each pass, padding included."""
    seen: list[int] = []
    layer = loaded.anatomy.layer(model, 0)
    with tracing_input(layer, lambda hidden: seen.append(hidden.shape[0] * hidden.shape[1])):
        yield seen


def read_plainly(
    model: LanguageModel, loaded: LoadedModel, fact: Fact, context: str, layer: int
) -> tuple[Tensor, Tensor]:
    """One row, whole: what enters the projection and what leaves the layer at the subject."""
    row = trace_prompt(loaded, context.replace(SUBJECT_SLOT, fact.template, 1), fact.subject)
    seen: dict[str, Tensor] = {}

    def pick(tensor: Tensor) -> Tensor:
        return tensor.reshape(len(row.ids), -1)[row.subject]

    def see_output(output: Tensor) -> Tensor:
        seen["hidden"] = pick(output)
        return output

    def see_key(inputs: Tensor) -> None:
        seen["key"] = pick(inputs)

    with (
        torch.no_grad(),
        tracing_input(loaded.anatomy.projection(model, layer), see_key),
        changing_output(loaded.anatomy.layer(model, layer), see_output),
    ):
        model(input_ids=torch.tensor([row.ids]))
    return seen["key"], seen["hidden"]


@pytest.mark.parametrize("model_type", sorted(CONFIGS))
@pytest.mark.parametrize(("layers", "rows_per_pass"), [((0, 1, 2, 3), 4), ((1, 3), 64)])
def test_a_reader_gives_what_the_edited_model_gives_each_row_alone(
    make_editor: MakeEditor,
    model_type: str,
    layers: tuple[int, ...],
    rows_per_pass: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(key_rows, "ROWS_PER_PASS", rows_per_pass)
    _, views = make_editor(model_type)
    model, loaded = views.private(()), views.loaded
    last = layers[-1]

    def expect(found: Tensor, layer: int, contexts: Sequence[str], which: int) -> None:
        rows = [
            read_plainly(model, loaded, fact, context, layer)[which]
            for fact in FACTS
            for context in contexts
        ]
        torch.testing.assert_close(found, torch.stack(rows).view(found.shape), rtol=1e-4, atol=1e-4)

    reader = KeyReader(model, loaded, FACTS, CONTEXTS, MUCH)
    for layer in layers:
        if layer == last:
            keys, hidden = reader.keys_and_hidden(layer)
        else:
            keys, hidden = reader.keys(layer), reader.hidden(last)
        expect(keys, layer, CONTEXTS, 0)
        expect(hidden, last, CONTEXTS[:1], 1)
        edit(model, loaded, layer)


def test_bare_prompts_are_read_in_as_few_passes_as_they_fill(make_editor: MakeEditor) -> None:
    _, views = make_editor()
    model, loaded = views.private(()), views.loaded
    contexts = ("{}", *(f"Word number {number} here. {{}}" for number in range(20)))
    for room in (0, MUCH):
        reader = KeyReader(model, loaded, FACTS * 5, contexts, room)
        with counting_runs(model, loaded) as seen:
            reader.keys(0)
            assert len(seen) == 1 + 5  # what contexts begin with; three facts in 21 contexts each
            seen.clear()
            reader.hidden(0)
            assert len(seen) == 1


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
    monkeypatch.setattr(key_rows, "ROWS_PER_PASS", len(CONTEXTS))  # a fact a pass
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
    torch.testing.assert_close(
        reader.hidden(2), KeyReader(model, loaded, FACTS, CONTEXTS, 0).hidden(2)
    )


def test_what_contexts_begin_with_is_run_once_and_kept_with_the_rest(
    make_editor: MakeEditor,
) -> None:
    _, views = make_editor()
    model, loaded = views.private(()), views.loaded
    rows = [
        trace_prompt(loaded, context.replace(SUBJECT_SLOT, fact.template, 1), fact.subject)
        for fact in FACTS
        for context in CONTEXTS
    ]
    reader = KeyReader(model, loaded, FACTS, CONTEXTS, MUCH)
    with counting_tokens(model, loaded) as seen:
        reader.keys(1)
    alone = max(len(row.ids) for row in rows[:: len(CONTEXTS)])
    beginnings, own = seen
    assert len(rows) < own <= len(rows) * (alone + 1)
    assert beginnings < 2 * max(len(row.ids) for row in rows)  # of the two long contexts
    with counting_runs(model, loaded) as runs:
        reader.keys(2)
    assert runs == [1, 2, 1, 2]


def test_rows_of_one_subject_and_prompt_are_read_as_each_alone(make_editor: MakeEditor) -> None:
    _, views = make_editor("mistral")
    model, loaded = views.private(()), views.loaded
    found = solve_keys(model, loaded, FACTS[:1] * 3, 2, CONTEXTS)
    alone = solve_keys(model, loaded, FACTS[:1], 2, CONTEXTS)
    torch.testing.assert_close(found, alone.expand_as(found), rtol=1e-4, atol=1e-4)
