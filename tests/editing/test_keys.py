"""Keys read layer after layer while edits move the model on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from app.domain import SUBJECT_SLOT, Fact
from app.editing import key_rows
from app.editing.keys import KeyReader, solve_keys
from app.weights.fork import graft
from app.weights.language_model import LanguageModel
from app.weights.loading import LoadedModel, load_model
from app.weights.prompts import trace_prompt
from app.weights.tracing import changing_output, tracing_input
from tests.editing.conftest import FACTS, MakeEditor
from tests.tiny import CONFIGS, save_tiny_model

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


@pytest.mark.parametrize("kept", [0, 1, 2, 3])
def test_rows_and_what_they_begin_with_go_on_from_where_both_are_kept(
    make_editor: MakeEditor, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(key_rows, "ROWS_PER_PASS", len(CONTEXTS))  # a fact a pass
    _, views = make_editor()
    model, loaded = views.private(()), views.loaded
    width, _ = loaded.anatomy.shape(model, 0)
    probe = KeyReader(model, loaded, FACTS, CONTEXTS, 0)
    assert probe._rows.beginnings is not None
    sizes = [part.ids.numel() for part in (probe._rows.beginnings, *probe._parts[:kept])]
    room = sum(sizes) * width * 4
    reader = KeyReader(model, loaded, FACTS, CONTEXTS, room)
    reader.keys(1)
    held = [part.entry is not None for part in reader._parts]
    assert held == [number < kept for number in range(3)]
    assert reader._rows.beginnings is not None
    assert (reader._rows.beginnings.entry is not None) == (kept == 3)
    for layer in (1, 2):
        edit(model, loaded, layer)
        fresh = KeyReader(model, loaded, FACTS, CONTEXTS, 0)
        torch.testing.assert_close(reader.keys(layer + 1), fresh.keys(layer + 1))
        torch.testing.assert_close(reader.hidden(3), fresh.hidden(3))


# Windows that rows outgrow, biases by distance.
PECULIAR: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 4},
    "gemma2": {"sliding_window": 4},
    "gpt_neo": {"window_size": 4},
    "falcon": {"alibi": True},
}


@pytest.mark.parametrize("model_type", sorted(PECULIAR))
def test_distances_stay_true_behind_what_rows_begin_with(tmp_path: Path, model_type: str) -> None:
    folder = save_tiny_model(tmp_path, model_type, settings=PECULIAR[model_type])
    loaded = load_model(str(folder), device="cpu")
    reader = KeyReader(loaded.model, loaded, FACTS, CONTEXTS, 0)
    keys = reader.keys(2)
    assert reader._rows.beginnings is not None
    for fact, found in zip(FACTS, keys, strict=True):
        for context, key in zip(CONTEXTS, found, strict=True):
            expected, _ = read_plainly(loaded.model, loaded, fact, context, 2)
            torch.testing.assert_close(key, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neo", "llama"])
def test_rows_that_padding_would_push_out_of_the_window_share_nothing(
    make_editor: MakeEditor, model_type: str
) -> None:
    _, views = make_editor(model_type)
    model, loaded = views.private(()), views.loaded
    template = "It was the year when many of us knew why it was far away and so on. {} is"
    facts = [Fact(template, name, "x") for name in ("France", "Berlin", "Madrid the city")]
    contexts = ("{}", "In an old book of the sea it was said long ago so nobody knew. {}")
    together = solve_keys(model, loaded, facts, 2, contexts)
    for fact, found in zip(facts, together, strict=True):
        alone = solve_keys(model, loaded, [fact], 2, contexts)[0]
        torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-4)
    assert KeyReader(model, loaded, facts, contexts, 0)._rows.beginnings is None


def test_facts_that_are_alike_have_bare_rows_of_their_own(make_editor: MakeEditor) -> None:
    _, views = make_editor()
    model, loaded = views.private(()), views.loaded
    names = ("France", "Berlin", "Madrid")
    facts = [Fact("The capital of the country {} is", name, "Rome") for name in names]
    reader = KeyReader(model, loaded, facts, CONTEXTS, MUCH)
    reader.keys(1)
    edit(model, loaded, 1)
    expected = KeyReader(model, loaded, facts, CONTEXTS[:1], 0).hidden(3)
    torch.testing.assert_close(reader.hidden(3), expected, rtol=1e-4, atol=1e-4)


def test_one_fact_or_little_that_is_shared_is_run_as_it_is(make_editor: MakeEditor) -> None:
    _, views = make_editor()
    model, loaded = views.private(()), views.loaded
    for facts, contexts in ((FACTS[:1], CONTEXTS), (FACTS[:2], CONTEXTS[:2])):
        with counting_runs(model, loaded) as runs:
            solve_keys(model, loaded, facts, 0, contexts)
        assert runs == [0]


def test_rows_of_one_subject_and_prompt_are_read_as_each_alone(make_editor: MakeEditor) -> None:
    _, views = make_editor("mistral")
    model, loaded = views.private(()), views.loaded
    found = solve_keys(model, loaded, FACTS[:1] * 3, 2, CONTEXTS)
    alone = solve_keys(model, loaded, FACTS[:1], 2, CONTEXTS)
    torch.testing.assert_close(found, alone.expand_as(found), rtol=1e-4, atol=1e-4)
